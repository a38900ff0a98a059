# Two commands for a newcomer: `make quickstart` trains a small model with DPO, `make test` runs the first tier.
#
#   EXTRA=cuda12        extras for quickstart, comma separated (cuda12, cuda13, tpu, data)
#   PYTHON=python3.12   the interpreter that the virtual environment is made from
#   TORCH=              leave torch to pip in `make test-all`; the default pins the build the parity tests ran with
#   WORKERS=4           pytest processes
#   PYTEST_ARGS=-x      anything else for pytest

PYTHON ?= python3
VENV ?= .venv
EXTRA ?=
TORCH ?= torch==2.13.0
WORKERS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope
comma := ,
# One stamp per set of extras: a set is installed again only when setup.py changes. The package itself is installed
# in place, so that an edit under alignax/ needs no install.
RUN_STAMP := $(VENV)/.installed-run$(if $(EXTRA),-$(subst $(comma),-,$(EXTRA)))
TEST_STAMP := $(VENV)/.installed-test
ALL_STAMP := $(VENV)/.installed-all

.PHONY: quickstart test test-all lint clean
.NOTPARALLEL:

quickstart: $(RUN_STAMP)
	$(BIN)/alignax train --config experiments/quickstart.py --workdir runs/quickstart

test: $(TEST_STAMP)
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: $(ALL_STAMP)
	$(PYTEST) -m slow $(PYTEST_ARGS)

lint: $(TEST_STAMP)
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) .cache build *.egg-info .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(RUN_STAMP): setup.py | $(BIN)/python
	$(PIP) install -e ".$(if $(EXTRA),[$(EXTRA)])"
	touch $@

$(TEST_STAMP): setup.py | $(BIN)/python
	$(PIP) install -e ".[test]"
	touch $@

$(ALL_STAMP): setup.py | $(BIN)/python
	$(if $(TORCH),$(PIP) install "$(TORCH)")
	$(PIP) install -e ".[test,parity,notebooks,data,search]"
	touch $@
