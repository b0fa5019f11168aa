# `make serve` from a fresh clone: a virtual environment, the project in place, the default model, the server.
# Stamps in .venv make every target incremental: they are renewed when pyproject.toml changes.
# Options: PYTHON=python3.12, VENV=elsewhere, ARGS="--port 9000" or, for tests, ARGS="-n 0 -k lora". pip's own variables hold, such as PIP_EXTRA_INDEX_URL
# for the index of torch's small CPU build on Linux without a GPU.

PYTHON ?= $(firstword $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done) python3)
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TEST_INSTALLED := $(VENV)/.installed-test
LINT_INSTALLED := $(VENV)/.installed-lint
BROWSER_INSTALLED := $(VENV)/.installed-browser
CLIENTS := $(patsubst tests/conformance/requirements-%.txt,%,$(wildcard tests/conformance/requirements-*.txt))
CLIENTS_INSTALLED := $(CLIENTS:%=.venv-conformance/%/.installed)
# Compiling every module of torch and transformers takes half of the install's CPU time; few of them are ever imported.
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --no-compile --editable

# Servers and engines of their own run beside the tests: more processes than two find no free core on a small machine.
# A process that has nothing left takes over tests of the other.
TWO_PROCESSES := -n 2 --dist worksteal

# Bytecode is kept even where the environment forbids it, as images do: each process would compile torch's modules anew.
export PYTHONDONTWRITEBYTECODE =

.DEFAULT_GOAL := help
.PHONY: help install pull serve rag test test-all browser pictures churn soak abuse gpu conformance ray buckets lint audit docs format clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | awk -F '\t' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(INSTALLED)  ## create .venv and install the project in place

pull: $(INSTALLED)  ## download and convert the default model (once, about 95 MB)
	$(BIN)/specserve pull

serve: pull  ## serve the default model and examples/adapters on http://127.0.0.1:8000
	$(BIN)/specserve serve --adapters-dir examples/adapters $(ARGS)

rag: pull  ## answer questions about packages with quotations, on a server of its own if none runs (ARGS='"Which package ...?"')
	$(BIN)/python examples/rag/ask.py --examples 5 $(ARGS)

test: $(TEST_INSTALLED)  ## run the tests, five to twelve minutes in two processes (ARGS="-n 0 -k lora": one process, chosen tests)
	$(BIN)/python -m pytest $(TWO_PROCESSES) $(ARGS)

test-all: $(TEST_INSTALLED)  ## run the slow tests too, all but those for a GPU
	$(BIN)/python -m pytest $(TWO_PROCESSES) -m 'not gpu' $(ARGS)

browser: $(BROWSER_INSTALLED)  ## test the page in Chromium; installs that with apt where there is none, and playwright, for make test too
	$(BIN)/python -m pytest -n 0 -m 'not gpu' tests/browser $(ARGS)

pictures: $(BROWSER_INSTALLED)  ## take the pictures of docs/images again, some minutes on a quiet machine
	$(BIN)/specserve pull
	PYTHONPATH=tests/fixtures:. $(BIN)/python tests/browser/screenshots.py $(ARGS)

conformance: $(TEST_INSTALLED) $(CLIENTS_INSTALLED)  ## run other projects' clients, each in an environment of its own
	$(BIN)/python -m pytest -m slow tests/conformance $(ARGS)

gpu: $(TEST_INSTALLED)  ## on a CUDA machine: the GPU tests and benches, under ten minutes; results in gpu-results/ (ARGS=--dry-run: tiny, without one)
	$(BIN)/specserve pull
	$(BIN)/python -m bench.gpu $(ARGS)

churn: $(TEST_INSTALLED)  ## change ten adapters in every way while they are served, for an hour (ARGS="--minutes 5")
	$(BIN)/specserve pull
	PYTHONPATH=tests/fixtures:tests:. $(BIN)/python -m churn $(ARGS)

soak: $(TEST_INSTALLED)  ## the same for half an hour at saturation: a quarter leaves early, new grammars, a kill every 5 minutes
	$(BIN)/specserve pull
	PYTHONPATH=tests/fixtures:tests:. $(BIN)/python -m churn --minutes 30 --callers 16 --grammar-callers 4 --num-seqs 8 \
		--leaving 0.25 --kill-every-s 300 $(ARGS)

abuse: $(TEST_INSTALLED)  ## all bad inputs and faults that the server survives (docs/reliability.md), the slow ones too
	$(BIN)/python -m pytest $(TWO_PROCESSES) -m 'not gpu' $$(grep -ohE 'tests/[a-z_/]+\.py' docs/reliability.md | grep -v conformance | sort -u) $(ARGS)

ray: $(TEST_INSTALLED)  ## two replicas on this machine under load: mixed adapters, one is killed, the front is killed
	$(PIP_INSTALL) '.[ray]'
	$(BIN)/python -m pytest -n 0 -m 'slow or not slow' tests/ray $(ARGS)

buckets: $(TEST_INSTALLED)  ## a shared store in a bucket of an S3 server on this machine: pushed, pruned, away, refused
	$(PIP_INSTALL) '.[s3]' 'moto[s3,server]>=5'
	$(BIN)/python -m pytest -n 0 -m 'slow or not slow' tests/server/shared_store/test_s3_buckets.py $(ARGS)

lint: $(LINT_INSTALLED)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p specserve

audit: $(INSTALLED)  ## look what is installed up among known vulnerabilities (docs/security.md#dependencies)
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip --disable-pip-version-check install --quiet 'pip-audit>=2.9'
	.venv-audit/bin/python tests/audit/audit_installed.py $(BIN)/python

docs:  ## build the documentation as a site in build/site; a warning is an error
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip --disable-pip-version-check install --quiet --no-compile 'mkdocs-material>=9.6,<10'
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict $(ARGS)

format: $(LINT_INSTALLED)  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environments and caches; the converted model stays in the user's cache
	rm -rf $(VENV) .venv-audit .venv-conformance .venv-docs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null || { \
	echo "error: specserve needs Python 3.11 or 3.12, and '$(PYTHON)' is not one;" \
	"install it and run: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	echo "error: $(PYTHON) cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }

$(INSTALLED): pyproject.toml | $(BIN)/python
	$(PIP_INSTALL) .
	@$(BIN)/python -c 'import torch, aiohttp, gguf; from transformers import AutoTokenizer'
	@touch $@

$(TEST_INSTALLED): pyproject.toml | $(INSTALLED)
	$(PIP_INSTALL) '.[test]'
	@touch $@

.venv-conformance/%/.installed: tests/conformance/requirements-%.txt | $(BIN)/python
	$(PYTHON) -m venv .venv-conformance/$*
	.venv-conformance/$*/bin/python -m pip --disable-pip-version-check install --quiet --no-compile -r $<
	@touch $@

$(BROWSER_INSTALLED): pyproject.toml | $(TEST_INSTALLED)
	$(PIP_INSTALL) '.[browser]'
	@for program in "$$SPECSERVE_CHROMIUM" chromium chromium-browser google-chrome; do \
	command -v "$$program" >/dev/null && exit; done; apt-get install --yes chromium || { \
	echo "error: no Chromium, and apt-get cannot install one here; install it, or set SPECSERVE_CHROMIUM to its path" >&2; exit 1; }
	@touch $@

$(LINT_INSTALLED): pyproject.toml | $(INSTALLED)
	$(PIP_INSTALL) '.[lint]'
	@touch $@
