# Two commands: `make run` (the main job on the embedded default) and `make test`. Needs Python 3.11 to 3.13 and nothing else.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test lint docs

run: .venv/installed
	$(BIN)/python train.py --force

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy smolseek

docs: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	$(BIN)/python docs/recipe_reference.py
	$(BIN)/mkdocs build --strict

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@
