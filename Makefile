# make demo    sets everything up and trains a real model on this machine
# make test    sets up whatever is missing and passes the tests
# make install the shared set-up step: .venv in the checkout, nothing outside it
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
EXTENSION := kernels/_C.so
OPINIONS := $(VENV)/second-opinion/.installed
MODEL := models/smollm2-135m/config.json

.PHONY: install demo test test-parts test-whole lint sanitize verify-matrix fault-table bench gpu-regression clean
install: $(EXTENSION) $(MODEL)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "zerokl needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.locked: requirements/torch.txt requirements/cpu.txt | $(BIN)/python
	@echo "installing the pinned environment into $(VENV) (about 3.5 GB, a few minutes)"
	$(PIP) -r requirements/torch.txt
	$(PIP) --no-deps -r requirements/cpu.txt
	@touch $@

$(EXTENSION): $(VENV)/.locked setup.py pyproject.toml CMakeLists.txt kernels/contract.py $(wildcard kernels/cpu/* kernels/cuda/*)
	@echo "building the compiled operators"
	$(PIP) --no-build-isolation --no-deps -e .
	@touch $@

$(OPINIONS): requirements/second-opinion.txt | $(VENV)/.locked
	$(PIP) --no-deps --target $(VENV)/second-opinion --upgrade -r requirements/second-opinion.txt
	@touch $@

$(MODEL): | $(EXTENSION)
	$(BIN)/zerokl model fetch smollm2-135m --out models/smollm2-135m

demo: install
	$(BIN)/zerokl train recipes/demo.toml

# two halves beside each other, of about the same length
test: install $(OPINIONS) lint
	$(MAKE) --jobs=2 --output-sync=target test-parts test-whole

test-parts: sanitize
	$(BIN)/python -m pytest --durations=25 tests --ignore=tests/e2e

test-whole: install
	$(BIN)/python -m pytest --durations=25 tests/e2e

lint: $(EXTENSION)
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet
	$(BIN)/mypy --no-error-summary

# the kernels' own tests on a build with address and undefined-behaviour sanitizers
SANITIZED := build/sanitize/zerokl
sanitize: install
	@mkdir -p $(SANITIZED) && cp zerokl/__init__.py $(SANITIZED)/ && cp -r kernels $(SANITIZED)/ && rm -f $(SANITIZED)/kernels/_C.so
	@$(BIN)/cmake -S . -B build/sanitize/cmake -DZEROKL_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -DZEROKL_OUTPUT_DIR=$(abspath $(SANITIZED)/kernels) -DZEROKL_OUTPUT_NAME=_C >/dev/null
	@$(BIN)/cmake --build build/sanitize/cmake --parallel $$(nproc) >/dev/null
	PYTHONPATH=build/sanitize LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 $(BIN)/python -m pytest -q -p no:cacheprovider tests/kernels --ignore=tests/kernels/triton -k "$(SANITIZED_TESTS)"
SANITIZED_TESTS := linear or embedding or norm or rotary or silu or (varlen and avx512-) or logprob or sample or neighbours or test_moe or quantize

# every parallel layout of Megatron scores the same tokens: one table, 0 mismatched in each row
verify-matrix: install
	$(BIN)/python -m zerokl.bench.layouts

bench: install
	$(BIN)/python -m pytest -q bench/kernels
	$(BIN)/python -m zerokl.bench.linear_speed
	$(BIN)/python -m zerokl.bench.collective_speed
	$(BIN)/python -m zerokl.bench.megatron_speed
	$(BIN)/python -m zerokl.bench.sglang_speed

# every fault a transfer of weights is put through: phase, witness that it happened, seconds, outcome
fault-table: install
	$(BIN)/python -m pytest -q --fault-table tests/weightsync

# on a GPU machine: needs torch with CUDA, triton, cmake and a C++ compiler (with nvcc: the CUDA part), nothing installed
GPU_BUILD := build/gpu
gpu-regression:
	cmake -S . -B $(GPU_BUILD) -DPython_EXECUTABLE=$$(command -v $(PYTHON)) -DZEROKL_OUTPUT_DIR=$(CURDIR)/kernels \
	  -DZEROKL_OUTPUT_NAME=_C -DCMAKE_BUILD_TYPE=Release >/dev/null
	cmake --build $(GPU_BUILD) --parallel $$(nproc) >/dev/null
	$(PYTHON) -m zerokl.bench.gpu_regression $(ARGS)

clean:
	rm -rf build $(EXTENSION) *.egg-info
