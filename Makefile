# Needs CPython >= 3.10 with pip and make; everything else is installed into .venv, again only after pyproject.toml has changed.
PYTHON ?= python3
CONFIG ?= lcm_ddil.yaml
ARGS ?=
JOBS ?= 2
# of lcm_ddil.yaml's 720 updates: as good in 4 and 2 steps, and the table is there in little more than half the time
FEW := --updates 400 model.ema=0.985

BIN := .venv/bin
READY := .venv/.ready
DOCS_READY := .venv/.docs-ready

.DEFAULT_GOAL := help
.PHONY: help fit test test-floor lint docs reproduce format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  Options: make fit CONFIG=lcm.yaml ARGS='--updates 100 --seed 1';  make test JOBS=0 ARGS='tests/test_report.py -x --pdb'"

fit: $(READY) ## install, then train a few-step student of the built-in pipeline (CONFIG, ARGS)
	$(BIN)/ddil-fit --config $(CONFIG) $(if $(filter lcm_ddil.yaml,$(CONFIG)),$(FEW)) $(ARGS)

test: $(READY) ## install, then run the tests, JOBS files at a time (ARGS, JOBS)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-floor: ## install the oldest libraries that pyproject.toml allows in .venv-floor (7 GB), then run the tests
	@test -x .venv-floor/bin/python || $(PYTHON) -m venv .venv-floor
	@.venv-floor/bin/python tests/support/oldest.py > .venv-floor/floors.txt
	@.venv-floor/bin/python -m pip install --quiet --editable '.[dev]' --constraint .venv-floor/floors.txt
	.venv-floor/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(READY) ## check style and types
	$(BIN)/python -m ruff check
	$(BIN)/python -m mypy

# not --quiet: warnings would neither be shown nor counted
docs: $(DOCS_READY) ## install mkdocs, then build the site of README.md, docs/ and the docstrings in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo 'built: site/index.html'

reproduce: $(READY) ## make the missing cells of the reproduction table (hours) and docs/reproduction.md (ARGS, JOBS)
	$(BIN)/python benchmarks/reproduce.py --jobs $(JOBS) --page docs/reproduction.md $(ARGS)

format: $(READY) ## sort imports and format the code
	$(BIN)/python -m ruff check --fix
	$(BIN)/python -m ruff format

clean: ## remove caches and built packages; .venv and runs/ stay
	rm -rf build dist site .pytest_cache .ruff_cache .mypy_cache
	find src tests benchmarks notebooks docs -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("ddil-lightning needs Python 3.10 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
	@echo 'installing into .venv; the first time this takes some minutes, PyTorch is large'
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

$(DOCS_READY): $(READY)
	@$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@
