# make demo   one notebook, executed: a real model pruned and repaired, with a report to read
# make test   all unit tests, and every notebook executed by nbval
# make lab    JupyterLab in notebooks/
# Each sets up .venv by itself. PYTHON=python3.12 chooses the interpreter; on a machine without a GPU,
# TORCH_INDEX=https://download.pytorch.org/whl/cpu takes the small build of torch.

PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
JOBS ?= 2
NOTEBOOKS := $(sort $(wildcard notebooks/[0-9]*.ipynb))

.PHONY: demo test lab lint notebooks clean

demo: .venv/installed
	$(BIN)/python notebooks/run.py notebooks/00_quickstart.ipynb --html reports

test: .venv/installed
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadscope

lab: .venv/installed
	$(BIN)/jupyter lab --notebook-dir=notebooks

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# Re-execute every notebook in place, top to bottom, as it is committed.
notebooks: .venv/installed
	$(BIN)/python notebooks/run.py $(NOTEBOOKS) --in-place

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python 3.11 or newer is needed, found %d.%d; try make PYTHON=python3.12 ..." % v[:2])'
	@# A venv without pip is what a missing python3-venv package leaves behind.
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@# --no-deps: PyTorch's own index has other versions of the rest, which comes from PyPI in the next line.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,lab]"
	touch $@

clean:
	rm -rf .venv reports runs
