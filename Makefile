# The one way to install, check, test and run; `.ci/run` calls these targets too.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13; do $$python -c "" 2>/dev/null && echo $$python && exit; done; echo python3)
# Which build of PyTorch: auto takes the CUDA build beside an NVIDIA GPU, else the CPU build where an index has it.
TORCH ?= auto
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := .venv/bin

# Two one-thread workers beat one two-thread process at the sizes that run here, and spinning threads eat both cores.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY := PASSIVE
export RAY_USAGE_STATS_ENABLED := 0
# Without a token Ray runs whatever anyone sends to its ports.
export RAY_AUTH_MODE := token
# Limits for what connections send before they ask for anything.
export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH := aptp_platform.serve.http.connections:limit_connections
export TRANSFORMERS_VERBOSITY := error
# Everything that Ray starts looks `python` up here.
export PATH := $(CURDIR)/$(BIN):$(PATH)

# `make setup TORCH=cpu` or `TORCH=cuda` makes .venv anew if it holds the other build.
ifneq ($(filter cpu cuda,$(TORCH)),)
ifneq ($(TORCH),$(shell cat .venv/.torch 2>/dev/null))
.venv/.ready: another-build
endif
endif

.PHONY: help setup node check test soak bench-aptp bench-serve bench-train bench-ablation results-quick demo serve lock clean another-build
help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s $$'\t'

INSTALL = @command -v "$(PYTHON)" >/dev/null || { echo "error: there is no $(PYTHON): install Python 3.11, 3.12 or 3.13, or give PYTHON=/path/to/it" >&2; exit 2; }; "$(PYTHON)" -m install.environment
INSTALL_TORCH = --torch "$(TORCH)" --cpu-index "$(TORCH_CPU_INDEX)"
LOCKS := requirements.lock requirements-cuda.lock

setup: .venv/.ready .venv-s3/.ready ## build .venv (and .venv-s3, the S3 server of the tests) from the locks; TORCH=cpu|cuda|auto

.venv/.ready: $(LOCKS) requirements-dev.lock pyproject.toml
	$(INSTALL) .venv requirements.lock requirements-dev.lock --project $(INSTALL_TORCH)
	@touch $@

node: $(LOCKS) ## build .venv for a machine of a cluster: without what tests and checks need
	$(INSTALL) .venv requirements.lock --project $(INSTALL_TORCH)

.venv-s3/.ready: requirements-s3.lock
	$(INSTALL) .venv-s3 requirements-s3.lock
	@touch $@

check: setup ## ruff, format, mypy, the import rules, and the locks against the index
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q -p no:cacheprovider tests/test_architecture.py
	$(BIN)/python -m install.lock --check

# What encodes and trains on Ray, and all the rest: two halves that start processes more than they compute.
TRAINING := tests/aptp_platform/data tests/aptp_platform/experts tests/aptp_platform/train tests/test_path.py

test: setup ## the whole suite, in two halves side by side
	@$(BIN)/pytest -q $(addprefix --ignore=,$(TRAINING)) > .tests-rest.log 2>&1 & rest=$$!; \
	$(BIN)/pytest $(TRAINING) && training=0 || training=$$?; \
	wait $$rest && rest=0 || rest=$$?; \
	cat .tests-rest.log; rm .tests-rest.log; exit $$((rest | training))

bench-aptp: setup ## the library's speed and memory as ratios beside their targets; some 15 minutes, 12 GB
	$(BIN)/python -m benchmarks.library

soak: setup ## load and faults against a server, as long as they need to be believed
	$(BIN)/pytest --soak tests/aptp_platform/serve/test_faults.py

bench-serve: setup .venv-bench/.ready ## the server against its peers, in ratios; FRESH=1 measures all again
	PYTHONPATH=.:platform $(BIN)/python -m benchmarks.serving $(if $(FRESH),--fresh)

# LitServe beside, not in, the environment that is served from.
.venv-bench/.ready: requirements-bench.lock .venv/.ready
	$(INSTALL) .venv-bench requirements-bench.lock --beside .venv
	@touch $@

DEMO := $(BIN)/python -m examples.emoji.demo \
	$(if $(GPU),--config jobs/configs/demo_gpu.yaml --serve-config serve_configs/demo_gpu.yaml)

demo: setup ## captioned images to served images; FRESH=1 forgets finished stages, GPU=1 computes on a GPU
	$(DEMO) $(if $(FRESH),--fresh)

serve: setup ## serve the demo's release until ^C; GPU=1: that of make demo GPU=1
	$(DEMO) --serve

results-quick: setup ## the method beside its opponents in ten minutes, with the whole report; too short to prove anything
	PYTHONPATH=. $(BIN)/python jobs/evaluate_experts.py --config jobs/configs/results_quick.yaml

bench-train: setup ## what training costs beyond its arithmetic; writes benchmarks/results/train.json
	$(BIN)/python -m benchmarks.train

bench-ablation: setup ## what two CPU tricks bring the server, each alone; writes benchmarks/results/ablation.json
	PYTHONPATH=.:platform $(BIN)/python -m benchmarks.ablation

lock: ## refresh every lock from pyproject.toml; KEEP=1 changes only what is missing or no longer allowed
	rm -rf .venv-lock
	"$(PYTHON)" -m venv .venv-lock
	.venv-lock/bin/python -m pip install -qq --disable-pip-version-check packaging uv
	.venv-lock/bin/python -m install.lock $(if $(KEEP),--keep)
	rm -rf .venv-lock

clean: ## forget the runs of the demo and of results-quick
	rm -rf runs/demo runs/demo-gpu runs/results-quick
