# Everything a newcomer needs: `make demo` and `make test`. Both set up a virtual environment first.
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PINS := constraints/cpu.txt
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# Small models train fastest on one thread a process; a waiting thread must not spin on the other core.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test latest lint format bench setup clean help

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: $(INSTALLED)  ## make the virtual environment and install everything

# Torch goes first, and what builds the package: both would otherwise be taken in a version that nobody tested.
$(INSTALLED): pyproject.toml $(PINS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "specmoe needs Python 3.11 or newer; say which with: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	grep -E '^(torch|hatchling|editables)==' $(PINS) | xargs $(PIP) install -c $(PINS)
	$(PIP) install -c $(PINS) --no-build-isolation -e '.[dev]'
	@touch $@

demo: setup  ## capture real routing, train all predictors, write runs/demo/report.html
	$(BIN)/specmoe demo --out $(OUT)

test: setup  ## run the tests
	$(BIN)/python -m pytest -n 2

latest:  ## run the tests with the newest releases of all packages; says what broke, in runs/latest.md
	$(PYTHON) scripts/latest.py

lint: setup  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: setup  ## put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## measure the ratios that README.md states
	$(BIN)/python benchmarks/capture.py
	$(BIN)/python benchmarks/suite.py
	$(BIN)/python benchmarks/data_handling.py
	$(BIN)/python benchmarks/cache_replay.py
	$(BIN)/python benchmarks/simulation.py

clean:  ## remove what was made
	rm -rf $(VENV) runs build dist .pytest_cache .ruff_cache
