# `make demo` and `make test` do all the set-up on a fresh machine. Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
WORKSPACE ?= demo-workspace
WORKERS ?= 2
export CMAKE_ARGS ?= -DLLAVA_BUILD=OFF

.PHONY: demo test check lint types imports screenshots mergekit trl clean

$(VENV)/.installed: pyproject.toml constraints.txt $(wildcard engine/merge/*/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "medmerge needs Python 3.11 or newer, for example: make PYTHON=python3.12 demo"; exit 2; }
	@echo "── making $(VENV) with $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "── 1/3 torch (CPU or CUDA build, as your package index gives it)"
	@$(PIP) torch==2.13.0
	@echo "── 2/3 llama.cpp: compiled from source the first time, 5-17 minutes on two cores; pip keeps the result"
	@$(PIP) llama-cpp-python
	@echo "── 3/3 medmerge and its other libraries"
	@$(PIP) -e '.[demo,dev]'
	@touch $@

demo: $(VENV)/.installed  ## the app, on a real 135M model with two trained adapters
	@$(BIN)/medmerge-tui --demo --workspace $(WORKSPACE)

test: $(VENV)/.installed  ## every test, in WORKERS processes
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(VENV)/.installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/.installed
	@$(BIN)/mypy

imports: $(VENV)/.installed
	@$(BIN)/lint-imports

check: lint types imports test  ## all that CI runs

screenshots: $(VENV)/.installed  ## SVG and PNG of every screen, from the running app (PNG needs chromium)
	@$(BIN)/python screenshots/make.py --workspace $(WORKSPACE)

mergekit: .venv-mergekit/.installed  ## mergekit in an environment of its own, for tests and benchmarks against it

.venv-mergekit/.installed: benchmarks/peers/mergekit.txt
	@test -x .venv-mergekit/bin/python || $(PYTHON) -m venv .venv-mergekit
	@.venv-mergekit/bin/python -m pip install --disable-pip-version-check -q torch==2.13.0
	@.venv-mergekit/bin/python -m pip install --disable-pip-version-check -q -r benchmarks/peers/mergekit.txt
	@touch $@

trl: .venv-trl/.installed  ## TRL in an environment of its own, for the training benchmark

.venv-trl/.installed: benchmarks/peers/trl.txt
	@test -x .venv-trl/bin/python || $(PYTHON) -m venv .venv-trl
	@.venv-trl/bin/python -m pip install --disable-pip-version-check -q torch==2.13.0
	@.venv-trl/bin/python -m pip install --disable-pip-version-check -q -r benchmarks/peers/trl.txt
	@touch $@

clean:
	rm -rf $(VENV) .venv-mergekit .venv-trl .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info
