# Every target builds the environment (.venv) that it needs.
PYTHON  ?= python3
WORKERS ?= 2
# Analyses that `make slow` runs after the slow tests and the accuracy analysis, by module:
# make slow ANALYSES="validation.unseen_clusters applications.spirals"
ANALYSES ?= validation.unseen_clusters applications.mci_conversion applications.ad_diagnosis \
            applications.melanoma compare
# Folder with sleepstudy.csv, penicillin.csv and cbpp.csv, to compare with NUTS: make slow DATA=data
DATA ?=

BIN   := .venv/bin
STAMP := .venv/.installed
PIP   := $(BIN)/python -m pip install -qq -c constraints.txt
CODE  := armed_pyro models analysis tests docs
PAGES := .venv-docs
# One thread per worker: two workers on two cores would otherwise fight over them.
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test fuzz slow bench docs lint format clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

venv: $(STAMP)  ## build .venv with the tested versions (PYTHON=python3.12 chooses the interpreter)

# torch first: where pip is offered a smaller build of the pinned version (CPU only), it is taken.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "armed_pyro needs Python 3.11 or later, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 | head -n 1)" >&2; \
	  echo "Name another interpreter: make PYTHON=python3.12 venv" >&2; exit 1; }
	@echo "Building .venv (a few minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(PIP) torch==2.13.0
	@$(PIP) -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## fit, compare and forecast fertility of about 200 countries, into results/demo
	$(BIN)/armed-pyro demo --out results/demo
	@echo "Results are in $(CURDIR)/results/demo"

test: $(STAMP)  ## run the tests with coverage (line coverage of at least 90 %)
	$(THREADS) $(BIN)/python -m pytest -n $(WORKERS) --cov --cov-report=term-missing:skip-covered --cov-fail-under=90

fuzz: $(STAMP)  ## random tables and randomly changed fits, 10,000 cases (an hour)
	FUZZ_CASES=10000 $(THREADS) $(BIN)/python -m pytest -n $(WORKERS) tests/test_fuzz.py

slow: $(STAMP)  ## run the slow tests and the accuracy analysis (hours), then ANALYSES
	$(THREADS) $(BIN)/python -m pytest -m slow -n $(WORKERS) || [ $$? -eq 5 ]  # 5: no slow tests
	$(THREADS) $(BIN)/python -m armed_pyro.analysis.validation.accuracy --workers $(WORKERS) $(if $(DATA),--data $(DATA))
	@set -e; for name in $(ANALYSES); do echo "armed_pyro.analysis.$$name"; $(BIN)/python -m armed_pyro.analysis.$$name; done

bench: $(STAMP)  ## time steps, fits, growth and memory, a short form (DATA=FOLDER: real data sets)
	$(BIN)/python -m armed_pyro.analysis.benchmarks.benchmark --short $(if $(DATA),--data $(DATA))

# The pages have an environment of their own: Sphinx needs what the tests do not.
$(PAGES)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(PAGES)
	@$(PAGES)/bin/python -m pip install -qq -c constraints.txt torch==2.13.0
	@$(PAGES)/bin/python -m pip install -qq -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(PAGES)/.installed  ## run the examples of all pages and build the pages, into results/docs
	$(THREADS) $(PAGES)/bin/python -m sphinx -q -W --keep-going -b html docs results/docs
	@echo "The pages are in $(CURDIR)/results/docs/index.html"

lint: $(STAMP)  ## check style, imports, formatting and types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

format: $(STAMP)  ## format the code and apply safe fixes
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

clean:  ## remove .venv, caches, builds and results
	rm -rf .venv $(PAGES) build dist results htmlcov .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find $(CODE) \( -name __pycache__ -o -name .ruff_cache \) -type d -prune -exec rm -rf {} +
