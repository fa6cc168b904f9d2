# `make study` and `make test` are the first thing typed on a clean clone: Python 3.10 or newer and make are enough.
PYTHON ?= python3
WORKERS ?= 2
STUDY_OUT ?= results/digits
STUDY_ARGS ?= --workload digits --seeds 3 --out $(STUDY_OUT)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --no-input --disable-pip-version-check
STAMP := $(VENV)/installed
SETUP := setup.cfg pyproject.toml constraints.txt
SCRIPTS := $(wildcard notebooks/*.py benchmarks/*.py)

export MPLBACKEND := Agg
MAKEFLAGS += --no-print-directory
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# ------------------------------------------------------------------------------------------------- the environment
# pip's own configuration says where packages come from, and which build of torch. -qq: errors only.
$(STAMP): $(SETUP)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed, and this is " \
	    + sys.version.split()[0] + ": name another one, as in make PYTHON=python3.11")'
	@echo "== installing into $(VENV) (once; some minutes, most of them for torch)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -c constraints.txt -e '.[study,interactive,recipes,test]'
	@$(BIN)/python -m pip check --disable-pip-version-check
	@touch $@

.PHONY: help install study figures notebooks bench faults test lint types layers tests integrations format lab lowest clean \
    distclean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name what; do \
	    printf '  make %-12s %s\n' "$$name" "$$what"; done

install: $(STAMP)  ## .venv with everything that study and test need

# ----------------------------------------------------------------------------------------------------------- using
study: $(STAMP)  ## train, measure and report on real data (STUDY_ARGS="..." to choose)
	@$(BIN)/msam-analysis study $(STUDY_ARGS)

figures: $(STAMP)  ## every exhibit of the paper into figures/, with its table (20 minutes; finished runs are kept)
	@$(BIN)/msam-analysis study $(STUDY_ARGS) --exhibits all --figures figures

notebooks: $(STAMP)  ## execute the notebooks from their scripts
	@$(BIN)/python notebooks/build.py

lab: $(STAMP)  ## install JupyterLab too, and open the notebooks in it
	@$(PIP) -c constraints.txt -e '.[notebooks]'
	@$(BIN)/jupyter lab notebooks

bench: $(STAMP)  ## run the benchmarks, one after the other
	@test -n "$(wildcard benchmarks/*.py)" || { echo "bench: there is nothing in benchmarks/ yet" >&2; exit 1; }
	@for script in $(wildcard benchmarks/*.py); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

faults: $(STAMP)  ## what kills, hostile files, wrong commands, threads and full disks do (ten minutes)
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python benchmarks/faults.py $(FAULTS_ARGS)

# -------------------------------------------------------------------------------------------------------- checking
test: lint types layers tests  ## everything below: what must pass before a change is kept
	@echo "== all passed"

lint: $(STAMP)  ## ruff: rules and format
	@echo "== lint"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { echo "lint: these files are not formatted: run make format" >&2; \
	    $(BIN)/ruff format --check --output-format concise .; exit 1; }

types: $(STAMP)  ## mypy, strict
	@echo "== types"
	@$(BIN)/mypy --no-error-summary
	@$(if $(SCRIPTS),$(BIN)/mypy --no-error-summary $(SCRIPTS))

layers: $(STAMP)  ## import-linter: who may import whom
	@echo "== layers"
	@$(BIN)/lint-imports --no-logo --no-cache

# hypothesis: its profile `ci` draws the same examples every time
tests: $(STAMP)  ## pytest, one thread per worker (PYTEST_ARGS="-k name" to choose, WORKERS=n for more)
	@echo "== tests"
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --hypothesis-profile=ci $(PYTEST_ARGS)

# one process: the frameworks keep a state of their own in it, and start processes themselves; torch's own tests of
# optimizers freeze torch's flags, and get others
integrations: $(STAMP)  ## install the trackers too, and run the tests inside other people's frameworks (some minutes)
	@echo "== integrations"
	@$(PIP) -c constraints.txt -e '.[recipes,tracking]' expecttest
	@MSAM_INTEGRATIONS=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -m integrations tests/integrations \
	    --ignore-glob '*/test_torch_*' $(PYTEST_ARGS)
	@MSAM_INTEGRATIONS=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) -m integrations \
	    $(wildcard tests/integrations/test_torch_*.py) $(PYTEST_ARGS)

format: $(STAMP)  ## let ruff repair what it can
	@$(BIN)/ruff check --quiet --fix . || true
	@$(BIN)/ruff format --quiet .

# The lower bounds of setup.cfg as pins, all but torch (its old releases bring gigabytes of CUDA): are they honest?
lowest: $(STAMP)  ## run the tests with the oldest dependencies that setup.cfg admits
	@echo "== lowest"
	@sed -n -e '/^ *torch>=/d' -e '/^install_requires/,/^\[/s/^ *\([A-Za-z0-9-]*\)>=\([0-9.]*\)$$/\1==\2/p' setup.cfg \
	    > $(VENV)/lowest.txt
	@grep '^torch==' constraints.txt >> $(VENV)/lowest.txt
	@$(PYTHON) -m venv $(VENV)-lowest
	@$(PIP:$(VENV)/%=$(VENV)-lowest/%) -c $(VENV)/lowest.txt -e . \
	    adversarial-robustness-toolbox curvlinops-for-pytorch 'dask[distributed]' hypothesis ipykernel jupytext nbclient nbformat plotly pytest pytest-xdist 'scikit-learn==1.6.*'
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(VENV)-lowest/bin/python -m pytest -q -n $(WORKERS) --hypothesis-profile=ci -W default \
	    --ignore tests/benchmarks $(PYTEST_ARGS)

# -------------------------------------------------------------------------------------------------------- cleaning
clean:  ## remove caches and build products
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean  ## and the environments and results
	@rm -rf $(VENV) $(VENV)-lowest results
