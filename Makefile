# Everything a newcomer needs: `make demo` and `make test`. Both set up a virtual environment first.
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Small models train fastest on one thread a process; a waiting thread must not spin on the other core.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint format bench setup clean help

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: $(INSTALLED)  ## make the virtual environment and install everything

$(INSTALLED): pyproject.toml constraints/cpu.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "specmoe needs Python 3.11 or newer; say which with: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r constraints/cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/cpu.txt -e '.[dev]'
	@touch $@

demo: setup  ## capture real routing, train all predictors, write runs/demo/report.html
	$(BIN)/specmoe demo --out $(OUT)

test: setup  ## run the tests
	$(BIN)/python -m pytest -n 2

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
