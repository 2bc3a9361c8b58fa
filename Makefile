# make demo   sets everything up, asks the models that are there, fine-tunes the tiny one, writes a page of pictures
# make demo-scratch   sets everything up, trains the tiny model from scratch, evaluates it, writes overlays
# make test   sets everything up, runs the tests
# make test-all   the same, and the slow tests, which run the commands of README.md
PYTHON ?= python3.11
VENV ?= .venv
TORCH ?= 2.13.0
BIN := $(VENV)/bin
CORE := $(VENV)/.mimo-core
MEDICAL := $(VENV)/.mimo-medical
DEV := $(VENV)/.mimo-dev

.PHONY: demo demo-scratch test test-all lint clean

demo: $(MEDICAL)
	$(BIN)/python launch/demo.py

demo-scratch: $(CORE)
	$(BIN)/python launch/demo_scratch.py

test: $(DEV)
	$(BIN)/python -m pytest $(ARGS)

test-all: $(DEV)
	$(BIN)/python -m pytest -m "" $(ARGS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/shellcheck launch/*.sh launch/*/*.sh

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .jax_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(CORE): setup.py pyproject.toml | $(BIN)/python
	@echo "installing mimo_jax into $(VENV): a few minutes, once"
	$(BIN)/python -m pip install -q -e .
	@touch $@

# The readers of DICOM files, and the real images that come with them.
$(MEDICAL): $(CORE)
	$(BIN)/python -m pip install -q -e ".[medical]"
	@touch $@

# torch first, a build without CUDA where one is at hand: whatever asks for it afterwards finds it there.
$(DEV): $(CORE)
	@echo "installing what the tests need into $(VENV): a few minutes, once"
	$(BIN)/python -m pip install -q "torch==$(TORCH)+cpu" 2>/dev/null || $(BIN)/python -m pip install -q "torch==$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[dev,convert,medical]"
	$(BIN)/python -m pip install -q --no-deps segment-anything==1.0
	@touch $@
