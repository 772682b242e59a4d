# `make check` is what CI runs, `make test` the fast suite, `make slow` the rest of it, `make smoke`
# the continual benchmark from end to end with its gates.
PYTHON ?= python

.PHONY: check lint types test smoke slow format

check: lint types smoke test

lint:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .

# pyright reads the installed packages of the same interpreter.
types:
	$(PYTHON) -m pyright --pythonpath "$$($(PYTHON) -c 'import sys; print(sys.executable)')"

test:
	$(PYTHON) -m pytest

smoke:
	$(PYTHON) -m experiments bench continual --tier smoke --out "$$(mktemp -d)"

slow:
	$(PYTHON) -m pytest -m slow

format:
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .
