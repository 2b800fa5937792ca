# Two environments: .venv serves (no torch), .venv-dev tests (everything). Both need Python 3.11 or newer.
PYTHON ?= python3
PORT ?= 3000
export BENTOML_DO_NOT_TRACK ?= True
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: help install serve test lint clean

help:
	@echo "make install   the base install in .venv, without torch"
	@echo "make serve     install, then serve GUARD_MODEL, else models/cifar10, on port $(PORT) (PORT= overrides)"
	@echo "make test      install everything in .venv-dev and run the tests (ARGS= goes to pytest)"
	@echo "make lint      ruff and mypy, in .venv-dev"
	@echo "make clean     remove both environments and caches"

install: .venv/installed

serve: install
	.venv/bin/guard serve --port $(PORT)

test: .venv-dev/installed
	.venv-dev/bin/python -m pytest $(ARGS)

lint: .venv-dev/installed
	.venv-dev/bin/ruff check .
	.venv-dev/bin/ruff format --check .
	.venv-dev/bin/mypy

clean:
	rm -rf .venv .venv-dev .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --editable .
	touch $@

.venv-dev/installed: pyproject.toml
	$(PYTHON) -m venv .venv-dev
	.venv-dev/bin/pip install --quiet --editable '.[dev]'
	touch $@
