# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make .venv and install what they need.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# What training needs. On Linux the default wheel brings CUDA, which the tests do not need: for a CPU build give pip its index, as in
# make test TORCH="torch==2.13.0 --index-url URL".
TORCH ?= torch==2.13.0
# Test files that run at a time. Each stays in one process, for what its tests share; conftest.py says which begin.
AT_ONCE ?= 2

# Modules are compiled when they are first imported, which most of an environment never are: half the time of an install.
INSTALL = -m pip install -q --no-compile

PYTEST = -m pytest -n $(AT_ONCE) --dist loadfile --no-loadscope-reorder
# Of the tests with a marker: their marker and their files, because reading all the others takes as long as a test.
marked = -m $(1) $(shell grep -l 'mark\.$(1)' tests/test_*.py)
# What speaks to an endpoint, and the commands and pages of a runtime without the training's packages.
CLIENTS = budget chaos chaos_faults cli docs embedded host models openai_model own_solver pace secrets
EXPERIMENTS = learning ablation records longer contexts loop mixed injection

.PHONY: demo test test-fast test-cluster test-openai2 test-vllm crash chaos lint audit format benchmarks results results-fast verify-all long-life clean

demo: $(VENV)/.demo
	$(BIN)/cod demo

test: $(VENV)/.dev
	$(BIN)/python $(PYTEST) -m "not cluster and not vllm"

test-fast: $(VENV)/.dev
	$(BIN)/python $(PYTEST) -m "not slow and not cluster and not vllm"

# Rays of several ranks and nodes on this machine, minutes each; side by side they are no faster, and miss their deadlines.
test-cluster: $(VENV)/.dev
	$(BIN)/python -m pytest $(call marked,cluster)

# litellm holds openai below 3; the runtime lives with both, and without what training needs.
test-openai2: $(VENV)-openai2/.dev
	$(VENV)-openai2/bin/python $(PYTEST) -m "not cluster and not vllm" $(CLIENTS:%=tests/test_%.py)

# Real model servers. vLLM asks for other versions than training does, so that it has an environment of its own.
test-vllm: $(VENV)/.dev $(VENV)-vllm/.dev
	COD_VLLM_PYTHON=$(abspath $(VENV)-vllm/bin/python) $(BIN)/python -m pytest $(call marked,vllm)

# A life of 20 tasks, killed at every point it comes by (thousands), and with disks that fail, fill up and lose their power: docs/crashes.md.
crash: $(VENV)/.dev
	cd tests && $(abspath $(BIN))/python -m crash

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd experiments && $(abspath $(BIN))/mypy --config-file ../pyproject.toml *.py

# Known vulnerabilities of what is installed.
audit: $(VENV)/.dev
	$(BIN)/python .ci/audit

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# 10,000 calls through an endpoint that does what it should not, killed 20 times; 10 minutes.
chaos: $(VENV)/.dev
	COD_CHAOS=1 $(BIN)/python -m pytest -s tests/test_chaos.py

benchmarks: $(VENV)/.dev
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/storage.py
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/credit.py
	$(BIN)/python benchmarks/merging.py
	$(BIN)/python benchmarks/conversations.py
	$(BIN)/python benchmarks/sharing.py

# Every value of every kind of row changed, one at a time, and five hundred bits flipped: minutes.
verify-all: $(VENV)/.dev
	COD_VERIFY_ALL=1 $(BIN)/python $(PYTEST) tests/test_verify.py

# Two lives of 2,000 tasks, minutes; writes the data and the figure of docs/results/long-life.md.
long-life: $(VENV)/.dev
	$(BIN)/python experiments/life.py
	$(BIN)/python experiments/pages.py

# A small version of every experiment of docs/results, minutes; what it finds is printed and kept as NAME-fast.json in runs/.
results-fast: $(VENV)/.dev
	for name in $(EXPERIMENTS); do $(BIN)/python experiments/$$name.py --fast || exit 1; done

# All of them, hours on two cores; goes on where it was stopped, and writes the pages.
results: $(VENV)/.dev
	for name in $(EXPERIMENTS); do $(BIN)/python experiments/$$name.py || exit 1; done
	$(BIN)/python experiments/pages.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) --upgrade pip

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml
	$(BIN)/python $(INSTALL) -e '.[local]'
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints/cpu.txt
	$(BIN)/python $(INSTALL) $(TORCH)
	$(BIN)/python $(INSTALL) -c constraints/cpu.txt -e '.[dev,agentscope,train]'
	touch $@

$(VENV)-openai2/.dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)-openai2
	$(VENV)-openai2/bin/python $(INSTALL) --upgrade pip
	$(VENV)-openai2/bin/python $(INSTALL) -e '.[dev,litellm]'
	touch $@

# vLLM does not start where torchvision and its kin are there in builds for another torch than this.
$(VENV)-vllm/.dev: constraints/vllm.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python $(INSTALL) --upgrade pip
	$(VENV)-vllm/bin/python $(INSTALL) $(TORCH)
	$(VENV)-vllm/bin/python $(INSTALL) -r constraints/vllm.txt
	$(VENV)-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec triton
	touch $@

clean:
	rm -rf $(VENV) .venv-* demo .pytest_cache .mypy_cache .ruff_cache
