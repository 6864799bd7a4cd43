# make demo: see it work.  make test: everything that CI runs.  Both set up .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find icw_compile passes -type f -not -name '*.pyc')
# Two test workers and their thread pools share the cores: waiting threads must not spin.
test test-all: export OMP_WAIT_POLICY := passive

.PHONY: demo test test-all lint types notebooks format clean

demo: $(VENV)/installed
	$(BIN)/icw-compile demo

test: lint types $(VENV)/installed
	$(BIN)/pytest -n 2 -m "not slow"
	$(MAKE) notebooks

test-all: lint types $(VENV)/installed
	$(BIN)/pytest -n 2
	$(MAKE) notebooks

lint: $(VENV)/requirements
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/requirements
	$(BIN)/mypy -p icw_compile

notebooks: $(VENV)/installed
	$(BIN)/jupytext --test --to py:percent notebooks/*.ipynb
	$(BIN)/pytest --nbmake --nbmake-timeout=600 notebooks

format: $(VENV)/requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/requirements: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt '.[plot,test,notebooks]'
	touch $@

$(VENV)/installed: $(VENV)/requirements $(SOURCES)
	$(BIN)/pip install --quiet --no-deps --force-reinstall .
	touch $@
