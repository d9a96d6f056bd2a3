# Every target does its own set-up: a fresh clone needs nothing but make and Python >= 3.11.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= 2
OUT ?= runs/demo

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UV_VERSION := 0.13.9
PYTEST := $(BIN)/python -m pytest

# uv does not read pip's configuration. Where pip is set up with local wheels (a CPU build of torch, say), hand them on.
empty :=
comma := ,
PIP_LINKS := $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
LINKS := $(or $(UV_FIND_LINKS),$(subst $(empty) $(empty),$(comma),$(strip $(PIP_LINKS))))
ifneq ($(LINKS),)
export UV_FIND_LINKS := $(LINKS)
endif
# Without bytecode the first import of diffusers takes seconds longer, and linking across file systems only warns.
export UV_COMPILE_BYTECODE := 1
export UV_LINK_MODE := copy

.DEFAULT_GOAL := help
.PHONY: help demo test lint format types imports bench lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Threads that spin while they wait make a machine that others use too many times slower.
demo: export OMP_NUM_THREADS ?= 2
demo: export OMP_WAIT_POLICY ?= PASSIVE
demo: $(STAMP) ## train, sample, measure, and write a page to runs/demo (minutes on a CPU; a second run reuses the first)
	$(BIN)/wellposed demo --out $(OUT) $(ARGS)

# The first run executes every shape annotation. torch.compile cannot trace those checks, so its tests run without them;
# pytest's exit code 5, "nothing collected", is no failure there, and only files that have such tests are looked at. A
# file's tests stay in one process, since what they share is made once; files in order, since the long ones come first.
test: export OMP_NUM_THREADS ?= 1
test: $(STAMP) ## the tests that need neither a GPU nor patience; ARGS="-k lanczos" narrows them
	$(PYTEST) -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)
	$(PYTEST) --jaxtyping-packages= -m "compile and not slow and not gpu" \
	  $(or $(filter tests/%,$(ARGS)),$(shell grep -rl "mark.compile" tests)) $(filter-out tests/%,$(ARGS)) || [ $$? -eq 5 ]

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## ruff: mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

imports: $(STAMP) ## import-linter: who may import whom
	$(BIN)/lint-imports

bench: $(STAMP) ## one script per published claim; results as JSON in benchmarks/results
	set -e; for script in benchmarks/*.py; do $(BIN)/python "$$script" $(ARGS); done

# Without local wheels: with them the lock would name a build ("2.13.0+cpu") that an ordinary index does not have.
lock: $(STAMP) ## renew requirements/constraints.txt
	env -u UV_FIND_LINKS $(BIN)/uv pip compile pyproject.toml --quiet --universal --upgrade --python-version 3.11 \
	  --all-extras --group dev --constraints requirements/pins.in \
	  --no-header --no-annotate --no-emit-index-url --output-file requirements/constraints.txt

clean: ## remove the environment, caches and builds (not runs/)
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(STAMP): pyproject.toml requirements/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "wellposed needs Python >= 3.11; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@if $(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION); then \
	  set -x; $(BIN)/uv pip install --python $(BIN)/python -c requirements/constraints.txt --group dev -e ".[demo]"; \
	else \
	  echo "uv is not to be had: pip installs instead, more slowly"; set -x; \
	  $(BIN)/python -m pip install --quiet --upgrade "pip>=25.1" && \
	  $(BIN)/python -m pip install --quiet -c requirements/constraints.txt --group dev -e ".[demo]"; \
	fi
	@touch $@
