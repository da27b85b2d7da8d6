# `make demo` and `make test` each work on a fresh clone: they first make the environment they need.
# PYTHON names another interpreter, which gets an environment of its own: make test PYTHON=python3.12

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(VERSION))
BIN := $(VENV)/bin
# Made last, so that an interrupted installation starts again, as does one for another Python.
READY := $(VENV)/.ready-$(VERSION)

# CUDA 13 needs the 580 driver and compute capability 7.5. Empty without a driver.
CUDA = $(shell nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2>/dev/null \
  | awk -F, 'NR == 1 && $$1 + 0 { print ($$1 + 0 >= 580 && $$2 + 0 >= 7.5) ? ",cuda13" : ",cuda12" }')

.PHONY: help env demo gpu fuzz docs docs-serve docs-links notebooks dist dist-check test test-all test-versions test-oldest test-live lint typecheck format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

env: $(READY)  ## make the environment, for CUDA where there is an NVIDIA driver

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is missing, does not run, or is older than Python 3.11." \
	    "Name another: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "$(PYTHON) cannot make virtual environments." \
	    "On Debian and Ubuntu: sudo apt install python$(VERSION)-venv" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV); this takes a minute or two."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev$(CUDA)]'
	@touch $@

demo: $(READY)  ## train a small LLaMA with GaLore and with AdamW
	$(BIN)/python -m examples.flax_llama.demo

# Takes the interpreter that there is, for want of a network on machines with a GPU: PYTHON where it is
# given, else the environment where it has been made.
GPU_PYTHON = $(if $(filter file,$(origin PYTHON)),$(firstword $(wildcard $(BIN)/python) $(PYTHON)),$(PYTHON))
MINUTES ?= 25

gpu:  ## measure on the GPU; REHEARSE=1 tries everything on the CPU
	@$(GPU_PYTHON) -c 'import jax, flax, optax' 2>/dev/null || { \
	  echo "$(GPU_PYTHON) has no jax, flax and optax. Name another, make gpu PYTHON=..., or make env." >&2; \
	  exit 2; }
	$(GPU_PYTHON) -m benchmarks.gpu --minutes $(MINUTES) \
	  $(if $(REHEARSE),--rehearse,--out benchmarks/results/gpu) $(if $(RESUME),--resume $(RESUME))

# data; configurations, which are compiled; arguments, which are not; or checkpoints, which are damaged.
KIND ?= data
SEED ?= 0
COUNT ?= $(if $(filter configurations checkpoints,$(KIND)),3000,100000)
SEARCH_data = fuzz_data
SEARCH_configurations = fuzz_configurations
SEARCH_arguments = fuzz_configurations --uncompiled
SEARCH_checkpoints = damage

fuzz: $(READY)  ## search for faults: KIND=data, configurations, arguments or checkpoints, SEED and COUNT of cases
	$(BIN)/python -m benchmarks.$(SEARCH_$(KIND)) --seed $(SEED) --count $(COUNT) --out runs/fuzz-$(KIND)-$(SEED).json

# Two processes, since most of the time goes into compilation; one on a GPU, whose memory each takes.
# The threads of their SVDs would wait for each other. Not reordered, since the files with the fewest
# tests, which would be last, are among the longest.
PYTEST = OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest \
  $(if $(CUDA),,-n 2 --dist loadfile --no-loadscope-reorder)

test: $(READY)  ## run the tests that a change needs before it is committed
	$(PYTEST) -m "not ci"

test-all: $(READY)  ## run all tests, as CI does
	$(PYTEST) --seconds

test-versions: $(READY)  ## run what another Python or JAX could change, a case of each test
	$(PYTEST) --seconds --at-most 1 -m "both or not (ci or plain)"

# The library alone, with the oldest JAX, Optax and Flax that it is for; without the pins of another
# environment, and without JAX's settings, which take a fifth of the time.
OLDEST := .venv-oldest
test-oldest: $(OLDEST)/.ready-$(VERSION)  ## run the library's tests on the oldest JAX, a case of each
	OPENBLAS_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder \
	  --seconds --at-most 1 -m "not (ci or plain)" \
	  --ignore tests/test_constraints.py --ignore tests/test_settings.py

$(OLDEST)/.ready-$(VERSION): pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt \
	  -e . beartype chex cloudpickle flax orbax-checkpoint pytest pytest-timeout pytest-xdist
	@touch $@

# What PyTorch, transformers, PEFT and reasoning-gym say now, in an environment of its own, since they are large.
LIVE := .venv-live
test-live: $(LIVE)/.ready-$(VERSION)  ## compare with what PyTorch, transformers and PEFT compute now
	OPENBLAS_NUM_THREADS=1 $(LIVE)/bin/python -m pytest -m live

$(LIVE)/.ready-$(VERSION): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(LIVE)
	$(LIVE)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  -e '.[dev]' torch transformers peft reasoning-gym
	@touch $@

# Names of the library are looked up in the library itself. The theme would advertise its successor.
MKDOCS = NO_MKDOCS_2_WARNING=1 JAX_PLATFORMS=cpu $(BIN)/python -m mkdocs

docs: $(READY)  ## build the site into site/; a warning or a dead link is an error
	$(MKDOCS) build --strict

docs-serve: $(READY)  ## show the site while its pages are written
	$(MKDOCS) serve

docs-links:  ## list the links of all pages that lead elsewhere, and how many there are of each
	@git ls-files '*.md' | xargs grep -ohE 'https?://[^] )<>"`]+' | sort | uniq -c | sort -k2

notebooks: $(READY)  ## execute the notebooks, and store them with their pictures
	JAX_PLATFORMS=cpu $(BIN)/python -m benchmarks.notebooks

dist: $(READY)  ## build the wheel and the sdist into dist/, and check that README can be shown
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

dist-check: dist  ## and install the wheel where there is nothing else, with the oldest JAX and the newest
	PYTHON=$(PYTHON) .ci/installed

# Offline: nobody is asked whether an action that a workflow uses has become dangerous.
SCHEMA = $(BIN)/check-jsonschema --builtin-schema vendor
lint: $(READY)  ## check format, style, spelling, workflows and templates
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/codespell
	$(BIN)/zizmor --offline --quiet .github
	$(SCHEMA).github-workflows .github/workflows/*.yml
	$(SCHEMA).github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(SCHEMA).github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(SCHEMA).citation-file-format CITATION.cff

typecheck: $(READY)  ## check types
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

format: $(READY)  ## format, and repair what can be repaired
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:  ## remove the environments, the caches and what was built
	rm -rf .venv .venv-* .hypothesis .pytest_cache build dist site
	find . \( -name __pycache__ -o -name .ruff_cache \) -prune -exec rm -rf {} +
