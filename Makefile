# Development tasks. CI calls the same targets. Each target that needs the environment runs `make install` first.
.DEFAULT_GOAL := help
.PHONY: help install lock format check test test-slow test-scatter coverage faults faults-streams faults-s3 soak demo up down status \
	bench bench-bus bench-streams bench-urza bench-rebuild bench-compile bench-tamiyo train-tamiyo compare-tamiyo bench-kasmina catalogues compat wheel-check docs clean
ROUNDS ?= 50
WORKERS ?= 2
STEPS ?= 10000
OPS ?= 10000
RECORDS ?= 200000
MINUTES ?= 10
CORPUS_MINUTES ?= 18
INTO ?= policy
POLICY ?= services/tamiyo/shipped
RUNS ?= 12
TABLE ?= comparison.json
HOLD ?= 300
MODELS ?= *
export TORCH
BIN := .venv/bin
PYTHON ?= python3

help: ## list all targets
	@grep -hE '^[a-z0-9-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 16

install: ## install everything pinned into .venv (TORCH="torch==..." for another build of torch)
	@exec $(PYTHON) scripts/setup.py

demo: install ## train a small network that grows on a temporary stack, and print a report
	@exec $(BIN)/esper demo

test: install ## run all tests except the slow ones, on WORKERS=2 processes
	@exec $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: install ## run the slow tests: outages, killed processes, end-to-end runs
	@exec $(BIN)/python -m pytest --slow -m slow tests/e2e tests/integration

test-scatter: install ## run the policy's tests with torch-geometric, torch-scatter and both (first time: compiles for 7 minutes)
	@exec $(BIN)/python scripts/scatter_check.py

format: install ## format the code and fix what the linter can fix
	@$(BIN)/ruff check -q --fix-only .
	@$(BIN)/ruff format .

check: install ## check formatting, lint, types, import directions and released contracts
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/esper schema check

coverage: install ## check that tests/contract cover every branch of schemas/
	@$(BIN)/coverage run --branch --source=schemas -m pytest -q tests/contract
	@$(BIN)/coverage report --fail-under=100 --skip-covered

faults: install ## inject kills, cuts and stalls for ROUNDS=50 rounds, and seed failures for STEPS=10000 training steps
	@exec $(BIN)/python -m pytest --slow -q -s tests/faults/test_bus_faults.py tests/faults/test_seed_faults.py \
		tests/faults/test_urza_faults.py --fault-rounds $(ROUNDS) --fault-steps $(STEPS)

faults-streams: install ## inject faults into stream workers for ROUNDS=50 rounds; compare the rows with a replay after each
	@exec $(BIN)/python -m pytest --slow -q -s tests/faults/test_streams_faults.py tests/faults/test_stream_refusals.py \
		tests/faults/test_projection_faults.py --fault-rounds $(ROUNDS)

faults-s3: install ## run OPS=10000 operations on S3 through a proxy that injects faults; check that no blob is lost or torn
	@exec $(BIN)/python -m pytest --slow -q -s tests/faults/test_s3_storm.py --s3-operations $(OPS)

soak: install ## write and read for MINUTES=10; check that memory and file descriptors stay flat
	@exec $(BIN)/python tests/faults/soak.py --minutes $(MINUTES)

wheel-check: install ## build the wheel and start the worker's command line from it in an empty environment
	@exec $(BIN)/python scripts/wheel_check.py

bench: install ## run all benchmarks; they print measurements and assert nothing
	@for b in tests/benchmarks/*/bench_*.py; do echo "== $$b"; $(BIN)/python $$b || failed="$$failed $$b"; done; \
		test -z "$$failed" || { echo "failed benchmarks:$$failed"; exit 1; }

bench-bus: install ## benchmark Oona against aiokafka and confluent-kafka; hold 10,000 events/s for HOLD=300 s
	@exec $(BIN)/python tests/benchmarks/oona/bench_bus.py --hold $(HOLD)

bench-streams: install ## benchmark projection of RECORDS=200000 health signals, by number of workers; with a profile
	@exec $(BIN)/python tests/benchmarks/streams/bench_streams.py --records $(RECORDS) --profile

bench-urza: install ## benchmark Urza's API with 1,000 clients, and each of its queries
	@exec $(BIN)/python tests/benchmarks/services/bench_urza.py

bench-rebuild: install ## benchmark a rebuild of the projections, and how long workers wait for its swap
	@exec $(BIN)/python tests/benchmarks/streams/bench_rebuild.py

bench-compile: install ## benchmark certification of blueprints and building of kernels
	@exec $(BIN)/python tests/benchmarks/services/bench_kernel_builder.py

bench-tamiyo: install ## benchmark Tamiyo's policy, its decisions and the replay of experiences
	@for b in tamiyo decisions replay; do echo "== bench_$$b"; $(BIN)/python tests/benchmarks/services/bench_$$b.py || exit 1; done

catalogues: install ## install torchvision, timm, transformers and peft for compat and bench-kasmina
	@exec $(PYTHON) scripts/setup.py catalogues

compat: catalogues ## wrap, train, grow, save, load and unwrap every catalogue model that matches MODELS="*"
	@exec $(BIN)/python tests/benchmarks/compatibility/compatibility.py --models "$(MODELS)"

bench-kasmina: catalogues ## benchmark seeds against PEFT, and the kernel cache, transitions and health signals
	@for b in tests/benchmarks/kasmina/bench_kasmina*.py; do echo "== $$b"; $(BIN)/python $$b || exit 1; done

train-tamiyo: install ## train a policy from scratch: CORPUS_MINUTES=18 of small runs, then fit and evaluate; writes INTO=policy
	@exec $(BIN)/python scripts/run_on_stack.py --new "$(INTO)" \
		"tamiyo corpus --runs 100000 --minutes $(CORPUS_MINUTES) --services --folder {folder}$(if $(CIFAR), --cifar '$(CIFAR)')" \
		"tamiyo retrain --into '$(INTO)'"

compare-tamiyo: install ## compare POLICY (default: the shipped one) with the baselines on RUNS=12 held-out runs and RUNS=12 held-out hosts
	@exec $(BIN)/python scripts/run_on_stack.py \
		"tamiyo compare --fitted '$(POLICY)' --runs $(RUNS) --hosts $(RUNS) --folder {folder} --into '$(TABLE)'"

up: install ## start Kafka, Postgres and S3 in the background
	@exec $(BIN)/esper up

down: ## stop Kafka, Postgres and S3
	@exec $(BIN)/esper down

status: ## show the state of Kafka, Postgres and S3
	@exec $(BIN)/esper status

docs: install ## build the documentation into site/; a broken link fails
	@$(BIN)/uv pip install -q --python $(BIN)/python --require-hashes --no-deps -r requirements/docs.txt
	@exec $(BIN)/zensical build --clean --strict

lock: install ## update the pins in requirements/ from the ranges in pyproject.toml
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/lock_requirements.py --upgrade

clean: ## remove .venv and all caches and build outputs
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage .cache .schemathesis site
