# Each target sets up what it needs: a .venv in the checkout, made once from requirements.lock.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo gallery app compare test soak gpu bench docs lint lock clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ARGS ?=
DATA := digits

help:
	@echo 'TokenBridge'
	@echo '  make demo   train on real handwritten digits and draw new ones; ends with a report'
	@echo '              (about 5 minutes on 2 CPU cores); ARGS=--quick: few steps, poor digits'
	@echo '  make gallery  the same with emoji of 64 px (about 15 minutes); goes on if interrupted'
	@echo '  make app    a page to draw with the demo model or any other, in the browser'
	@echo '  make compare  every head on the same digits (about 40 minutes on 2 cores); goes on where'
	@echo '              it was; ARGS=--quick: few steps; ARGS=--long: three seeds, many tables;'
	@echo '              DATA=gallery: on the emoji, many hours'
	@echo '  make test   run the tests (about 6 minutes on 2 CPU cores); ARGS="-k vae" picks some'
	@echo '  make soak   do harm to training, saving and caching, over 50 times; prints a table'
	@echo '  make gpu    all about one GPU: is it right, how fast, what bounds it; 25 minutes, goes on'
	@echo '              where it was; make bench is the same, at the size of a CPU without one'
	@echo '  make docs   the documentation as a site in output/docs'
	@echo '  make lint   check style and formatting'
	@echo '  make lock   resolve requirements.lock anew; ARGS=--upgrade'
	@echo '  make clean  remove the demo output and caches, keep .venv'
	@echo
	@echo 'The first one installs into .venv (once, 2 to 5 minutes, about 6 GB).'
	@echo 'PYTHON=python3.12 picks the interpreter, 3.10 or newer.'

demo: $(INSTALLED)
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash demo/run.sh $(ARGS)

gallery: $(INSTALLED)
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash demo/run.sh --gallery $(ARGS)

app: $(INSTALLED)
	@$(BIN)/python demo/app.py $(ARGS)

compare: $(INSTALLED)
	@$(BIN)/python -m demo.compare --data $(DATA) $(ARGS)

test: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

soak: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.soak $(ARGS)

gpu: $(INSTALLED)
	@$(BIN)/python -m benchmarks.run $(ARGS)

bench: $(INSTALLED)
	@$(BIN)/python -m benchmarks.run --device cpu $(ARGS)

docs: $(INSTALLED)
	@$(BIN)/sphinx-build -E -a -W --keep-going -q -b html -c docs -d output/docs/.doctrees . output/docs
	@echo '== output/docs/index.html'

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

lock: $(INSTALLED)
	@$(BIN)/python -m pip install --quiet uv
	@$(BIN)/python -m uv pip compile --universal --python-version 3.10 --all-extras --no-annotate \
	    --quiet --custom-compile-command 'make lock' --output-file requirements.lock $(ARGS) \
	    pyproject.toml >/dev/null
	@git --no-pager diff --stat -- requirements.lock

clean:
	@rm -rf output/demo output/demo-* output/gallery output/gallery-* output/docs .pytest_cache .ruff_cache .hypothesis build *.egg-info
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# pip's own output goes to a log; what is shown is the large downloads, so that a wait has a
# reason. The stamp is written last: an interrupted installation is taken up again.
LARGE_DOWNLOADS = /^ *(Downloading|Using cached) .*\(([0-9.]+ GB|[0-9][0-9]+\.[0-9]+ MB)\)/ \
	{ sub(/-(cp|py)[0-9].*/, "", $$2); print "  " $$2, $$(NF-1), $$NF; fflush() } \
	/^Installing collected/ { print "  unpacking"; fflush() }

$(INSTALLED): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'error: Python 3.10 or newer is needed, and $(PYTHON) is not;' \
	    'name one: make $(MAKECMDGOALS) PYTHON=python3.12' >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo 'error: $(PYTHON) cannot make virtual environments; on Debian or Ubuntu:' \
	    'apt install python3-venv' >&2; exit 1; }
	@echo '== Installing into $(VENV), once: 2 to 5 minutes, about 6 GB (log: $(VENV)/install.log)'
	@$(BIN)/python -m pip install --disable-pip-version-check --no-input \
	    -c requirements.lock -e '.[demo,app,diffusers,wandb,trackio,parquet,docs,dev]' 2>&1 | tee $(VENV)/install.log \
	  | awk '$(LARGE_DOWNLOADS)' || { tail -n 15 $(VENV)/install.log >&2; exit 1; }
	@touch $@
	@echo '== Installed'
