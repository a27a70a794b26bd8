# Two cores, Python 3.11 or later, git: nothing else is needed.
#
#   make align       align the miniature, in runs/align (or the next free folder); ends with the path of report.html
#   make check       lint and types, in seconds
#   make test        the CPU suite
#   make test-slow   the CPU suite with the tests that take minutes
#   make docs        the documentation site, in build/site; a warning is an error
#   make lock        requirements.lock anew, after a change of pyproject.toml's dependencies
#   make clean       remove .venv and what builds leave behind; runs/ stays

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
# Not in the lock, because which build of it is right depends on the machine.
TORCH := torch==2.13.0

.PHONY: align check test test-slow docs lock clean

$(INSTALLED): requirements.lock pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is too old: Python 3.11 or later is needed; name one by make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q $(TORCH)
	$(VENV)/bin/python -m pip install -q --require-hashes --no-deps -r requirements.lock
	$(VENV)/bin/python -m pip install -q --no-build-isolation --no-deps -e .
	$(VENV)/bin/python -m pip check
	@touch $@

# A run that was stopped is named, not touched: resuming is the user's choice.
align: $(INSTALLED)
	@set -e; out=runs/align; n=1; \
	while [ -e "$$out" ]; do \
	  [ -e "$$out/report.html" ] || echo "$$out is unfinished; to go on with it: $(VENV)/bin/kvpo align mini --processes 2 --out $$out --resume"; \
	  n=$$((n + 1)); out=runs/align-$$n; \
	done; \
	$(VENV)/bin/kvpo align mini --processes 2 --out "$$out"

check: $(INSTALLED)
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m mypy

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -m "not slow and not gpu" -q -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(INSTALLED)
	$(VENV)/bin/python -m pytest -m "not gpu" -q -n 2 --dist loadfile --no-loadscope-reorder

# NO_MKDOCS_2_WARNING: the theme's notice about a later mkdocs says nothing of these pages.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --quiet
	@echo build/site/index.html

# Add UPGRADE=--upgrade for the newest releases. torch and what only it asks for are left out.
lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install -q uv
	echo "torch ; python_version < '3'" > build/lock/without-torch.txt
	build/lock/bin/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
	  --generate-hashes --no-annotate --override build/lock/without-torch.txt \
	  --custom-compile-command "make lock" $(UPGRADE) -q -o requirements.lock

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
