# `make help` lists the targets. The only requirement is Python >= 3.11 with ensurepip.

PYTHON ?= python3
# For `make gpu-kit`: the studies, the folder to write, and the packages that the other machine lacks.
STUDIES = hovit
KIT = dist/gpu-kit
MISSING = pydantic pydantic-core annotated-types typing-inspection lightning-fabric lightning-utilities timm
# Options of `make tables`. Assigned here so that only the command line sets them, not the environment.
SCALE =
DATA =
# The study of `make table`.
T =

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup tables table quick page paper claims test test-all lint format lock dag gpu-kit clean

MIN_PYTHON = $(shell sed -n 's/^requires-python = ">=\(.*\)"/\1/p' pyproject.toml)
IN_VENV = PATH="$(CURDIR)/.venv/bin:$$PATH"
CONFIG = $(if $(SCALE)$(DATA), --config$(if $(SCALE), scale=$(SCALE))$(if $(DATA), "data_root=$(DATA)"))
COMPILE = .venv/bin/uv pip compile --quiet --universal --python-version $(MIN_PYTHON) --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-header $(if $(UPGRADE),--upgrade)

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-8s %s\n", $$1, $$2}' Makefile

setup: .venv/.synced ## Create .venv from the hash-checked lock files in envs/

.venv/.synced: envs/bootstrap.lock envs/requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(MIN_PYTHON)".split("."))))' 2>/dev/null || \
		{ echo 'hovit needs Python >= $(MIN_PYTHON), but "$(PYTHON)" is older or missing: run make setup PYTHON=...' >&2; exit 1; }
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv >/dev/null || \
		{ echo 'hovit needs a Python with venv and ensurepip (on Debian: install python3-venv)' >&2; exit 1; }
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r envs/bootstrap.lock
	.venv/bin/uv pip sync --python .venv/bin/python --require-hashes --compile-bytecode envs/requirements.lock
	.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --offline -e .
	@touch $@

tables: setup ## Train and measure everything; write all tables, figures, claims and the page; SCALE=mini and DATA=../shared/data are optional
	$(IN_VENV) snakemake --cores all results/tables$(CONFIG)

table: setup ## Run one study and write its table: make table T=hovit
	@test -n "$(T)" || { echo 'make table: name a study, as in make table T=hovit (hovit list shows all)' >&2; exit 1; }
	$(IN_VENV) snakemake --cores all "results/tables/$(T).md"$(CONFIG)

quick: setup ## Verify the committed records and write all reports from them, without training
	$(IN_VENV) hovit evidence verify
	$(IN_VENV) hovit report$(if $(SCALE), --scale $(SCALE))

page: setup ## Write results/index.html: all claims, tables, figures and records on one page
	$(IN_VENV) snakemake --cores all page$(CONFIG)

paper: setup ## Compile paper/paper.pdf with its tables and figures
	$(IN_VENV) snakemake --cores all paper/paper.pdf$(CONFIG)

claims: setup ## Check the claims; fail if a verdict differs from results/verdicts.json
	$(IN_VENV) snakemake --cores all claims$(CONFIG)

test: lint ## Lint, then run the tests; list the slowest tests and the reasons for skips
	$(IN_VENV) pytest -n 2 --dist loadgroup -rs --durations 15

test-all: lint ## As `make test`, plus the tests that run on every registered model
	$(IN_VENV) pytest -n 2 --dist loadgroup -rs -m ""

lint: setup ## Check style, types and the rules
	$(IN_VENV) ruff check
	$(IN_VENV) ruff format --check
	$(IN_VENV) mypy
	$(IN_VENV) snakefmt --check Snakefile rules
	$(IN_VENV) snakemake --lint

format: setup ## Format the code and the rules
	$(IN_VENV) ruff check --fix --exit-zero
	$(IN_VENV) ruff format
	$(IN_VENV) snakefmt Snakefile rules

lock: setup ## Compile the lock files from pyproject.toml again; UPGRADE=1 takes newer versions
	$(COMPILE) pyproject.toml --extra artifact --group dev -o envs/requirements.lock
	grep -oE '^uv==[^ ]+' envs/requirements.lock | $(COMPILE) - -o envs/bootstrap.lock
	sed -i -E 's/python=[0-9.]+/python=$(MIN_PYTHON)/' envs/environment.yaml
	sed -i -E 's/^FROM python:[0-9.]+/FROM python:$(MIN_PYTHON)/' envs/Containerfile

dag: setup ## Print the graph of rules as Mermaid
	@$(IN_VENV) snakemake --rulegraph mermaid-js results/tables$(CONFIG)

# PYTHON is the version of the other machine here, not the interpreter for `make setup`.
gpu-kit: KIT_PYTHON := $(if $(filter command,$(firstword $(origin PYTHON))),$(PYTHON))
gpu-kit: override PYTHON := python3
gpu-kit: setup ## Write a folder for a GPU machine without network; STUDIES="hovit launcher", SCALE, DATA, PYTHON=3.12, MISSING
	$(IN_VENV) python -m hovit kit $(KIT) $(STUDIES:%=--study %) --scale $(or $(SCALE),proxy)\
		$(if $(DATA),--data-root "$(DATA)") $(if $(KIT_PYTHON),--python $(KIT_PYTHON) $(MISSING:%=--package %))

clean: ## Remove tables, claims, page, metrics, figures and logs; keep runs, evidence and data
	rm -rf results/tables results/metrics results/claims.* results/index.html figures/*.pdf figures/*.png logs
