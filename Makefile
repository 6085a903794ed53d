# `make demo` and `make test` work on a fresh machine with Python 3.11+, a C++ compiler and make.
# PYTHON=python3.12 chooses the interpreter, TORCH=torch==2.11.0 the version of torch; a change of either reinstalls.

PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' constraints.txt)

# A CPU build of torch does not name the Triton it was released with, so this does.
torch_minor = $(word 1,$(version)).$(word 2,$(version))
version = $(subst ., ,$(patsubst torch==%,%,$(TORCH)))
TRITON_2.11 = triton==3.6.*
TRITON_2.12 = triton==3.7.*
TRITON_2.13 = $(shell grep '^triton==' constraints.txt)
TRITON ?= $(or $(TRITON_$(torch_minor)),triton)

VENV := .venv
BIN := $(VENV)/bin
DEMO := build/demo
# The stamps carry a checksum of the choice, so that another choice has no stamp yet.
checksum = $(firstword $(shell echo '$(1)' | cksum))
PYTHON_STAMP := $(VENV)/.python-$(call checksum,$(PYTHON))
PACKAGE_STAMP := $(VENV)/.package-$(call checksum,$(TORCH) $(TRITON))
PACKAGE_SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/* csrc/cuda/*)
# Tests side by side, a process per core and a thread per process; JOBS=0 runs them one after the other.
JOBS ?= auto
SIDE_BY_SIDE := OMP_NUM_THREADS=1
PYTEST_JOBS := -n $(JOBS) --dist worksteal
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(VENV)/constraints.txt

.PHONY: help setup demo test test-slow test-oldest test-all families fuzz bench results lint format docs clean
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' Makefile | awk -F ': ' '{ printf "  make %-10s %s\n", $$1, $$2 }'

setup: $(PACKAGE_STAMP) ## create .venv with everything installed and built

$(PYTHON_STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "trsp_fast needs Python 3.11 or newer, but '$(PYTHON)' is not: choose one with PYTHON=." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "'$(PYTHON)' cannot make virtual environments: install ensurepip (Debian: apt install python3-venv)." >&2; exit 1; }
	@echo "setup: creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(PACKAGE_STAMP): $(PYTHON_STAMP) $(PACKAGE_SOURCES)
	@rm -f $(VENV)/.package-*
	@{ grep -vE '^(torch|triton)==' constraints.txt; printf '%s\n' '$(TORCH)' '$(TRITON)'; } > $(VENV)/constraints.txt
	@echo "setup: installing $(TORCH), $(TRITON) and the build tools (minutes the first time)"
	@$(PIP) '$(TORCH)' setuptools cmake ninja pybind11
	@echo "setup: building the C++ extensions and installing trsp_fast with its other packages"
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@ls trsp_fast/_C.*.so > /dev/null 2>&1 || \
		echo "setup: no C++ compiler was found (or TRSP_FAST_NO_EXTENSIONS is set), so trsp_fast runs without its C++ extensions."
	@touch $@

demo: setup ## prune the built-in model and write its checkpoint and report to build/demo
	@rm -rf $(DEMO)
	@$(BIN)/trsp-fast demo --out $(DEMO)

test: setup ## the tests without the slow ones
	@$(SIDE_BY_SIDE) $(BIN)/pytest $(PYTEST_JOBS) -m "not slow"

# pytest exits with 5 when no test is marked slow.
test-slow: setup ## the slow tests
	@$(SIDE_BY_SIDE) $(BIN)/pytest $(PYTEST_JOBS) -m slow || { status=$$?; [ $$status -eq 5 ] && echo "test-slow: there are no slow tests"; }

families: setup ## prove every family and write docs/families.md from it
	@mkdir -p docs
	@TRSP_FAST_FAMILIES=docs/families.md $(BIN)/pytest -q -m "slow or not slow" tests/models/test_families.py --deselect \
		tests/models/test_families.py::test_the_table_of_families_is_in_step

SANITIZED := -std=c++20 -g -O1 -Wall -Wextra -fsanitize=address,undefined -fno-sanitize-recover=all

build/fuzz_header: tests/fuzz/fuzz_header.cpp csrc/safetensors_header.cpp csrc/removal_plan.cpp
build/check_kv_moves: tests/fuzz/check_kv_moves.cpp
build/fuzz_header build/check_kv_moves: $(wildcard csrc/*.h)
	@mkdir -p build
	@$(CXX) $(SANITIZED) $(filter %.cpp,$^) -o $@

fuzz: build/fuzz_header build/check_kv_moves ## the header parser, the planner and the cache's moves under sanitizers (RUNS=, SEED=)
	@build/fuzz_header tests/fuzz/corpus $(or $(RUNS),20000) $(or $(SEED),0)
	@build/check_kv_moves $(or $(RUNS),20000) $(or $(SEED),0)

bench: setup ## the speed of the fused ops beside eager PyTorch, kept in .benchmarks (BENCH=--benchmark-compare)
	@$(BIN)/pytest bench/regressions.py --benchmark-autosave --benchmark-group-by=group --benchmark-sort=name \
		--benchmark-columns=median,iqr,rounds $(BENCH)

results: setup ## compare all arms on all models that are there, and write docs/results.md (hours)
	@$(BIN)/python bench/compare_all.py $(RESULTS)

lint: setup ## ruff (lint and format) and mypy
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy trsp_fast

# The environment of the oldest transformers: a second one that finds everything else in the first.
OLDEST := .venv-oldest
OLDEST_TRANSFORMERS := transformers==5.17.0
OLDEST_STAMP := $(OLDEST)/.stamp-$(call checksum,$(OLDEST_TRANSFORMERS) $(TORCH) $(PYTHON))

$(OLDEST_STAMP): $(PACKAGE_STAMP)
	@echo "test-oldest: creating $(OLDEST) with $(OLDEST_TRANSFORMERS)"
	@$(PYTHON) -m venv --clear $(OLDEST)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$($(OLDEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/newest.pth
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(VENV)/constraints.txt \
		'$(OLDEST_TRANSFORMERS)'
	@touch $@

test-oldest: $(OLDEST_STAMP) ## the tests of models with the oldest transformers that is supported
	@$(OLDEST)/bin/python -P -c 'import transformers; print("transformers", transformers.__version__)'
	@$(SIDE_BY_SIDE) $(OLDEST)/bin/python -P -m pytest $(PYTEST_JOBS) -q -m "not slow" tests/models tests/select tests/test_transfer.py

test-all: test test-slow test-oldest lint ## test, test-slow, test-oldest and lint

format: setup ## reformat the Python files
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

# The site's generator reads the sources without importing them, so that its environment holds nothing else.
DOCS := .venv-docs
DOCS_STAMP := $(DOCS)/.stamp-$(call checksum,$(PYTHON))

$(DOCS_STAMP): pyproject.toml
	@echo "docs: creating $(DOCS) with mkdocs and mkdocstrings"
	@$(PYTHON) -m venv --clear $(DOCS)
	@$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
		> $(DOCS)/requirements.txt
	@$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $(DOCS)/requirements.txt
	@touch $@

docs: $(DOCS_STAMP) ## build the documentation into build/docs
	@PATH="$(CURDIR)/$(DOCS)/bin:$$PATH" $(DOCS)/bin/mkdocs build --strict --quiet
	@echo "docs: build/docs/index.html"

clean: ## remove what was built; the environment stays until `rm -rf .venv`
	@rm -rf build dist *.egg-info trsp_fast/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@rm -f $(VENV)/.package-*
