# Two cores, Python 3.11 or later, git: nothing else is needed.
#
#   make align       align the miniature, in runs/align (or the next free folder); ends with the path of report.html
#   make check       lint, in seconds
#   make types       what the type checker says; it still finds faults, so nothing depends on it
#   make test        the CPU suite
#   make test-slow   the CPU suite with the tests that take minutes
#   make docs        the documentation site, in build/site; a warning is an error
#   make clean       remove .venv and what builds leave behind; runs/ stays

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)

.PHONY: align check types test test-slow docs clean

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is too old: Python 3.11 or later is needed; name one by make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q $(TORCH)
	$(VENV)/bin/python -m pip install -q -e '.[dev]'
	@touch $@

$(VENV)/.docs: $(INSTALLED)
	$(VENV)/bin/python -m pip install -q -e '.[docs]'
	@touch $@

# A run that was stopped is named, not touched: resuming is the user's choice.
align: $(INSTALLED)
	@set -e; out=runs/align; n=1; \
	while [ -e "$$out" ]; do \
	  [ -e "$$out/report.html" ] || echo "$$out is unfinished; to go on with it: $(VENV)/bin/kvpo align mini --out $$out --resume"; \
	  n=$$((n + 1)); out=runs/align-$$n; \
	done; \
	$(VENV)/bin/kvpo align mini --out "$$out"

check: $(INSTALLED)
	$(VENV)/bin/python -m ruff check .

types: $(INSTALLED)
	$(VENV)/bin/python -m mypy

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -m "not slow and not gpu" -q -n 2 --dist loadfile

test-slow: $(INSTALLED)
	$(VENV)/bin/python -m pytest -m "not gpu" -q -n 2 --dist loadfile

# NO_MKDOCS_2_WARNING: the theme's notice about a later mkdocs says nothing of these pages.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --quiet
	@echo build/site/index.html

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
