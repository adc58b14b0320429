# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make .venv and install what they need.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Only for `make policies` and `make test-policies`. On Linux the default wheel brings CUDA, which nothing here needs: point pip at a
# CPU build if you have one.
TORCH ?= torch==2.13.0

.PHONY: demo test test-fast test-openai2 test-policies policies lint format benchmarks clean

demo: $(VENV)/.demo
	$(BIN)/cod demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow"

# litellm holds openai below 3; the runtime lives with both.
test-openai2: $(VENV)-openai2/.dev
	$(VENV)-openai2/bin/python -m pytest

# What needs torch: that the shipped policies say the same in transformers and in llama.cpp, and that cloning works.
test-policies: $(VENV)-policies/.dev
	$(VENV)-policies/bin/python -m pytest tests/test_policies.py tests/test_tiny_clone.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: $(VENV)/.dev
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/storage.py
	$(BIN)/python benchmarks/engine.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install -q -e '.[local]'
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install -q -e '.[dev,agentscope]'
	touch $@

$(VENV)-openai2/.dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)-openai2
	$(VENV)-openai2/bin/python -m pip install -q --upgrade pip
	$(VENV)-openai2/bin/python -m pip install -q -e '.[dev,litellm]'
	touch $@

$(VENV)-policies/.dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)-policies
	$(VENV)-policies/bin/python -m pip install -q --upgrade pip
	$(VENV)-policies/bin/python -m pip install -q $(TORCH)
	$(VENV)-policies/bin/python -m pip install -q -e '.[dev,policy]'
	touch $@

clean:
	rm -rf $(VENV) .venv-* demo .pytest_cache .mypy_cache .ruff_cache
