# Everything runs from .venv, which `make venv` builds from the pinned constraints.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?= runs
PRESET ?= cifar10
QUESTIONS ?= 1,2,3,4,5,6,7,8,9

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-gpu bench plots profile science lint format cifar10 jpeg-run clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-zA-Z0-9_-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	@touch $@

# model.mlp=quack, which the fastest rows of the bench have: its packages are large, and of use on Hopper and newer only
HOPPER := import sys, torch; sys.exit(not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9)
$(VENV)/.installed-quack: $(VENV)/.installed-dev
	@if ! $(BIN)/python -c "$(HOPPER)"; then echo "extra quack left out: no GPU of compute capability 9.0 or newer"; \
	elif $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[quack]'; then touch $@; \
	else echo "extra quack left out: pip could not install it (see above); the bench runs without it"; fi

venv: $(VENV)/.installed ## install what the main job needs into .venv

demo: $(VENV)/.installed ## the main job on scikit-learn's digits: prepare, probe, train, sample, evaluate, report
	$(BIN)/fastasync run --preset digits --out $(OUT)/digits

test: $(VENV)/.installed-dev ## all tests that need no GPU, and use none: kernels run in Triton's interpreter
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-gpu: $(VENV)/.installed-quack ## on a CUDA device: every kernel and optimizer test compiled, then all others that need one
	@$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('make test-gpu needs a CUDA device')"
	$(BIN)/python -m pytest -n 4 -m "not slow" tests/kernels tests/optim
	$(BIN)/python -m pytest -m gpu --ignore=tests/kernels --ignore=tests/optim

bench: $(VENV)/.installed-quack ## check and time everything, or SUBJECT="loss step"; rows go to bench/results/<gpu>.csv
	$(BIN)/python -m bench.run $(SUBJECT)

plots: $(VENV)/.installed-dev ## the README's pictures from bench/results/<gpu>.csv
	$(BIN)/python -m bench.plots

profile: $(VENV)/.installed-quack ## a trace of training steps and a table of device time by category
	$(BIN)/python -m bench.profile_step --out $(OUT)/profile

science: $(VENV)/.installed-dev ## the study of schedules; QUESTIONS=1,2 ARGS='--seconds 1500' for a part, PRESET=digits on a CPU
	$(if $(filter cifar10,$(PRESET)),$(BIN)/fastasync fetch cifar10 && $(BIN)/fastasync fetch inception)
	$(BIN)/python -m bench.science.study --preset $(PRESET) --questions $(QUESTIONS) $(ARGS)

lint: $(VENV)/.installed-dev ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fastasync kernels/fastasync_kernels train.py

format: $(VENV)/.installed-dev ## rewrite the code in the house format
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

cifar10: $(VENV)/.installed ## fetch CIFAR-10 and the Inception weights, run preset cifar10 on one GPU
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[fid,kernels]'
	$(BIN)/fastasync fetch cifar10
	$(BIN)/fastasync fetch inception
	$(BIN)/fastasync run --preset cifar10 --out $(OUT)/cifar10

jpeg-run: $(VENV)/.installed-dev ## CIFAR-10 as JPEGs -> encode -> probe -> DeepSpeed -> FID; ARGS='--size gpu --record'
	$(BIN)/python -m bench.jpeg_run $(ARGS)

clean: ## remove build products and caches (runs and data stay)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
