# Two commands do everything: `make lab` and `make test`. Nothing needs root, Node or a GPU.
#   PYTHON=python3.12    another interpreter (3.11 to 3.13)
#   PIP_ARGS="..."       more arguments for pip, such as an index with CPU-only builds of torch (see README)
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
JOBS ?= 2
BIN := $(VENV)/bin
ROOT_FLAG := $(shell [ "$$(id -u)" = 0 ] && echo --allow-root)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help lab test lint format notebooks claims screenshots readme benchmarks clean

help: ## these lines
	@grep -hE '^[a-z]+:.*##' Makefile | sed 's/:.*##/\t/'

lab: $(VENV)/installed-lab ## install, open JupyterLab on the tour
	$(BIN)/jupyter lab $(ROOT_FLAG) notebooks/00_tour.ipynb

test: $(VENV)/installed-test lint ## unit tests, parity, all lessons, the browser
	$(BIN)/python -m pytest tests -n $(JOBS) --dist loadfile
	$(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=120 -n $(JOBS) --dist loadfile notebooks

lint: $(VENV)/installed-test ## ruff on code and notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed-test ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(VENV)/installed-test ## run all lessons and save them with outputs
	$(BIN)/python notebooks/build.py

claims: $(VENV)/installed-test ## write CLAIMS.md from the saved lessons
	$(BIN)/python -m notebook_kit.jupyter.cli claims notebooks > CLAIMS.md.new && mv CLAIMS.md.new CLAIMS.md

readme: $(VENV)/installed-test ## write the README's table of methods from the catalogue
	$(BIN)/python -m notebook_kit.jupyter.cli readme README.md

screenshots: $(VENV)/installed-test ## a PNG of every widget of every lesson, from the real JupyterLab
	$(BIN)/python -m tests.browser.screenshots

benchmarks: $(VENV)/installed-test ## side by side with the peers, as ratios; wants an idle machine
	for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file; done

clean:
	rm -rf $(VENV) screenshots

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-lab: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install $(PIP_ARGS) -c constraints.txt -e ".[lab]"
	touch $@

$(VENV)/installed-test: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install $(PIP_ARGS) -c constraints.txt -e ".[lab,test,parity,distributed]"
	touch $@ $(VENV)/installed-lab
