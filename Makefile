# Every target does its own set-up: Python 3.10 or newer, make and a package index are all that is needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test conformance assets lint format docs bench bench-quality clean

demo: $(VENV)/.base
	$(BIN)/growthring demo --out runs/demo --overwrite

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q

# All of PEFT's own tests that apply to our adapters; its sdist is fetched by pip.
conformance: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m "" tests/conformance

# The demo's model and data (157 MB). Tests on the real encoder run where they are, and skip where they are not.
assets: $(VENV)/.base
	$(BIN)/python -c "from growthring.streams import DEMO_ASSETS, fetch; fetch(DEMO_ASSETS)"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs
	$(BIN)/python benchmarks/tables.py
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.base
	$(BIN)/python benchmarks/subspace_kernels.py
	$(BIN)/python benchmarks/step_overhead.py
	$(BIN)/python benchmarks/pegp_overhead.py
	$(BIN)/python benchmarks/pegp_drift.py
	$(BIN)/python benchmarks/gorp_step.py
	$(BIN)/python benchmarks/largo_step.py

bench-quality: $(VENV)/.base
	$(BIN)/python benchmarks/demo_sweep.py
	$(BIN)/python benchmarks/demo_sweep.py --choose
	$(BIN)/python benchmarks/demo_seeds.py

$(VENV)/.python:
	$(PYTHON) -c "import sys; sys.exit('growthring needs Python 3.10 or newer; try make PYTHON=python3.11' if sys.version_info < (3, 10) else 0)"
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.base: $(VENV)/.python pyproject.toml constraints/cpu.txt
	$(PIP) install -q -c constraints/cpu.txt -e .
	touch $@

# galore-torch, which GaLore is compared with, without bitsandbytes and tensorly, which it needs for other things.
$(VENV)/.dev: $(VENV)/.python pyproject.toml constraints/cpu.txt
	$(PIP) install -q -c constraints/cpu.txt -e ".[dev]"
	$(PIP) install -q --no-deps galore-torch==1.0
	touch $@ $(VENV)/.base

$(VENV)/.docs: $(VENV)/.python pyproject.toml constraints/cpu.txt
	$(PIP) install -q -c constraints/cpu.txt -e ".[docs]"
	touch $@ $(VENV)/.base

clean:
	rm -rf $(VENV) build dist site runs .mypy_cache .pytest_cache .ruff_cache .hypothesis
