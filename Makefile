# make demo: see it work.  make test: everything that CI runs.  Both set up .venv first.
# make docs: the figures of README.md and docs/ anew, from the result files that are committed.
# make write-notebooks: the outputs of the notebooks anew.
# make test-versions: the core of the tests with the oldest and the newest torch and transformers, a venv each. Their
# torch is the registry's, with all of CUDA: 5 GB each.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find icw_compile passes -type f -not -name '*.pyc')
VERSIONS := oldest newest
# What private interfaces, the C++ and Triton sources and the numerics could break; most of the rest is slow and like it.
CORE := tests/test_compat.py tests/test_tensor.py tests/test_ops.py tests/test_pass_*.py tests/test_growth.py \
	tests/test_adopt.py tests/test_capture.py tests/test_flex.py tests/test_kept_nodes.py tests/test_cuda_graphs.py \
	tests/test_formats.py tests/test_recipes.py tests/test_settle_shift.py tests/test_regions.py \
	tests/test_kernel_build.py tests/test_kernel_cpu.py tests/test_kernel_triton.py tests/test_turned.py \
	tests/test_backend.py::test_found_by_name_without_an_import tests/test_backend.py::test_generate \
	tests/test_families.py::test_head_counts tests/test_families.py::test_float16_model \
	tests/test_dynamic.py::test_generate tests/test_inductor.py::test_dynamic_cache_of_many_layers
# Two test workers and their thread pools share the cores: waiting threads must not spin.
test test-all test-versions: export OMP_WAIT_POLICY := passive

.PHONY: demo test test-all test-versions $(VERSIONS:%=test-%) docs lint types notebooks write-notebooks format clean

demo: $(VENV)/installed
	$(BIN)/icw-compile demo

test: lint types $(VENV)/installed
	$(BIN)/pytest -n 2 -m "not slow"
	$(MAKE) notebooks

test-all: lint types $(VENV)/installed
	$(BIN)/pytest -n 2
	$(MAKE) notebooks

test-versions: $(VERSIONS:%=test-%)

$(VERSIONS:%=test-%): test-%: .venv-%/installed
	.venv-$*/bin/pytest -n 2 -m "not slow" $(CORE)

docs: $(VENV)/requirements
	$(BIN)/python -m icw_compile.lab.documents

lint: $(VENV)/requirements
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/requirements
	$(BIN)/mypy -p icw_compile

notebooks: $(VENV)/installed
	$(BIN)/jupytext --test --to py:percent notebooks/*.ipynb
	$(BIN)/pytest -n 2 --nbmake --nbmake-timeout=300 notebooks

write-notebooks: $(VENV)/installed
	$(BIN)/jupytext --quiet --update --to ipynb notebooks/0*.py
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False notebooks/0*.ipynb

format: $(VENV)/requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VERSIONS:%=.venv-%) build *.egg-info

$(VENV)/requirements: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt '.[plot,test,notebooks]'
	touch $@

$(VENV)/installed: $(VENV)/requirements $(SOURCES)
	$(BIN)/pip install --quiet --no-deps --force-reinstall .
	touch $@

# Without notebooks, plots and linters. The package's own dependencies come with it.
$(VERSIONS:%=.venv-%/installed): .venv-%/installed: constraints-%.txt pyproject.toml $(SOURCES)
	test -d .venv-$* || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --constraint $< . expecttest hypothesis pytest pytest-xdist
	.venv-$*/bin/pip install --quiet --no-deps --force-reinstall .
	touch $@
