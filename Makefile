# make demo: set up, train and evaluate both tasks on the embedded data set (minutes on two cores, no GPU needed)
# make test: set up, lint, run the tests
PYTHON ?= python3
VENV   ?= .venv
# test processes, one thread each
WORKERS ?= 2
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help setup demo app lint test test-all test-gpu format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s "$$(printf '\t')"

setup: $(READY)  ## create .venv with the exact versions of constraints.txt

$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
	  || { echo "$(PYTHON) is not Python 3.10, 3.11 or 3.12: set another one, e.g. make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "python3 -m venv does not work here; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Installing the pinned packages into $(VENV) (about 6 GB, a few minutes)"
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY)  ## train and evaluate both tasks on the embedded data set, with pictures
	$(BIN)/python tools/demo.py

app: $(READY)  ## a web page that shows what the demo's two models see in an image
	$(BIN)/python tools/app.py

lint: $(READY)  ## ruff, check only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## ruff, mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint  ## lint, then all tests but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(PYTEST_ARGS)

test-all: lint  ## lint, then all tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-gpu: $(READY)  ## only the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

clean:  ## remove what demo and tests wrote; .venv stays
	rm -rf work_dirs data/toy .pytest_cache .ruff_cache
