# `make` lists the targets. Every target sets up what it needs: nothing has to be installed first but Python 3.11 or
# later (with its venv module), a C++ compiler and make.

# What pip is asked for; a CPU-only build is smaller:
#   make TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
VENV := .venv
BIN := $(VENV)/bin
LOG := $(VENV)/install.log
PYTEST_FLAGS ?=
BENCH_FLAGS ?=
# As "--hours 2 --go_on": stop after so long, and go on with the runs that benchmarks/results/ holds.
PROTOCOL_FLAGS ?=
# Where Fashion-MNIST is: Debian's package dataset-fashion-mnist puts it here; any folder of its IDX files will do.
FASHION ?= /usr/share/datasets/fashion-mnist
# Each worker computes on one thread; tests that are about threads set their own number.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile
# Which Python has the torch for `make gpu`; nothing is installed there.
GPU_PYTHON ?= python3
NATIVE := $(shell find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
SANITIZE := -std=c++20 -O1 -g -Wall -Wextra -fopenmp-simd -ffp-contract=off -fno-math-errno -fno-trapping-math \
    -fsanitize=address,undefined -fno-sanitize-recover=all

# $(call quietly,COMMAND): pip's chatter goes to the log; when it fails, the end of the log is shown.
quietly = $(1) >>$(LOG) 2>&1 || { echo "failed: $(1)" >&2; tail -n 30 $(LOG) >&2; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow bench bench-calls protocol-digits protocol-fashion gpu sanitize lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## create .venv and install the package with what its tests need

demo: install ## forget a handwritten digit and write a report to vdu-fast-demo/
	@$(BIN)/vdu-fast demo

test: install ## run the tests, without the slow ones
	@$(PYTEST) -m "not slow" $(PYTEST_FLAGS)

test-slow: install ## run all tests
	@$(PYTEST) $(PYTEST_FLAGS)

# bayesian-torch asks for torchvision, which it does not use here and which would bring another torch.
bench: install ## measure on the CPU against the budgets; fails when one is missed (BENCH_FLAGS="--base REV": a commit)
	@$(call quietly,$(BIN)/python -m pip install -e .[bench] --no-build-isolation)
	@$(call quietly,$(BIN)/python -m pip install --no-deps bayesian-torch~=0.5.0)
	@$(BIN)/python benchmarks/run.py $(BENCH_FLAGS)

bench-calls: install ## what one call of every op costs on small tensors, by pytest-benchmark
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q benchmarks/calls.py --benchmark-columns=median,iqr,rounds

protocol-digits: install ## compare all methods on the digits, with all studies (an hour and a half on 2 cores; resumable)
	@$(BIN)/python benchmarks/protocol.py digits $(PROTOCOL_FLAGS)

protocol-fashion: install ## the same on Fashion-MNIST at 16 x 16 (some hours; FASHION=its folder)
	@$(BIN)/python benchmarks/protocol.py fashion_mnist --data $(FASHION) $(PROTOCOL_FLAGS)

gpu: ## on a machine with a GPU: build, run the tests marked gpu, and measure there
	@$(GPU_PYTHON) benchmarks/gpu_check.py

sanitize: build/test_core ## run the C++ core under the address and undefined behaviour sanitizers
	@$<

lint: $(VENV)/.installed-dev ## check format, style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(VENV)/.installed-dev ## bring all files into the house format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove .venv and everything that was built
	@rm -rf vdu_fast/*.so $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

build/test_core: tests/cpp/test_core.cpp $(NATIVE)
	@mkdir -p $(@D)
	@$(CXX) $(SANITIZE) csrc/cpu/isa*.cpp $< -o $@

# A Python that is too old, or a pyenv shim without a Python behind it, is passed over.
$(VENV)/bin/python:
	@for candidate in $${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11 python; do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "creating $(VENV) with $$("$$candidate" --version)"; \
	        rm -rf $(VENV); "$$candidate" -m venv $(VENV); exit 0; \
	    fi; \
	done; \
	echo "No Python 3.11 or later was found. Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1

# torch comes first and the package is built without isolation, so that it is built against the torch it will run with.
$(VENV)/.installed: pyproject.toml setup.py $(NATIVE) | $(VENV)/bin/python
	@echo "installing into $(VENV) (log: $(LOG))"
	@$(call quietly,$(BIN)/python -m pip install --upgrade "setuptools>=77" wheel ninja pybind11)
	@$(call quietly,$(BIN)/python -m pip install $(TORCH))
	@$(call quietly,env PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --no-build-isolation -e .[test])
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(call quietly,$(BIN)/python -m pip install --no-build-isolation -e .[dev])
	@touch $@
