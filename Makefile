# Two commands: `make demo` and `make test`. Both set everything up first.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export OMP_NUM_THREADS ?= 1

.PHONY: demo test compat check setup clean

demo: $(VENV)/.ready
	$(BIN)/resafe demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest

# LLaMA-Factory and axolotl at their own pins, each in an environment of its own (about 8 GB of packages, once).
compat: $(VENV)/.ready
	$(BIN)/python -m pytest tests/compat -m compat

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/mypy --strict -p resafe

setup: $(VENV)/.ready

# torch first and by its exact pin: anything else might pull another build of it.
$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .compat runs build *.egg-info
