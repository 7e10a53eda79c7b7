# make book   execute what is stale and render _build/html/index.html
# make test   run the tests
# make lab    open the chapters as notebooks
# Each creates the environment first if there is none, and does nothing twice.

PYTHON ?= python3
VENV ?= .venv
PROFILE ?= quick
JOBS ?= 2

# On Linux the general index serves torch with several GB of CUDA libraries. Where the
# index of CPU builds can be reached it is asked as well; for a GPU see README.md.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
UNFINISHED := $(VENV)/.unfinished
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help book test env lab lint clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile
	@echo "make lint   check style and types of the code, chapter cells included"
	@echo "make clean  remove what builds have made (not the environment)"

book: $(STAMP)
	@$(BIN)/mmsa-book build --profile $(PROFILE) --jobs $(JOBS)

test: $(STAMP)
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

env: $(STAMP)
	@echo "the environment is ready: $(VENV)"

lab: $(STAMP)
	@echo "In the file browser: book/, right-click a chapter, Open With, Notebook"
	@MMSA_DATA="$${MMSA_DATA:-$(CURDIR)/data}" $(BIN)/jupyter lab

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/ty check mmsa_lib
	@$(BIN)/python scripts/lint_chapters.py

clean: $(STAMP)
	@$(BIN)/mmsa-book clean

# The stamp is written last. An installation of ours that was cut short (.unfinished is
# still there), or one whose pip does not run, is begun again in an emptied folder.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; '$(PYTHON)' is" \
	    "$$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12 $(MAKECMDGOALS)"; \
	  exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "This Python cannot create environments: venv or ensurepip is missing." \
	    "On Debian and Ubuntu: apt install python3-venv"; \
	  exit 1; }
	@if [ ! -f $(UNFINISHED) ] && $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  echo "updating $(VENV)"; \
	  rm -f $(STAMP); \
	else \
	  echo "creating $(VENV): about 2 GB, a few minutes"; \
	  $(PYTHON) -m venv --clear $(VENV); \
	fi
	@touch $(UNFINISHED)
	@index=; \
	if [ "$$(uname -s)" = Linux ] && [ -n "$(TORCH_INDEX)" ] && \
	  $(PYTHON) -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1] + "/torch/", timeout=5)' \
	    "$(TORCH_INDEX)" >/dev/null 2>&1; then \
	  index="--extra-index-url $(TORCH_INDEX)"; \
	fi; \
	$(BIN)/python -m pip install $$index -c constraints.txt -e ".[test]"
	@$(BIN)/python -m pip check
	@mv $(UNFINISHED) $(STAMP)
	@touch $(STAMP)
