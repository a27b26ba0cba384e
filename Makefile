# Everything on a fresh machine: each target makes its virtual environment, installs what it needs and
# runs. Stamp files inside the environments keep a second run quick.

SHELL := /bin/bash
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell scripts/find_python 3.11 3.12 3.13)
MODEL ?= smollm2-135m
PORT ?= 8000
PIP_INSTALL := -m pip install -qq --disable-pip-version-check
PACKAGING := pyproject.toml setup.py $(wildcard constraints/*.txt)

.PHONY: serve test lint smoke smoke-oldest smoke-newest aot bench deploy wheel-check clean

serve: $(VENV)/.installed $(VENV)/.demo
	$(BIN)/octavo serve $(MODEL) --port $(PORT)

test: lint $(VENV)/.models
	$(BIN)/python -m pytest

lint: $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

bench: $(VENV)/.installed $(VENV)/.demo
	$(BIN)/octavo bench throughput $(MODEL)

wheel-check: $(VENV)/.tools
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python scripts/check_wheel.py dist/*.whl

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: there is no Python 3.11, 3.12 or 3.13"; \
	  echo "hint: install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Versions are pinned to what was tested on this Python: 3.11 runs the whole suite.
PINS = -c constraints/$(shell $(BIN)/python -c \
  'import sys; print("py311" if sys.version_info < (3, 12) else "py312")').txt

$(VENV)/.installed: $(VENV)/bin/python $(PACKAGING)
	$(BIN)/python $(PIP_INSTALL) $(PINS) -e .
	touch $@

$(VENV)/.tools: $(VENV)/.installed
	$(BIN)/python $(PIP_INSTALL) $(PINS) -e '.[test]'
	touch $@

$(VENV)/.demo: scripts/install_models.py models/sources/builtin.py | $(VENV)/.installed
	$(BIN)/python scripts/install_models.py smollm2-135m
	touch $@

# Tests run Gemma 3 too, for its windows and its tokenizer, and MiniLM, for its embeddings.
$(VENV)/.models: $(VENV)/.demo
	$(BIN)/python scripts/install_models.py gemma3-270m all-minilm-l6-v2
	touch $@

# The marked subset on the oldest and the newest jax, each in its own environment.
smoke: smoke-oldest smoke-newest

smoke-oldest:
	scripts/smoke 3.11 constraints/jax-0.10.0.txt .venv-oldest

smoke-newest:
	scripts/smoke 3.12 constraints/py312.txt .venv-newest

# TPUs without a TPU: kernels and models compiled for every chip, kernels run by the interpreter.
AOT := .venv-aot

aot: $(AOT)/.installed
	JAX_PLATFORMS=cpu TPU_RANDOM_STEPS=500 $(AOT)/bin/python -m pytest -vv --durations=20 \
	  tests/pallas_kernels/attention/test_tpu_compile.py \
	  tests/pallas_kernels/test_grouped_tpu_compile.py tests/engine/ahead \
	  tests/pallas_kernels/attention/test_tpu_attention.py

$(AOT)/.installed: $(PACKAGING)
	$(PYTHON) -m venv $(AOT)
	$(AOT)/bin/python $(PIP_INSTALL) -c constraints/py311.txt -e '.[aot]'
	touch $@

# Replicas under Ray Serve, and the manifests against Kubernetes' own schemas.
DEPLOY := .venv-deploy

deploy: $(DEPLOY)/.installed
	$(DEPLOY)/bin/python -m pytest -W ignore tests/deploy tests/replicas

$(DEPLOY)/.installed: $(PACKAGING)
	$(PYTHON) -m venv $(DEPLOY)
	$(DEPLOY)/bin/python $(PIP_INSTALL) -c constraints/py311.txt -e '.[deploy]'
	touch $@

clean:
	rm -rf $(VENV) $(AOT) $(DEPLOY) .venv-oldest .venv-newest build dist *.egg-info
