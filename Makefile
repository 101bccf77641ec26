# make demo | test | test-all | lint | docs | linkcheck | setup; everything happens in .venv, with pinned versions.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all lint docs linkcheck setup clean

setup: .venv/all

.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flowmatch needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable '.[demo]'
	touch $@

.venv/all: .venv/demo
	$(PIP) --editable '.[all,dev]'
	touch $@

demo: .venv/demo
	$(BIN)/flowmatch run digits

test: setup
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: setup
	$(BIN)/python -m pytest -n 2

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

linkcheck: setup
	$(BIN)/python -m sphinx -q -b linkcheck docs docs/_build/linkcheck

clean:
	rm -rf .venv runs docs/_build
