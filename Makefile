# `make demo` and `make test` need Python 3.11 or newer and make, nothing else: each makes .venv and installs first.
# Another interpreter: make test PYTHON=/path/to/python3.12. Arguments for the program behind a target: ARGS="...".

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install install-dev demo test test-all lint check format paper-map plan-tables clean

help: ## say what there is
	@echo "make TARGET"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

install: $(VENV)/.runtime ## make .venv and install Abyssal with what it needs to run

install-dev: $(VENV)/.dev ## the same, with what tests and checks need

demo: $(VENV)/.runtime ## train a small DeepSeek-V3 on this machine and let it complete code
	@$(BIN)/abyssal demo $(ARGS)

test: $(VENV)/.dev ## run the tests that need one process only: minutes
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow" $(ARGS)

test-all: $(VENV)/.dev ## run all tests: many ranks, restarts, servers and a browser too
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal $(ARGS)

lint: $(VENV)/.dev ## format, lint, types and floors
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

check: lint test-all ## everything that must hold before a commit

format: $(VENV)/.dev ## lay the code out anew
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

paper-map: $(VENV)/.dev ## write docs/paper-map.md from the equation marks in the code
	@$(BIN)/python tools/paper_map.py

plan-tables: $(VENV)/.dev ## write the tables of docs/plan.md from the plan and its published figures
	@$(BIN)/python tools/plan_tables.py

clean: ## remove .venv and everything that was built, but no run
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis src/*.egg-info
	find src tests tools bench -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: each is newer than what it was installed from, so that a second call has nothing to do.

$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "error: PYTHON=$(PYTHON): no such program; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: PYTHON=$(PYTHON): is $$("$(PYTHON)" --version 2>&1 | head -n 1), but 3.11 or newer is needed; name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "error: PYTHON=$(PYTHON): lacks the modules venv and ensurepip; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "making $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv $(VENV)

$(VENV)/.torch: constraints.txt | $(BIN)/python
	@echo "installing $(TORCH), the largest package: minutes on a slow line"
	@$(PIP) install -c constraints.txt "$(TORCH)"
	@touch $@

$(VENV)/.runtime: pyproject.toml $(VENV)/.torch
	@echo "installing abyssal and what it needs to run"
	@$(PIP) install -qq -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "installing what tests and checks need"
	@$(PIP) install -qq -c constraints.txt -e '.[dev]'
	@touch $@
