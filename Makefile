# make demo    trains a small transformer in stages on emulated devices and prints its plan
# make check   lint, format, types and a sample of the tests, in about four minutes
# make test    lint, format, types and tests, as CI runs them
# make slow    the tests that are marked slow
# make soak    10,000 random pipelines, 10,000 mutated files, 200 kills while saving, 1,000 runs; resumable, hours
# make oldest  the tests alone, on the oldest JAX that pyproject.toml allows
# make lock    pins the newest versions that pyproject.toml allows
#
# Needs Python 3.12 or newer and nothing else: the rest is installed into $(VENV). PYTHON=... names another interpreter.

VENV ?= .venv
WORKERS ?= 2
# `make check` runs every SAMPLE-th test of each file.
SAMPLE ?= 8
OLDEST_JAX := 0.11.2

# Programs that tests compile are kept here between runs, except in continuous integration. JAX's
# key of an entry covers the program, the versions, the devices and the compiler's options.
CACHE := $(if $(CI),,JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.jax_cache JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5)

BIN = $(VENV)/bin
DEMO_INSTALLED := $(VENV)/.installed-demo
TEST_INSTALLED := $(VENV)/.installed-test
PYTEST = $(CACHE) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 12))

.DEFAULT_GOAL := test
.DELETE_ON_ERROR:
.PHONY: demo check test slow soak oldest lint types format lock clean

demo: $(DEMO_INSTALLED)
	$(BIN)/python -m experiments.quickstart

check: lint types
	$(PYTEST) --sample=$(SAMPLE)

test: lint types
	$(PYTEST)

slow: $(TEST_INSTALLED)
	$(PYTEST) -m slow

# Resumes from SOAK_PROGRESS; SOAK_ARGS may set --seed and the counts (python -m tests.soak --help).
SOAK_PROGRESS ?= .soak.json
soak: $(TEST_INSTALLED)
	$(BIN)/python -m tests.soak --progress $(SOAK_PROGRESS) $(SOAK_ARGS)

oldest: VENV := .venv-oldest
oldest:
	$(MAKE) VENV=$(VENV) $(VENV)/.installed-test
	$(BIN)/python -m pip install -qq --disable-pip-version-check "jax[cuda13-local]==$(OLDEST_JAX)" "jaxlib==$(OLDEST_JAX)"
	$(PYTEST)

lint: $(TEST_INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(TEST_INSTALLED)
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(TEST_INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# What `make test` installs holds all that the demo needs, at the same versions: the second file is solved under the first.
LOCK = $(BIN)/uv pip compile pyproject.toml --quiet --upgrade --universal --python-version 3.12 \
	--annotation-style line --custom-compile-command "make lock" --no-emit-index-url --no-emit-find-links

lock: $(BIN)/python
	$(BIN)/python -m pip install --quiet uv
	$(LOCK) --extra plot --output-file requirements.lock
	$(LOCK) --extra test --constraint requirements.lock --output-file requirements-test.lock

clean:
	rm -rf .venv-oldest $(VENV) .jax_cache build dist .hypothesis .pytest_cache .ruff_cache
	find layerwise_jax experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(DEMO_INSTALLED): requirements.lock | $(BIN)/python
	$(BIN)/python -m pip install -qq --disable-pip-version-check --requirement $<
	touch $@

$(TEST_INSTALLED): requirements-test.lock | $(BIN)/python
	$(BIN)/python -m pip install -qq --disable-pip-version-check --requirement $<
	touch $@ $(DEMO_INSTALLED)

# pyenv's shims answer only for the versions that pyenv was told to use, so its other versions are found by their folders.
PYENV_PYTHONS = $$(pyenv versions --bare 2>/dev/null | grep '^3\.12\.' | xargs -n 1 pyenv prefix 2>/dev/null | sed 's|$$|/bin/python|')

$(BIN)/python:
	@for python in $(or $(PYTHON),python3.12 python3 python $(PYENV_PYTHONS)); do \
	    if $$python -c '$(IS_NEW_ENOUGH)' 2>/dev/null; then \
	        echo "$$python -m venv $(VENV)"; \
	        $$python -m venv $(VENV) && exit; \
	        rm -rf $(VENV); exit 1; \
	    fi; \
	done; \
	echo "Found no Python 3.12 or newer among: $(or $(PYTHON),python3.12 python3 python)." \
	    "Install it, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; \
	exit 1
