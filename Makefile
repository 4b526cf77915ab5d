# One virtual environment in .venv; every target makes it first, and making it a second time costs nothing.
#
#   make run ARGS="--ranks 4"        make setup EXTRAS=dev,cpu PYTHON=python3.12

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?=
ARGS ?=
# Mooncake's wheel needs libibverbs; without it, weights come from the checkpoint alone.
ifndef EXTRAS
EXTRAS := dev$(shell PYTHON="$(PYTHON)" scripts/setup has-verbs && echo ,cpu)
endif
BIN := .venv/bin
READY := .venv/.ready-$(EXTRAS)
BENCHES := death_notice exchange throughput accuracy failover overhead footprint repair \
	repair_large rebalance transfer eplb host_gap control_path loss_work busy big_bodies \
	long_context prefix page

.PHONY: help setup run test test-gpu test-hosts sanitize mutants lint style format charts bench bench-gpu lock clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(READY) ## make .venv with everything in it

$(READY): pyproject.toml constraints.txt scripts/setup setup.py $(wildcard src/elastic_ep/fused/*.h src/elastic_ep/fused/*.cpp)
	@PYTHON="$(PYTHON)" EXTRAS="$(EXTRAS)" scripts/setup
	@touch $@

run: $(READY) ## serve the bundled model on 8 ranks; ARGS="..." adds flags
	@exec $(BIN)/python -m elastic_ep.run --ranks 8 $(ARGS)

lint: style ## style and types
	$(BIN)/mypy

style: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

test: style ## style, types and the whole test suite; ARGS="..." goes to pytest
	@scripts/test $(ARGS)

test-gpu: $(READY) ## the tests that need a CUDA device
	$(BIN)/pytest -m gpu $(ARGS)

test-hosts: $(READY) ## the tests with network namespaces as hosts, as root; more of them than in make test
	$(BIN)/pytest -m hosts $(ARGS)

sanitize: $(READY) ## the tests of the engine in C++ under AddressSanitizer and UndefinedBehaviorSanitizer
	@scripts/sanitize $(ARGS)

mutants: $(READY) ## do the tests notice? changes 200 places in the code, one at a time; ARGS="--number 60 machines/"
	@$(BIN)/python -c 'import cosmic_ray' 2>/dev/null || $(BIN)/python -m pip install --quiet \
	    --disable-pip-version-check -c constraints.txt cosmic-ray
	@exec nice -n 19 $(BIN)/python scripts/mutants.py $(ARGS)

format: $(READY) ## let ruff rewrite the sources
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

charts: $(READY) ## write statecharts/ from the machines' tables
	$(BIN)/python -m elastic_ep.charts

bench: $(READY) ## run every benchmark; results go to bench/results/
	for bench in $(BENCHES); do \
	    echo "== $$bench"; $(BIN)/python -m bench.$$bench --out bench/results/$$bench.json; \
	done

bench-gpu: $(READY) ## the benchmarks that need a CUDA device, most of them MPS
	$(BIN)/python -m bench.kernels --out bench/results/kernels.json
	$(BIN)/python -m bench.gpu_mla --out bench/results/gpu_mla.json
	$(BIN)/python -m bench.sampler --out bench/results/gpu_sampler.json
	for bench in gpu_pages gpu_throughput gpu_profile gpu_failover "gpu_moe_layer --mps" "gpu_overhead --mps"; do \
	    echo "== $$bench"; $(BIN)/python -m bench.$$bench --out bench/results/$${bench%% *}.json; \
	done
	$(BIN)/python -m bench.gpu_serve --mps --harder --out bench/results/gpu_serving_mps.json
	$(BIN)/python -m bench.gpu_serve --mps --config-only --kills 20 --questions 8 \
	    --out bench/results/gpu_serving_30b_mps.json

lock: $(READY) ## write constraints.txt from what .venv holds
	scripts/lock > constraints.txt.new
	mv constraints.txt.new constraints.txt

clean: ## remove .venv and all caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist src/*.egg-info src/elastic_ep/fused/*.so
