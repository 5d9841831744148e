# On a fresh machine `make demo` and `make test` do all the set-up themselves, in versions that are
# known to work together.
#
#   make demo PYTHON=python3.13    another interpreter
#   make test CONSTRAINTS=         the newest versions
#   make test ARGS="-k ttf -x"     arguments for pytest (or, with demo, for tokenfuse run)
#   make test JOBS=0               in one process, as a debugger needs it

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= .ci/constraints.txt
EXTRAS ?= test
JOBS ?= auto
ARGS ?=

BIN := $(VENV)/bin
NEWEST := --upgrade --upgrade-strategy eager
INSTALL := $(BIN)/python -m pip install $(if $(CONSTRAINTS),-c $(CONSTRAINTS),$(NEWEST)) --editable
# A worker for each core. Its tensors are tiny, so that a second thread would only keep the first
# waiting. Tests of one class or module stay together, and share its models.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist loadscope

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: demo test test-all test-lowest test-vllm lint docs pages clean help FORCE

demo: $(VENV)/.installed ## answer a question about a video, with and without compression
	$(BIN)/tokenfuse run $(ARGS)

test: $(VENV)/.installed-$(EXTRAS) ## run the tests
	$(PYTEST) $(ARGS)

test-all: $(VENV)/.installed-$(EXTRAS) ## run the tests on every family in full, with more examples
	$(PYTEST) --full $(ARGS)

# Beside the installed release, which it hides, so that nothing else has to be installed again. The
# pipeline of the oldest release logs a deprecation of its own.
LOWEST := $(VENV)/lowest
test-lowest: $(VENV)/.installed-$(EXTRAS) ## run the adapters' tests on the oldest transformers
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(LOWEST) \
	    transformers==$$(sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml).0
	PYTHONPATH=$(LOWEST) $(PYTEST) tests/adapters/test_conformance.py tests/adapters/test_oracle.py \
	    tests/prompt/test_prompts.py tests/sessions/test_attach.py tests/adapters/test_llava.py tests/adapters/test_saliency.py \
	    --deselect tests/sessions/test_attach.py::test_a_stock_pipeline_gives_the_text_of_compress_and_generate \
	    $(ARGS)

# vLLM asks for releases of its own.
VLLM := $(VENV)-vllm
test-vllm: $(VENV)/.installed-$(EXTRAS) $(VLLM)/.installed ## run the tests of vLLM, in an environment of its own
	TOKENFUSE_VLLM_PYTHON=$(VLLM)/bin/python $(PYTEST) -rs tests/integrations/test_vllm_parity.py $(ARGS)

lint: $(VENV)/.installed-dev ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs ## build the documentation into site/
	$(BIN)/mkdocs build --strict

# Of the built-ins only, whatever plugins are installed.
pages: $(VENV)/.installed ## renew what is generated: the schema of presets, and pages of docs/
	TOKENFUSE_PLUGINS= $(BIN)/tokenfuse schema > configs/schema.json
	$(BIN)/python -m tokenfuse.bench.strategies_page > docs/reference/strategies.md
	$(BIN)/python -m tokenfuse.bench.models_page docs/results/models.json > docs/reference/models.md

clean: ## remove everything that the other targets create
	rm -rf .venv .venv-vllm build dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests examples -type d -name __pycache__ -prune -exec rm -rf {} +

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and \
	    f"tokenfuse needs Python 3.11 or newer, $(PYTHON) is {v}: try make PYTHON=python3.13")'
	$(PYTHON) -m venv $(VENV)

# A stamp file per set of extras: pip runs again only when the dependencies or the versions change.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) $(VENV)/.versions
	$(INSTALL) .
	@touch $@

$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS) $(VENV)/.versions
	$(INSTALL) ".[$*]"
	@touch $@

# Status 3: a package cannot be had here, and the tests are skipped with that reason.
$(VLLM)/.installed: benchmarks/vllm_environment.py | $(BIN)/python
	$(BIN)/python $< $(VLLM) && touch $@ || test $$? -eq 3

$(VENV)/.versions: FORCE | $(BIN)/python
	@echo '$(CONSTRAINTS)' | cmp -s - $@ || echo '$(CONSTRAINTS)' >$@
