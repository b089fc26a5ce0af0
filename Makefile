# Two commands do everything: `make demo` to see it work, `make test` to check it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test torture quick coverage check docs clean

demo: $(STAMP)
	$(BIN)/llmctl demo

# the torture tests kill what they start at chosen moments, and get the machine to themselves
test: $(STAMP)
	$(PYTEST) --ignore tests/torture
	$(PYTEST) --dist loadfile tests/torture

torture: $(STAMP)
	TORTURE=long $(PYTEST) --dist loadfile tests/torture

quick: $(STAMP)
	$(PYTEST) -m "not slow"

coverage: $(STAMP)
	$(PYTEST) -m "not slow" --cov

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

docs: $(STAMP)
	$(BIN)/python docs/generate.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
