# Two commands: `make train` and `make test`; each makes what it needs, once. Data and runs are never removed.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help train test lint bench verify gpu clean

PYTHON ?= python3
python := .venv/bin/python
setup := scripts/venv.sh scripts/ffcv.sh constraints-cpu.txt pyproject.toml setup.py

help: ## print this list
	@sed -n 's/^\([a-z]*\):.*## /make \1	/p' Makefile | expand -t 16

train: .venv/installed ## set up, get Fashion-MNIST, train the quickstart preset to the end (minutes on a CPU)
	$(python) -m reat_fast.data fashion-mnist
	$(python) -m reat_fast.train quickstart --fused

test: lint ## set up with the test tools and run all checks and tests
	scripts/test.sh $(python)

lint: .venv/installed-dev ## format and lint checks, types
	$(python) -m ruff format --check
	$(python) -m ruff check
	$(python) -m mypy

bench: .venv/installed-dev ## time the kernels, the step and the loaders on this machine
	$(python) -m pytest bench --benchmark-only

verify: .venv/installed ## compare every fast path with the reference on this machine
	$(python) -m reat_fast.verify

# python=... names an interpreter, where no environment can be made; of test tools that it lacks, bench/gpu.py says the cost.
# DATA=FILE.npz is CIFAR-10 for the trainings, OFFICIAL=CLONE the official code, CALL=2 to CALL=6 the calls after the first.
gpu: ## run what only a CUDA device can show, in calls of 10 minutes (CALL=1, DATA=FILE.npz, OFFICIAL=CLONE)
	$(python) -m bench.gpu --out gpu-results $(if $(CALL),--call $(CALL)) $(if $(DATA),--data "$(DATA)") \
		$(if $(OFFICIAL),--official "$(OFFICIAL)")

clean: ## remove .venv, caches and build leftovers
	rm -rf .venv build dist *.egg-info .benchmarks .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find bench kernels loaders reat_fast tests -name __pycache__ -prune -exec rm -rf {} +

.venv/installed: $(setup)
	@PYTHON=$(PYTHON) scripts/venv.sh

.venv/installed-dev: $(setup)
	@PYTHON=$(PYTHON) scripts/venv.sh dev
