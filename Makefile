# `make quickstart` and `make test` set everything up on a fresh machine (Python 3.11 or later).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-slow test-gpu lint types setup oracles clean

quickstart: $(VENV)/.installed
	$(BIN)/fabric-jax quickstart

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup

# SLOW names files or folders where not all are wanted.
test-slow: $(VENV)/.installed-dev
	XLA_FLAGS= $(BIN)/python -m pytest -m slow -n 2 --dist loadgroup $(SLOW)

# On a machine with a CUDA GPU, where jax has been installed with CUDA.
test-gpu: $(VENV)/.installed-dev
	JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false $(BIN)/python -m pytest -m gpu

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/pyright

setup: $(VENV)/.installed-dev

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.venv pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.venv pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.installed

# torch, transformers and peft, against which the tests compare live once they are installed.
oracles: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev,oracles]'

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
