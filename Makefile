# Four commands do everything: make fix, make check, make test, make bench. `make train` trains the
# default run, `make soak` tests for minutes what is left to chance.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: train test soak check fix bench clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

train: $(INSTALLED)  ## train the default run (about a minute on two cores)
	$(BIN)/bagpipe train examples/quickstart.toml --overwrite

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

soak: $(INSTALLED)  ## the tests that take minutes: thousands of simulated runs with faults
	$(BIN)/python -m pytest --numprocesses=2 -m soak
	$(BIN)/python -m pytest --numprocesses=2 --hypothesis-profile=soak tests/oracle tests/store

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED)  ## all benchmarks but for that of a GPU
	$(BIN)/python -m benchmarks step
	$(BIN)/python -m benchmarks curve
	$(BIN)/python -m benchmarks trainers
	$(BIN)/python -m benchmarks oracle
	$(BIN)/python -m benchmarks cuts

clean:
	rm -rf $(VENV) build *.egg-info
