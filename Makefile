# Every target sets up what it needs: `make demo` and `make test` work on a fresh clone.
#
#   make demo       run the embedded study (no network, no GPU, minutes) and show its results
#   make test       lint and all quick tests
#   make reproduce  run the published study through DVC (a GPU and the Hub, or local copies)
#   make bench      measure, side by side
#   make help       all targets

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 18

.PHONY: venv
venv: $(STAMP) ## Make the virtual environment with the pinned versions

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: found $$($(PYTHON) --version), Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo 'Installing the pinned versions into $(VENV): gigabytes and some minutes, this once'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

.PHONY: demo
demo: $(STAMP) ## Run the embedded study end to end and show its results
	$(BIN)/snakemake --directory demo --cores all --resources gpu=0
	$(BIN)/bwsk show demo

# A process of tests for each core (at most four), each of one thread (tests/conftest.py); a file's tests stay together.
PYTEST := python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: test
test: lint ## Lint and all quick tests
	$(BIN)/$(PYTEST) -m "not slow and not faults"

.PHONY: test-slow
test-slow: $(STAMP) ## The tests that take minutes each
	$(BIN)/$(PYTEST) -m slow

.PHONY: test-faults
test-faults: $(STAMP) ## The full fault-injection suite: kills, bad input, determinism (at most 20 minutes)
	$(BIN)/$(PYTEST) -m faults tests/faults

# All requirements of pyproject.toml, its extras included, one a line.
REQUIREMENTS := import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
  print(*p["dependencies"], *(one for extra in p["optional-dependencies"].values() for one in extra), sep="\n")

.PHONY: test-lowest test-newest
test-lowest: CHANGE := s/>=/==/
test-lowest: ## All quick tests with the lowest versions that pyproject.toml admits, in an environment of their own
test-newest: CHANGE := s/>=.*//
test-newest: ## All quick tests with the newest released versions, in an environment of their own
test-lowest test-newest: test-%:
	@echo 'Installing the $* versions into .venv-$*: gigabytes and some minutes'
	$(PYTHON) -m venv --upgrade-deps .venv-$*
	$(PYTHON) -c '$(REQUIREMENTS)' | sed '$(CHANGE)' > .venv-$*/requirements.txt
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -r .venv-$*/requirements.txt
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	.venv-$*/bin/$(PYTEST) -m "not slow and not faults or versions"; status=$$?; .venv-$*/bin/python --version; \
	  .venv-$*/bin/python -m pip freeze | grep -iE '^(torch|transformers|huggingface.hub|snakemake|dvc)=='; exit $$status

.PHONY: lint
lint: $(STAMP) ## ruff, mypy, snakefmt, snakemake --lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile workflow/rules
	$(BIN)/snakemake --lint

.PHONY: format
format: $(STAMP) ## Format Python and Snakemake files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile workflow/rules

.PHONY: reproduce
reproduce: $(STAMP) ## The published study through DVC, after a look at the machine
	$(BIN)/bwsk doctor
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/dvc repro
	$(BIN)/bwsk show

STUDY ?= .
.PHONY: restore
restore: $(STAMP) ## Pull a study's results (STUDY=DIR) and tell Snakemake that they are up to date
	$(BIN)/bwsk restore $(STUDY)

.PHONY: test-dvc
test-dvc: $(STAMP) ## The tests of versioning: git, DVC, Snakemake and remotes, all real
	$(BIN)/python -m pytest tests/workflow -k dvc

.PHONY: bench
bench: $(STAMP) ## Measure steps, evaluation and memory side by side, into build/bench (BENCH=… for options of bench/run.py)
	$(BIN)/python bench/run.py build/bench $(BENCH)
	$(BIN)/python bench/memory.py --json build/bench/memory.json
	$(BIN)/python bench/growth.py build/bench
	$(BIN)/python bench/workflow.py build/bench

.PHONY: schema
schema: $(STAMP) ## Generate what is generated: the schema of params.yaml, DVC's stages of both studies
	$(BIN)/bwsk schema --out workflow/schemas/params.schema.json
	$(BIN)/bwsk stages .
	$(BIN)/bwsk stages demo

.PHONY: lock
lock: ## Pin the newest versions that pyproject.toml admits, in a new environment
	rm -rf $(VENV)-lock && $(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet -e '.[study,dev]'
	{ sed -n '/^#/p' requirements.lock; $(VENV)-lock/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > requirements.new
	mv requirements.new requirements.lock && rm -rf $(VENV)-lock

.PHONY: clean
clean: ## Remove what the demo made
	rm -rf demo/build demo/results demo/.snakemake
