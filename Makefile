# Two commands to know:   make cook   and   make test
#
#   PROFILE=full make cook                 real data instead of the embedded cohort
#   make cook CHAPTERS="02"                some chapters only
#   make cook TORCH_INDEX=<index url>      PyTorch from another package index (its CPU build, for instance)
#   make cook PIP_ARGS="..."               further options for pip
#   make book                              the book as a web site: build/book/html

PYTHON   ?= python3
VENV     ?= .venv
PROFILE  ?= quick
CHAPTERS ?=
WORKERS  ?= 2
PIP_ARGS ?=
TORCH_INDEX ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
BOOK  := $(VENV)/.installed-book
ENVIRONMENT := OMP_NUM_THREADS=1 MPLBACKEND=Agg

export PROFILE

.PHONY: cook test lint ledger nbval fuzz mutations browser figures check-figures publish book clean

cook: $(STAMP)
	$(BIN)/python -m medcook cook $(CHAPTERS)

test: $(STAMP)
	$(ENVIRONMENT) $(BIN)/python -m pytest -q -n $(WORKERS)

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m medcook check

ledger: $(STAMP)
	$(BIN)/python -m medcook papers

nbval: $(STAMP)
	PROFILE=quick $(BIN)/python -m pytest -q --nbval-lax --nbval-current-env -p no:cacheprovider notebooks/

fuzz: $(STAMP)   # ten thousand damaged files, in processes with bounds on memory and time
	$(ENVIRONMENT) $(BIN)/python tests/fuzz/damaged_files.py --files 10000

mutations: $(STAMP)   # deliberate errors in a copy of the package: does some test notice each?
	$(ENVIRONMENT) $(BIN)/python -m tests.mutations

browser: $(STAMP) book   # as a reader sees it: chapters in JupyterLab and the book, in Chromium; pictures in build/screenshots
	$(BIN)/python -m pip install -q $(PIP_ARGS) -e ".[browser]" -c constraints.txt
	MEDCOOK_BROWSER=1 $(BIN)/python -m pytest -q -p no:xdist tests/browser

figures: $(STAMP)
	$(BIN)/python -m medcook figures

check-figures: $(STAMP)
	$(ENVIRONMENT) $(BIN)/python -m pytest -q tests/notebooks/test_committed_figures.py

publish: $(STAMP)
	PROFILE=full $(BIN)/python -m medcook cook $(CHAPTERS)
	$(BIN)/python -m medcook publish $(CHAPTERS)

book: $(BOOK)   # every chapter, paper and module as a web site in build/book/html; no network once it is installed
	$(BIN)/python -m medcook.book sources build/book/source
	$(ENVIRONMENT) $(BIN)/python -m sphinx -q -W --keep-going -c book -d build/book/doctrees build/book/source build/book/html
	$(BIN)/python -m medcook.book check build/book/html

$(BOOK): $(STAMP)
	$(BIN)/python -m pip install -q $(PIP_ARGS) -e ".[book]" -c constraints.txt
	@touch $@

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "medcook needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is %d.%d: choose another with make PYTHON=python3.12." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install $(PIP_ARGS) torch -c constraints.txt --index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install $(PIP_ARGS) -e ".[dev]" -c constraints.txt
	@touch $@

clean:
	rm -rf $(VENV)
