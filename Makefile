# On a fresh machine `make demo` and `make test` do all the set-up themselves.
#
#   make demo PYTHON=python3.13           another interpreter
#   make test CONSTRAINTS=.ci/constraints.txt   the exact versions that CI uses
#   make test ARGS="-k ttf -x"            arguments for pytest (or, with demo, for tokenfuse run)

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?=
ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) --editable

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: demo test test-lowest lint docs pages clean help

demo: $(VENV)/.installed ## answer a question about a video, with and without compression
	$(BIN)/tokenfuse run $(ARGS)

test: $(VENV)/.installed-test ## run the tests
	$(BIN)/python -m pytest $(ARGS)

# Beside the installed release, which it hides, so that nothing else has to be installed again. The
# pipeline of the oldest release logs a deprecation of its own.
LOWEST := $(VENV)/lowest
test-lowest: $(VENV)/.installed-test ## run the adapters' tests on the oldest transformers
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(LOWEST) \
	    transformers==$$(sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml).0
	PYTHONPATH=$(LOWEST) $(BIN)/python -m pytest tests/adapters/test_conformance.py tests/adapters/test_oracle.py \
	    tests/prompt/test_prompts.py tests/sessions/test_attach.py tests/adapters/test_llava.py tests/adapters/test_saliency.py \
	    --deselect tests/sessions/test_attach.py::test_a_stock_pipeline_gives_the_text_of_compress_and_generate \
	    $(ARGS)

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
	rm -rf .venv build dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests examples -type d -name __pycache__ -prune -exec rm -rf {} +

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and \
	    f"tokenfuse needs Python 3.11 or newer, $(PYTHON) is {v}: try make PYTHON=python3.13")'
	$(PYTHON) -m venv $(VENV)

# A stamp file per set of extras: pip runs again only when the dependencies change.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(INSTALL) .
	@touch $@

$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(INSTALL) ".[$*]"
	@touch $@
