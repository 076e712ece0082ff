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
	$(PYTEST) -m "not zoo and not random_models"

# What uses torch's private names, on the oldest torch of pyproject.toml, without the extras.
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -q -n 2 --dist loadfile -p no:cacheprovider $(OLDEST)

OLDEST := tests/torch_private tests/passes/tracing tests/distributed/test_sharded.py tests/switch/test_optimizer_steps.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages of docs/ as a site, in run/site.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

.venv-oldest/installed: pyproject.toml
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python -m pip install --quiet --editable . 'torch==2.8.*' hypothesis pytest pytest-xdist
	touch $@

.PHONY: demo test test-all test-oldest lint docs
