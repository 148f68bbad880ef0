# Every verb does one thing; CI calls the same ones. `make install` comes first by itself.
.DEFAULT_GOAL := help
.PHONY: help install lock format check test test-slow test-scatter coverage faults faults-streams faults-s3 soak demo up down status \
	bench bench-bus bench-streams bench-urza bench-rebuild bench-compile bench-tamiyo train-tamiyo compare-tamiyo bench-kasmina catalogues compat wheel-check clean
ROUNDS ?= 50
WORKERS ?= 2
STEPS ?= 10000
OPS ?= 10000
RECORDS ?= 200000
MINUTES ?= 10
GROUND_MINUTES ?= 18
INTO ?= policy
POLICY ?= services/tamiyo/shipped
RUNS ?= 12
TABLE ?= comparison.json
HOLD ?= 300
MODELS ?= *
export TORCH
BIN := .venv/bin
PYTHON ?= python3

help: ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 14

install: ## .venv with everything pinned (TORCH="torch==..." for another build of torch)
	@exec $(PYTHON) scripts/setup.py

demo: install ## one real training run that grows, from start to report
	@exec $(BIN)/esper demo

test: install ## all tests but the slow ones, on WORKERS=2 processes, each with its own stack
	@exec $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: install ## the tests that take longest: outages, kills, whole processes again and again
	@exec $(BIN)/python -m pytest --slow -m slow tests/e2e tests/integration

test-scatter: install ## the policy's tests with torch-geometric, with torch-scatter, with both (compiles once, 7 minutes)
	@exec $(BIN)/python scripts/scatter.py

format: install ## write the code in its one form
	@$(BIN)/ruff check -q --fix-only .
	@$(BIN)/ruff format .

check: install ## linters, types, import directions, released contracts
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/esper schema check

coverage: install ## the contracts are covered whole
	@$(BIN)/coverage run --branch --source=schemas -m pytest -q tests/contract
	@$(BIN)/coverage report --fail-under=100 --skip-covered

faults: install ## kills, cuts and stalls, ROUNDS=50 of them; seeds that fail in STEPS=10000 steps of training
	@exec $(BIN)/python -m pytest --slow -q -s tests/faults/test_faults.py tests/faults/test_seed_faults.py \
		tests/faults/test_urza_faults.py --fault-rounds $(ROUNDS) --fault-steps $(STEPS)

faults-streams: install ## what can befall the stream workers, ROUNDS=20 times: rows equal a replay after each
	@exec $(BIN)/python -m pytest --slow -q -s tests/faults/test_streams_faults.py tests/faults/test_stream_refusals.py \
		tests/faults/test_fold_faults.py --fault-rounds $(ROUNDS)

faults-s3: install ## OPS=10000 operations on S3 behind a proxy that cuts, stalls and lies: none lost, none torn
	@exec $(BIN)/python -m pytest --slow -q -s tests/faults/test_s3_storm.py --s3-operations $(OPS)

soak: install ## MINUTES=10 of writing and reading: memory and descriptors flat
	@exec $(BIN)/python tests/faults/soak.py --minutes $(MINUTES)

wheel-check: install ## build the wheel, run the worker's help from it in an empty environment
	@exec $(BIN)/python scripts/wheel_check.py

bench: install ## the benchmarks: they print, they judge nothing
	@for b in tests/benchmarks/*/bench_*.py; do echo "== $$b"; $(BIN)/python $$b || failed="$$failed $$b"; done; \
		test -z "$$failed" || { echo "these did not run to their end:$$failed"; exit 1; }

bench-bus: install ## Oona beside aiokafka and confluent-kafka; HOLD=300 s of 10,000 events a second
	@exec $(BIN)/python tests/benchmarks/oona/bench_bus.py --hold $(HOLD)

bench-streams: install ## from topic to committed rows: health signals a second by workers and by stored rows; the profile
	@exec $(BIN)/python tests/benchmarks/streams/bench_streams.py --records $(RECORDS) --profile

bench-urza: install ## Urza's API under wrk, 1,000 clients at once, and each of its queries
	@exec $(BIN)/python tests/benchmarks/services/bench_urza.py

bench-rebuild: install ## a rebuild beside plain folding, and how long workers wait for its swap
	@exec $(BIN)/python tests/benchmarks/streams/bench_rebuild.py

bench-compile: install ## what a certificate and a kernel cost, beside one after the other
	@exec $(BIN)/python tests/benchmarks/services/bench_kernel_builder.py

bench-tamiyo: install ## what Tamiyo costs: the policy by nodes, runs in one pass, pooling; the service; the replay
	@for b in tamiyo decisions replay; do echo "== bench_$$b"; $(BIN)/python tests/benchmarks/services/bench_$$b.py || exit 1; done

catalogues: install ## torchvision, timm, transformers, peft: models that nobody here wrote
	@exec $(PYTHON) scripts/setup.py catalogues

compat: catalogues ## wrap, train, grow, save, load, unwrap every model of the catalogues; MODELS= is a pattern
	@exec $(BIN)/python tests/benchmarks/compatibility/compatibility.py --models "$(MODELS)"

bench-kasmina: catalogues ## what seeds cost, beside PEFT; what a cache, a transition and a signal cost
	@for b in tests/benchmarks/kasmina/bench_kasmina*.py; do echo "== $$b"; $(BIN)/python $$b || exit 1; done

train-tamiyo: install ## a policy for Tamiyo from nothing: GROUND_MINUTES=18 of small runs, a fit, a verdict; into INTO=policy
	@exec $(BIN)/python scripts/on_a_stack.py --new "$(INTO)" \
		"tamiyo ground --runs 100000 --minutes $(GROUND_MINUTES) --services --folder {folder}$(if $(CIFAR), --cifar '$(CIFAR)')" \
		"tamiyo retrain --into '$(INTO)'"

compare-tamiyo: install ## POLICY (the shipped one) beside wait, random, schedule, heuristic on RUNS=12 held-out runs and as many held-out hosts
	@exec $(BIN)/python scripts/on_a_stack.py \
		"tamiyo compare --fitted '$(POLICY)' --runs $(RUNS) --hosts $(RUNS) --folder {folder} --into '$(TABLE)'"

up: install ## the embedded Kafka, Postgres and S3, kept running
	@exec $(BIN)/esper up

down: ## stop them
	@exec $(BIN)/esper down

status: ## how they are
	@exec $(BIN)/esper status

lock: install ## new pins from the ranges in pyproject.toml
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/lock.py --upgrade

clean: ## remove what was built here
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage
