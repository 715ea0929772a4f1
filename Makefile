# `make demo` and `make test` work on a machine that has Python >= 3.11, make and git, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS ?= 2
ARGS ?=
# One thread a process: the tests run $(JOBS) processes, and tiny models are slower with more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -x -rs --timeout 300 -n $(JOBS) --dist loadfile

.PHONY: help setup demo test slow lint types imports check mutate clean setup-trl test-trl
.DEFAULT_GOAL := help

help:
	@echo "make demo    set up, then run the whole job twice: a run that drifts, and its correction"
	@echo "make test    set up, then run the fast tests"
	@echo "make check   all tests, then lint, types and import rules (what CI runs)"
	@echo "make setup   only make .venv and install Kedge in it"
	@echo "make slow    only the slow tests"
	@echo "make test-trl  record TRL's own trainers, in environments of their own (.venv-trl, .venv-trl-ppo)"
	@echo "make mutate  plant faults in the equations; every one must fail a test"
	@echo "make clean   remove caches; leaves .venv and runs/"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Kedge needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make setup PYTHON=python3.12")'
	@echo "setting up $(VENV) (about 1.5 GB; minutes on a slow line)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[train,label,dev]'
	@touch $@

# A new folder each time: runs/demo, runs/demo-2, ... so that no run is ever overwritten.
demo: setup
	@out=runs/demo; n=1; while [ -e "$$out" ]; do n=$$((n + 1)); out=runs/demo-$$n; done; \
	$(BIN)/kedge demo --out "$$out" $(ARGS)

test: setup
	@$(PYTEST) -m "not slow" $(ARGS)

slow: setup
	@$(PYTEST) -m slow $(ARGS) || [ $$? -eq 5 ]  # 5: ARGS left no slow test to run

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: setup
	@$(BIN)/mypy

imports: setup
	@$(BIN)/lint-imports

# Plants one fault at a time in the equations and expects a test to fail; about ten minutes.
mutate: setup
	@$(BIN)/python tools/mutate.py $(ARGS)

# TRL 1.16.0 has GRPO and RLOO, 1.12.0 is the last with PPO. Kedge is there without its training stack.
.venv-trl/.installed: TRL := 1.16.0
.venv-trl-ppo/.installed: TRL := 1.12.0
.venv-trl/.installed .venv-trl-ppo/.installed: pyproject.toml constraints.txt
	@echo "setting up $(@D) with trl==$(TRL) (about 2 GB)"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e . \
		trl==$(TRL) torch transformers pytest pytest-timeout hypothesis
	@touch $@

setup-trl: .venv-trl/.installed .venv-trl-ppo/.installed

test-trl: setup-trl
	@OMP_NUM_THREADS=1 .venv-trl/bin/python -m pytest -q -rs --timeout 900 tests/recorders/test_trl_recorder.py $(ARGS)
	@OMP_NUM_THREADS=1 .venv-trl-ppo/bin/python -m pytest -q -rs --timeout 900 tests/recorders/test_trl_recorder.py $(ARGS)

check: test slow lint types imports

clean:
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
