# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo test test-all ui lint clean help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

demo: $(VENV)/installed  ## the whole pipeline on real data: prepare, mine, train, evaluate, register
	@$(BIN)/python -m flows.pipeline

ui: $(VENV)/installed  ## the MLflow and Prefect pages over what the demo wrote, on the loopback; Ctrl-C ends both
	@$(BIN)/python -m flows.ui

lint: $(VENV)/installed  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## style, types, and the tests that take minutes
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: lint  ## these, and what is slow
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not gpu'

# Anew when the requirements change; a half-made environment is not taken for a whole one.
$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info[:2] <= (3, 13); sys.exit(0 if ok else "Python 3.11 to 3.13 is needed, found %d.%d: make PYTHON=python3.11" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[pipeline,sample,dev]'
	touch $@

clean:  ## remove the stages' outputs, caches and the environment; own data and the stores under .peg stay
	rm -rf $(VENV) data/prepared data/mined data/eval models/base models/trained metrics reports .pytest_cache .mypy_cache .ruff_cache
