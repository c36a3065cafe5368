# make demo | test | test-slow | test-gpu | lint | bench-cpu | docs | clean
# Every target sets up its own .venv first. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.ready
BENCH  := $(VENV)/.bench-ready

.PHONY: demo test test-slow test-gpu lint bench-cpu docs clean setup

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "longscan needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	touch $@

$(BENCH): $(STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

demo: $(STAMP)
	$(PY) -m longscan demo

test: $(STAMP)
	$(PY) -m pytest

test-slow: $(STAMP)
	$(PY) -m pytest -m slow

test-gpu: $(STAMP)
	$(PY) -m pytest -m gpu

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

bench-cpu: $(BENCH)
	$(PY) -m longscan bench cpu --record

docs: $(STAMP)
	$(PY) -m longscan docs

clean:
	rm -rf $(VENV) runs
