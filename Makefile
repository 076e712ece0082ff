# Two commands: `make demo` runs the main job on embedded data, `make test` runs the tests. Each makes .venv if there is none.

PYTHON ?= python3.11
BIN := .venv/bin
# Two processes, each file in one of them: files share costly fixtures.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile

demo: .venv/installed
	$(BIN)/fxrank demo --output run/demo

test: .venv/installed
	$(PYTEST)

test-all: .venv/installed
	$(PYTEST) -m "not zoo"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

.PHONY: demo test test-all lint
