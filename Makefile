# Needs Python 3.11 or later, as `python3` or as `make PYTHON=...`; everything
# else is installed into .venv by the first target that needs it.

PYTHON ?= python3
# Where `make demo` works, and what `make test` adds to pytest's command line.
WORKDIR ?= runs/demo
TEST_ARGS ?= -n auto --maxprocesses 4 --dist loadfile

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/setup.stamp
PARITY_STAMP := $(VENV)/parity.stamp
TPU_STAMP := $(VENV)/tpu.stamp
GPU_COMPILER := $(VENV)/gpu_compiler
GPU_STAMP := $(GPU_COMPILER)/gpu.stamp

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-parity test-tpu test-gpu lint format

help: ## Show the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## Make .venv with the package and the pinned tools.

demo: $(STAMP) ## Train the demo on a CPU; WORKDIR=... says where to.
	$(BIN)/python -m dpop_jax.cli.demo --workdir=$(WORKDIR)

# Where compilers have been installed, without the minutes that they take.
test: $(STAMP) ## Run the tests; TEST_ARGS="-k losses" picks some.
	$(BIN)/python -m pytest -m "not tpu and not gpu" $(TEST_ARGS)

test-parity: $(PARITY_STAMP) ## Compare with transformers' models in PyTorch.
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest tests/parity $(TEST_ARGS)

test-tpu: $(TPU_STAMP) ## Compile steps, large ones too, with the TPU compiler.
	$(BIN)/python -m pytest -m tpu $(TEST_ARGS)

test-gpu: $(GPU_STAMP) ## Compile kernels and steps with the GPU compiler.
	DPOP_GPU_COMPILER=$(GPU_COMPILER) $(BIN)/python -m pytest -m gpu $(TEST_ARGS)

lint: $(STAMP) ## Check format, style, types, import layers and scripts.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo
	$(BIN)/shellcheck -x launch/*.sh launch/*.env launch/*.sbatch .ci/run

format: $(STAMP) ## Format the code and sort the imports.
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

# __init__.py is here for the version in it.
$(STAMP): setup.py constraints.txt dpop_jax/__init__.py
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) \
	  else "dpop_jax needs Python 3.11 or later, and $(PYTHON) is " \
	  + sys.version.split()[0] + "; name another one: make PYTHON=...")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) what constraints.txt pins; this takes minutes."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[dev]'
	@touch $@

# Apart, because the TPU compiler is large, and so is PyTorch.
$(TPU_STAMP): $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[tpu]'
	@touch $@

# In a folder that only its tests look into: JAX would look for a GPU each time
# that it starts.
$(GPU_STAMP): $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --no-deps --target $(GPU_COMPILER) \
	  --upgrade jax-cuda12-pjrt nvidia-cuda-nvcc-cu12
	@touch $@

$(PARITY_STAMP): $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[parity]'
	@touch $@
