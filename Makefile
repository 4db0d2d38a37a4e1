# fedray. `make help` lists what there is.

PYTHON ?= python3
BIN := .venv/bin
DEMO ?=
BENCH ?=
LOCK ?=
SIDE_BY_SIDE := -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: install demo demo-lora test test-fast check chaos soak bench docs lock help

.venv/installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fedray needs Python 3.11 or newer; choose one with: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv .venv
	@echo "Installing PyTorch, Ray and diffusers into .venv: 7 GB, a few minutes."
	$(BIN)/python -m pip install --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --no-deps --editable .
	@touch $@

install: .venv/installed  ## the versions of requirements.lock, into .venv

demo: .venv/installed  ## train on real digits, federated and centralised, and show the result (a few minutes)
	@$(BIN)/python experiments/digits.py --no-same-passes $(DEMO)

demo-lora: .venv/installed  ## adapt a small Stable Diffusion to digits it has not seen, before and after (minutes)
	@$(BIN)/python experiments/lora_digits.py --demo $(DEMO)

test: .venv/installed  ## all tests but those that need a GPU
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not gpu"

test-fast: .venv/installed  ## the tests that take seconds each
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not gpu and not slow"

chaos: .venv/installed  ## kills and simulated clusters with ten times as many seeds (an hour)
	@FEDRAY_CHAOS=1 $(BIN)/python -m pytest -m chaos

soak: .venv/installed  ## a run of ten minutes with kills: nothing grows
	@FEDRAY_SOAK=1 $(BIN)/python -m pytest -s tests/cluster/test_soak.py

bench: .venv/installed  ## measure what docs/benchmarks.md says, and write its tables (two hours)
	@$(BIN)/python experiments/bench/all.py $(BENCH)

check: .venv/installed  ## style (ruff) and types (mypy)
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy

docs: .venv/installed  ## the pages as a site, in build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

lock: .venv/installed  ## write requirements.lock; the newest versions with LOCK=--upgrade
	@$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes --no-header \
		--no-annotate --no-emit-index-url --quiet $(LOCK) --output-file requirements.lock

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
