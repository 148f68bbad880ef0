# Every verb does one thing; CI calls the same ones. `make install` comes first by itself.
.DEFAULT_GOAL := help
.PHONY: help install lock format check test demo up down status bench wheel-check clean
export TORCH
BIN := .venv/bin
PYTHON ?= python3

help: ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 14

install: ## .venv with everything pinned (TORCH="torch==..." for another build of torch)
	@exec $(PYTHON) scripts/setup.py

demo: install ## one real training run that grows, from start to report
	@exec $(BIN)/esper demo

test: install ## all tests but the slow proofs
	@exec $(BIN)/python -m pytest

format: install ## write the code in its one form
	@$(BIN)/ruff check -q --fix-only .
	@$(BIN)/ruff format .

check: install ## linters, types, import directions
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

wheel-check: install ## build the wheel, run the worker's help from it in an empty environment
	@exec $(BIN)/python scripts/wheel_check.py

bench: install ## the benchmarks: they print, they judge nothing
	@for b in tests/benchmarks/bench_*.py; do echo "== $$b"; $(BIN)/python $$b || exit 1; done

up: install ## the embedded Kafka, Postgres and S3, kept running
	@exec $(BIN)/esper up

down: ## stop them
	@exec $(BIN)/esper down

status: ## how they are
	@exec $(BIN)/esper status

lock: install ## new pins from the ranges in pyproject.toml
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/lock.py --upgrade

clean: ## remove what was built here
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
