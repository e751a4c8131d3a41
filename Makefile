# Every target sets up what it needs: a machine with python3 (>= 3.10, with venv) and make is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CLONE ?= ../lightly
SOLO_LEARN_DIR ?= ../solo-learn
METRIC_LEARNING_DIR ?= ../pytorch-metric-learning
NEIGHBOURS := .venv-neighbours

help: ## Show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/.demo ## Pretrain on scikit-learn's digits: MoCo and SANE with a figure; labels from the other half of each image
	$(BIN)/python examples/compare.py
	$(BIN)/python examples/views.py --only "upper half" --methods "labels from the other views"

# The oldest and the newest of what is supported, and the Python of CI between them; "newest" is what pip finds.
MATRIX ?= 3.10:2.4.0 3.11:newest 3.13:newest

matrix: $(VENV)/.dev ## Run the tests on the built wheel with each PYTHON:TORCH of MATRIX (TESTS=... for some of them)
	TESTS="$(TESTS)" .ci/matrix $(MATRIX)

# A process loads torch and some frameworks, 1 GB each; tests/conftest.py gives each of several one thread.
WORKERS ?= 2

test: $(VENV)/.dev ## Run the tests, in WORKERS=2 processes
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-lightly: $(VENV)/.dev ## Run lightly's own loss tests and benchmark script with ours (CLONE=a clone of its repository)
	PYTHONPATH=.ci $(BIN)/python -m pytest -p lightly_substitute -W default --rootdir $(CLONE) $(CLONE)/tests/loss/test_ntx_ent_loss.py
	LIGHTLY_DIR=$(CLONE) $(BIN)/python -m pytest tests/test_lightly_clone.py

test-solo: $(VENV)/.dev ## Run SANE in solo-learn's own scripts (SOLO_LEARN_DIR=a clone of its repository)
	SOLO_LEARN_DIR=$(SOLO_LEARN_DIR) $(BIN)/python -m pytest tests/test_solo_learn.py tests/test_solo_learn_clone.py

test-neighbours: $(NEIGHBOURS)/.ready ## Run pytorch-metric-learning's (METRIC_LEARNING_DIR=a clone) and stable-pretraining's own tests with our losses
	PYTHONPATH=.ci TEST_DEVICE=cpu $(NEIGHBOURS)/bin/python -m pytest -p metric_learning_substitute -W default --rootdir $(METRIC_LEARNING_DIR) $(METRIC_LEARNING_DIR)/tests/losses/test_self_supervised_loss.py
	PYTHONPATH=.ci SPT_CACHE_DIR=$(abspath $(NEIGHBOURS))/cache $(NEIGHBOURS)/bin/python -m pytest -p stable_pretraining_substitute -o addopts= -W default --pyargs stable_pretraining.tests.regression.test_methods
	$(NEIGHBOURS)/bin/python -m pytest tests/test_pytorch_metric_learning.py tests/test_stable_pretraining.py tests/test_sentence_transformers.py tests/test_open_clip.py tests/test_neighbours.py tests/test_pages.py tests/test_swaps.py

upstream: $(VENV)/.dev $(NEIGHBOURS)/.ready ## Apply upstream/*.patch to fresh clones and run their tests (CLONES=a folder of clones, PROJECTS="lightly" for some)
	VENV=$(VENV) NEIGHBOURS=$(NEIGHBOURS) CLONES=$(CLONES) .ci/upstream $(PROJECTS)

docs: $(VENV)/.dev ## Build the documentation into docs/_build/html, offline; a warning or a link that leads nowhere fails
	$(BIN)/sphinx-build -W --keep-going -n -q -b html docs docs/_build/html

lint: $(VENV)/.dev ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/.dev ## Measure time and memory of the loss beside its peers, print a table
	$(BIN)/python -m benchmarks loss

wheel: $(VENV)/.dev ## Build and check sdist and wheel into dist/
	rm -rf dist build
	$(BIN)/python -m build -q
	$(BIN)/twine check --strict dist/*

clean: ## Remove the environments and everything built
	rm -rf $(VENV) $(NEIGHBOURS) build dist docs/_build docs/_generated docs/api docs/gallery outputs *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# What .dev installs holds what .demo does.
$(VENV)/.demo: pyproject.toml setup.cfg
	test $(VENV)/.dev -nt pyproject.toml || ( $(PYTHON) -m venv $(VENV) && $(BIN)/pip install --quiet --upgrade pip \
		&& $(BIN)/pip install --quiet --editable ".[demo]" )
	touch $@

$(VENV)/.dev: pyproject.toml setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

# An environment of its own: these frameworks bring some hundred packages, and developing needs none of them.
$(NEIGHBOURS)/.ready: pyproject.toml setup.cfg
	$(PYTHON) -m venv $(NEIGHBOURS)
	$(NEIGHBOURS)/bin/pip install --quiet --upgrade pip
	$(NEIGHBOURS)/bin/pip install --quiet --editable ".[lightly,metric-learning,stable-pretraining,sentence-transformers,open-clip]" pytest accelerate selfeeg
	touch $@

.PHONY: help demo matrix test test-lightly test-solo test-neighbours upstream docs lint bench wheel clean
.DEFAULT_GOAL := help
