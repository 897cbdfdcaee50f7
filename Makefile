# Every command a person types. `make help` lists them; CI calls `make test`.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SEED ?= 0
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help setup demo test check fix fast engine slow compose-test clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(READY) ## create .venv with the trainer, the CPU service and the tools

$(READY): pyproject.toml scripts/setup.sh scripts/cpu-overrides.txt
	@rm -f $@
	@bash scripts/setup.sh $(VENV)
	@touch $@

demo: setup ## the whole loop on this machine's CPU: service, trainer, report (SEED=0)
	@$(BIN)/python scripts/demo.py --seed $(SEED)

test: check fast engine ## check + the tests that need no GPU (but for the slow ones)

check: setup ## ruff, mypy --strict, import rules, Kubernetes' schemas
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_manifests.py

fix: setup ## format and repair what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

fast: setup ## tests without vLLM: seconds to a few minutes
	$(PYTEST) -m "not engine and not gpu and not compose" tests

engine: setup ## tests on a real vLLM engine
	$(PYTEST) -m "engine and not gpu and not slow" tests

slow: setup ## engine tests that start engines of their own: several engines, stock vLLM, bench
	$(PYTEST) -m "slow and not gpu" tests

compose-test: setup ## docker compose from a fresh clone, with faults; needs a Docker engine, half an hour
	$(PYTEST) -s -m compose tests/compose

clean: ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
