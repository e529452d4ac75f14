# Every target sets up .venv by itself. Needed: Python, a C++ compiler and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Prerequisites of an installed .venv. Python files are missing here because they are used in place.
SOURCES := Makefile pyproject.toml CMakeLists.txt constraints.txt $(wildcard csrc/*)
# GCC's build of llama.cpp's AMX kernels crashes (ggml-org/llama.cpp 20824 and 26954): on processors with
# AMX (some servers), llama.cpp is compiled without them.
NO_AMX := $(shell flags="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"; grep -qs amx_int8 /proc/cpuinfo \
  && $${CXX:-c++} $$flags -E -x c /dev/null > /dev/null 2>&1 && echo $$flags)
ifneq ($(NO_AMX),)
export CFLAGS += $(NO_AMX)
export CXXFLAGS += $(NO_AMX)
endif
BENCH_MODEL := build/bench/llama-1.1b-q4_k_m.gguf

.PHONY: demo test test-slow test-all test-devices test-llama test-pythons asan tsan lint bench pack picture clean help

help: ## List the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

demo: $(VENV)/.demo ## Answer prompts without and with steering, on the default model.
	$(BIN)/pysteer demo

# Two processes. Waiting threads sleep, so that neither process takes the other's processor by spinning; threads of
# OpenBLAS always spin, so that NumPy and SciPy get one each.
test: $(VENV)/.dev ## Run the tests.
	OMP_WAIT_POLICY=passive OPENBLAS_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(VENV)/.dev ## Run the tests that take minutes.
	$(BIN)/pytest -m slow

test-all: test test-slow ## Run all tests.

# $(call beside,FOLDER): make an environment that sees the packages of the first.
define beside
rm -rf $(1)
$(BIN)/python -m venv $(1)
$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
  > $$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/first.pth
endef

test-devices: build/devices/.llama $(VENV)/.dev ## Run the tests of steering on models that are split over two RPC servers.
	build/devices/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --ignore-installed \
	  -C build-dir=build/devices-objects .
	cd build/devices && OMP_WAIT_POLICY=passive bin/python -m pytest -c ../../pyproject.toml --rootdir ../.. \
	  --devices rpc -n 2 --dist loadfile -m "not slow" $(addprefix ../../tests/,$(DEVICE_TESTS))
DEVICE_TESTS := devices native runtime engine extract/test_capture.py

# llama.cpp with its RPC backend takes minutes to build, and is kept. pip's cache has a build without.
build/devices/.llama: constraints.txt | $(VENV)/.dev
	$(call beside,build/devices)
	cd build/devices && bin/python -m pip --disable-pip-version-check download --quiet --no-deps \
	  --no-binary llama-cpp-python -c ../../constraints.txt -d source llama-cpp-python
	cd build/devices && CMAKE_ARGS=-DGGML_RPC=ON bin/python -m pip --disable-pip-version-check install --quiet \
	  --no-cache-dir --no-deps --ignore-installed source/llama_cpp_python-*.tar.gz
	cd build/devices/source && tar -xzf llama_cpp_python-*.tar.gz
	cd build/devices && packages=$$(bin/python -c "import sysconfig; print(sysconfig.get_path('platlib'))") && \
	  $${CXX:-c++} -std=c++17 -O2 $(CXXFLAGS) -I$$packages/include source/*/vendor/llama.cpp/tools/rpc/rpc-server.cpp -o bin/ggml-rpc-server \
	  -L$$packages/llama_cpp/lib -lggml -lggml-base -Wl,-rpath,$$packages/llama_cpp/lib
	@touch $@

test-llama: build/llama-$(VERSION)/.llama ## Run the tests with another llama-cpp-python, as in VERSION=0.3.25.
	build/llama-$(VERSION)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --ignore-installed .
	cd build/llama-$(VERSION) && OMP_WAIT_POLICY=passive bin/python -m pytest -c ../../pyproject.toml \
	  --rootdir ../.. -n 2 --dist loadfile -m "not slow" $(addprefix ../../,$(LLAMA_TESTS))
LLAMA_TESTS := tests

build/llama-/.llama:
	@echo "usage: make test-llama VERSION=0.3.25"; exit 2

# Kept, too.
build/llama-%/.llama: | $(VENV)/.dev
	$(call beside,build/llama-$*)
	build/llama-$*/bin/python -m pip --disable-pip-version-check install --no-deps --ignore-installed \
	  llama-cpp-python==$*
	@touch $@

# Without torch. PYENV_VERSION makes all Pythons of pyenv known, where there is pyenv.
test-pythons: ## Run the tests of the native part and of steered models with each of PYTHONS.
	set -e; export PYENV_VERSION="$$(pyenv versions --bare 2> /dev/null | paste -sd: -)"; for python in $(PYTHONS); do \
	  environment=build/$$python; \
	  test -x $$environment/bin/python || $$python -m venv $$environment; \
	  $$environment/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt '.[demo,test]'; \
	  (cd $$environment && OMP_WAIT_POLICY=passive bin/python -m pytest -c ../../pyproject.toml --rootdir ../.. \
	    -n 2 --dist loadfile -m "not slow and not torch" $(addprefix ../../tests/,$(PYTHON_TESTS))); \
	done
PYTHONS := python3.10 python3.12 python3.13
PYTHON_TESTS := llama native runtime/test_steered.py

# $(call sanitized,NAME,LIBRARY,COMMAND,TESTS): run tests with the native part under a sanitizer, in
# - a second environment, which sees the packages of the first and installs pysteer from a wheel;
# - a folder of its own, so that Python does not import pysteer from the sources.
# libstdc++ is preloaded beside the sanitizer, which otherwise does not find the real function that throws.
define sanitized
$(call beside,build/$(2))
build/$(2)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --ignore-installed \
  -C build-dir=build/$(2)-objects -C install.strip=false -C cmake.define.PYSTEER_SANITIZE=$(1) .
cd build/$(2) && $(3) LD_PRELOAD="$$($${CXX:-c++} -print-file-name=lib$(2).so) \
  $$($${CXX:-c++} -print-file-name=libstdc++.so)" PYSTEER_EXPECT_SANITIZER=$(2) \
  bin/python -m pytest -c ../../pyproject.toml --rootdir ../.. $(4)
endef

# A failed allocation is llama.cpp's to report, also under AddressSanitizer.
asan: $(VENV)/.dev ## Run the tests with the native part under AddressSanitizer.
	$(call sanitized,address,asan,env ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1,-m "not slow and not torch" ../../tests)

# Python and llama.cpp are not compiled for ThreadSanitizer: it ignores their accesses and sees their locks.
# It cannot see OpenMP's threads wait for each other, hence one thread. Some kernels randomise the layout of
# memory in ways that ThreadSanitizer does not know; setarch -R turns that off, where allowed. Reports go to
# files, because pytest hides the output of tests that pass.
tsan: $(VENV)/.dev ## Run the tests that use threads with the native part under ThreadSanitizer.
	$(call sanitized,thread,tsan,$$(setarch -R true 2> /dev/null && echo setarch -R) \
	  env OMP_THREAD_LIMIT=1 TSAN_OPTIONS="ignore_noninstrumented_modules=1 log_path=report",-m "not slow" \
	  $(addprefix ../../tests/,engine native/test_abi.py native/test_callback.py \
	    runtime/test_concurrency.py runtime/test_lifecycle.py) \
	  || { cat report.* 2> /dev/null; exit 1; })

lint: $(VENV)/.dev ## Check style, types and formatting; compile the native part with warnings as errors.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror csrc/*
	$(PIP) wheel --quiet --no-deps -w build/strict -C build-dir=build/strict-objects \
	  -C cmake.define.PYSTEER_WERROR=ON .

bench: $(VENV)/.dev $(BENCH_MODEL) ## Measure the cost of steering.
	$(BIN)/python tools/bench_hook.py $(BENCH_MODEL)
	$(BIN)/python tools/bench_runtime.py
	$(BIN)/python tools/bench_runtime.py $(BENCH_MODEL) --rounds 4 --decode 6 --prompt 128

$(BENCH_MODEL): tools/tiny_models.py | $(VENV)/.dev
	mkdir -p $(@D)
	$(BIN)/python tools/tiny_models.py bench $@ --shape 1.1b --ftype Q4_K_M

pack: $(VENV)/.dev ## Rebuild the pack that ships with pysteer; half an hour.
	$(BIN)/pysteer calibrate --unsafe tools/default_pack/unsafe.jsonl --safe tools/default_pack/harmless.jsonl \
	  --benign tools/default_pack/everyday.jsonl --category-steps 10 --max-benign-change 0.01 --max-look-alike 0.15 \
	  --trials 4 --minutes 60 --cache build/pack -o pysteer/data/default.gguf
	cp build/pack/test_unsafe.jsonl pysteer/data/demo_unsafe.jsonl
	cp build/pack/test_safe.jsonl pysteer/data/demo_harmless.jsonl

picture: $(VENV)/.dev ## Draw docs/picture.svg from a run of pysteer.
	$(BIN)/python tools/picture.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(SOURCES) | $(VENV)/bin/python
	$(PIP) install --quiet -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(SOURCES) | $(VENV)/bin/python
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.demo

clean: ## Remove build/ and dist/; keep .venv.
	rm -rf build dist
