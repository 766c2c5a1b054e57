# Everything a fresh machine needs is made here: an environment of its own, then the work.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch first and pinned: a bare `torch` would pull gigabytes of CUDA libraries on many machines.
TORCH := torch==2.13.0

HOUSE_RULES := tests/test_architecture.py tests/test_exports.py

PAGE := twofold/studio/page/index.html
PAGE_SOURCES := $(shell find studio -type f -not -path 'studio/node_modules/*' 2>/dev/null)

.PHONY: demo studio browser test test-slow check docs bench clean

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

# Needs Node; what it builds is carried by the wheel, so that nobody else does.
studio: $(PAGE)

$(PAGE): $(PAGE_SOURCES)
	cd studio && npm ci --no-progress && npm run build
	node studio/budget.mjs
	touch $@

# The page is tested in Debian's Chromium; without it or Node those tests are skipped, and .ci/run does not allow that.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium >/dev/null; }; } || \
	  echo "no chromium here: tests of Studio's page will be skipped (apt-get install chromium)"
	@if command -v npm >/dev/null; then $(MAKE) --no-print-directory studio; else \
	  echo "no Node here: tests of Studio's page will be skipped"; fi

# Python's packages and the page are made side by side; the base is fetched before, so that the two processes do not both do it.
test:
	$(MAKE) --no-print-directory -j2 $(VENV)/dev.stamp browser
	$(MAKE) --no-print-directory check
	$(BIN)/twofold base pull smollm2-135m-instruct
	$(BIN)/python -m pytest -m 'not slow' $(addprefix --ignore=,$(HOUSE_RULES)) -n 2 --dist worksteal --durations 20

test-slow: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m slow

check: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(HOUSE_RULES)

docs: $(VENV)/dev.stamp
	$(BIN)/python docs/build.py

bench: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/train.py

clean:
	rm -rf $(VENV) build dist
