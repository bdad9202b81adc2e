# Everything in a virtual environment of its own; nothing else is touched.
# TORCH: what pip installs, e.g. `make test TORCH=torch==2.12.0`. PYTHON: 3.10 or newer.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test lint bench clean

demo: $(VENV)/.demo
	$(BIN)/python -m dither demo

# In the order of names, not of numbers of tests: the files that take longest have few, and would come last.
test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

bench: $(VENV)/.test
	$(BIN)/python -m dither bench

lint: $(VENV)/.test
	$(BIN)/python -m pip install -q ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5
	$(BIN)/clang-format --dry-run -Werror $(shell find csrc -type f)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

SOURCES = pyproject.toml setup.py CMakeLists.txt $(shell find csrc python -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py')

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q "$(TORCH)" numpy
	touch $@

# Without isolation the tools stay where they are, and the next build compiles what has changed. build/lib* may hold what is gone.
$(VENV)/.dither: $(VENV)/.torch $(SOURCES)
	@echo "building the kernels: minutes the first time, more of them where nvcc is found"
	$(BIN)/python -m pip install -q "setuptools>=77" pybind11 cmake ninja
	rm -rf build/lib* $(VENV)/wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w $(VENV)/wheel .
	$(BIN)/python -m pip install -q --no-deps --force-reinstall $(VENV)/wheel/*.whl
	touch $@

$(VENV)/.demo: $(VENV)/.dither
	$(BIN)/python -m pip install -q "$$(echo $(VENV)/wheel/*.whl)[demo]"
	touch $@

$(VENV)/.test: $(VENV)/.dither
	$(BIN)/python -m pip install -q "$$(echo $(VENV)/wheel/*.whl)[demo,test,oracles]"
	$(BIN)/python -m pip install -q --no-deps k-diffusion==0.1.1.post1 smalldiffusion==0.5.0 # tests load single files of them
	touch $@

clean:
	rm -rf $(VENV) build dist dither-demo
