# Everything a fresh machine needs is made here: an environment of its own, then the work.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch first and pinned: a bare `torch` would pull gigabytes of CUDA libraries on many machines.
TORCH := torch==2.13.0

.PHONY: demo test test-slow check docs bench clean

$(VENV)/run.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/run.stamp
	$(BIN)/twofold demo

# The base is fetched before, so that the two processes do not both do it.
test: $(VENV)/dev.stamp check
	$(BIN)/twofold base pull smollm2-135m-instruct
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist worksteal

test-slow: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m slow

check: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py tests/test_exports.py

bench: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/train.py

clean:
	rm -rf $(VENV) build dist
