# Every target sets up .venv by itself and needs Python, a C++ compiler and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# What an installed .venv depends on: Python files are used where they lie.
SOURCES := Makefile pyproject.toml CMakeLists.txt constraints.txt $(wildcard csrc/*)
BENCH_MODEL := build/bench/llama-1.1b-q4_k_m.gguf

.PHONY: demo test test-slow test-all asan lint bench pack clean help

help: ## List the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

demo: $(VENV)/.demo ## Answer prompts without and with steering, on the default model.
	$(BIN)/pysteer demo

test: $(VENV)/.dev ## Run the tests.
	$(BIN)/pytest -m "not slow"

test-slow: $(VENV)/.dev ## Run the tests that take minutes.
	$(BIN)/pytest -m slow

test-all: test test-slow ## Run all tests.

# A second environment, which sees the packages of the first but has pysteer itself from a wheel; and
# libstdc++ beside the sanitizer, or that does not find the real function that throws. It runs in a
# folder of its own, so that Python does not take the sources for the package.
asan: $(VENV)/.dev ## Run the tests with the native part under AddressSanitizer.
	rm -rf build/asan
	$(BIN)/python -m venv build/asan
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > $$(build/asan/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/first.pth
	build/asan/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --ignore-installed \
	  -C build-dir=build/asan-objects -C cmake.define.PYSTEER_SANITIZE=address .
	cd build/asan && LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) \
	  $$($${CXX:-c++} -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 PYSTEER_EXPECT_SANITIZER=1 \
	  bin/python -m pytest -c ../../pyproject.toml --rootdir ../.. -m "not slow and not torch" ../../tests

lint: $(VENV)/.dev ## Check style, types, formatting, and that the native part compiles without warnings.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror csrc/*
	$(PIP) wheel --quiet --no-deps -w build/strict -C build-dir=build/strict-objects \
	  -C cmake.define.PYSTEER_WERROR=ON .

bench: $(VENV)/.dev $(BENCH_MODEL) ## Measure what steering costs.
	$(BIN)/python tools/bench_hook.py $(BENCH_MODEL)

$(BENCH_MODEL): tools/tiny_models.py | $(VENV)/.dev
	mkdir -p $(@D)
	$(BIN)/python tools/tiny_models.py bench $@ --shape 1.1b --ftype Q4_K_M

pack: $(VENV)/.dev ## Rebuild the pack that ships with the package.
	$(BIN)/python tools/build_demo_pack.py -o pysteer/data/demo.gguf

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(SOURCES) | $(VENV)/bin/python
	$(PIP) install --quiet -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(SOURCES) | $(VENV)/bin/python
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.demo

clean: ## Remove what was built; keep .venv.
	rm -rf build dist
