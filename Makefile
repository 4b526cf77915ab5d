PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: run test test-gpu setup charts bench

run: setup
	$(BIN)/python -m elastic_ep.run --ranks 8 $(ARGS)

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -m "not gpu" $(ARGS)

test-gpu: setup
	$(BIN)/pytest -m gpu $(ARGS)

charts: setup
	$(BIN)/python -m elastic_ep.charts

bench: setup
	for name in exchange death_notice accuracy throughput failover; do $(BIN)/python -m bench.$$name || exit; done

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "elastic_ep needs Python 3.11 or later: apt-get install python3, or make PYTHON=/path/to/python3.12"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "Python's venv is missing: apt-get install python3-venv"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)
