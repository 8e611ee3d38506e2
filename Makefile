# `make help` lists the targets. Everything is installed into $(VENV); nothing outside this folder changes but the
# kernel cache (~/.cache/ttr-gpu).
VENV ?= .venv
# The first interpreter that runs and is new enough: a name on PATH may be a version manager's stand-in that does not.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
  $$p -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done || echo python3)
BIN := $(VENV)/bin
LOCK := requirements-dev.lock
RUN ?= runs/stackoverflow
TESTS ?= -n auto
GPU ?= gpu

.PHONY: help train test lint bench gpu docs clean
help:
	@echo "make train   install, preprocess the shipped events, train on them, compare with n-grams (about 3 minutes)"
	@echo "make test    install, run the tests"
	@echo "make lint    ruff, mypy, import-linter"
	@echo "make bench   time every kernel, and a training step beside PyTorch's if it is installed"
	@echo "make gpu     on a machine with a GPU: its tests, the layouts of fragments first, and figures (GPU=gpu-cuda12)"
	@echo "make docs    check that the code in README.md and docs/ runs"
	@echo "make clean   remove $(VENV), data sets, runs and caches of this folder"
	@echo "PYTHON=python3.11 chooses the interpreter (3.11 or newer)"

train: $(BIN)/.base
	@test ! -e $(RUN) || { echo "$(RUN) exists: remove it, or say make train RUN=runs/another"; exit 2; }
	$(BIN)/ttr-gpu preprocess examples/data/stackoverflow.csv.gz -o stackoverflow.zarr --split 0.6,0.2,0.2 --overwrite
	$(BIN)/ttr-gpu train stackoverflow.zarr --preset nano --out $(dir $(RUN)) --name $(notdir $(RUN))

test: $(BIN)/.dev
	$(BIN)/python -m pytest $(TESTS)

lint: $(BIN)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(BIN)/.dev
	$(BIN)/ttr-gpu bench kernels
	$(BIN)/python -m benchmarks step

gpu:
	@nvidia-smi -L 2>/dev/null || { echo "make gpu: no GPU or no NVIDIA driver (nvidia-smi): see docs/BUILD_GPU.md"; exit 2; }
	@$(MAKE) --no-print-directory $(BIN)/.dev
	$(BIN)/python -m pip install --quiet --editable ".[dev,nvrtc,$(GPU)]" --constraint $(LOCK)
	$(BIN)/python -m benchmarks gpu

docs: $(BIN)/.dev
	$(BIN)/python -m pytest tests/test_documentation.py

clean:
	rm -rf $(VENV) stackoverflow.zarr runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer with venv is needed (Debian: python3-venv); say make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(BIN)/.base: pyproject.toml $(LOCK) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable . --constraint $(LOCK)
	@touch $@

$(BIN)/.dev: pyproject.toml $(LOCK) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[dev]" --constraint $(LOCK)
	@touch $@ $(BIN)/.base
