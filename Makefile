# Each target builds what it needs from nothing: the environment in $(VENV) when it is missing, or when
# pyproject.toml or constraints.txt has changed, and then does its job.
#
#   make quickstart          two teachers in two layouts teach a small student exercises, on 4 CPU ranks (about 6 minutes)
#   make docstrings          the same on docstring -> function pairs, scored by likelihood (about 6 minutes)
#   make cross-tokenizer     learn from a teacher with another tokenizer, alone and in a pair (longer than the quickstart)
#   make shared-tokenizer    TIDAL along each of its axes, with and without CompDemo (longer than the quickstart)
#   make test                all tests but the slow ones
#   make check               format, lint, strict types, layer contract, house rules
#   make test-slurm          `tide submit` on a real SLURM of four nodes on this machine (about 2 minutes; Debian, root)
#   make preempt-test        preempt a run 20 times on that SLURM: is anything lost? (about 10 minutes)
#   make kill-test           kill a run 100 times: is anything lost? (about 25 minutes)
#   make chaos               40 faults of twelve kinds in runs: is each noticed, told, recovered from? (20 minutes; root)
#   make chaos-sample        three of them in one run (about 45 seconds)
#   make gpu-rehearse        the GPU check in small, on a CPU (about a minute; `make test` makes it too)
#   make gpu-assets          what the GPU check needs, made on a CPU machine: .gpu/ (about 5 minutes)
#   make gpu-check           what CUDA has to prove, on a machine with a GPU and .gpu/ (at most 8 minutes)
#   make gpu-bench           whole steps at the paper's sizes against the reference's way, on a GPU (at most 5 minutes)
#   make faults              spoil the code on purpose in a copy: do the tests notice? (about 6 minutes)
#
# Variables: PYTHON (interpreter to build with), VENV, TORCH (what to install as torch), TORCH_INDEX (where the CPU
# build of torch is looked for when the configured index does not offer it); GPU_PACK (a folder of packages for a GPU
# machine without a network, or empty: `make gpu-check` and `make gpu-bench` then build their environment from its
# index), GPU_PYTHON (the interpreter that holds a CUDA build of torch there), GPU_OUT (where results go).

FLAGS ?=
PYTHON ?= python3
PYTHON312 ?= python3.12
VENV ?= .venv
GPU_PACK ?=
GPU_PYTHON ?= python3
GPU_OUT ?= .gpu-results
TORCH ?= torch==2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
BUILT = $(VENV)/.built
SOURCES = tide_megatron tools examples tests

.PHONY: help quickstart quickstart-full quickstart-models \
  docstrings docstrings-full docstrings-models \
  cross-tokenizer cross-tokenizer-full cross-models shared-tokenizer shared-tokenizer-full \
  gpu-assets gpu-check gpu-bench gpu-rehearse test test-ranks test-unit test-all test-312 test-slurm preempt-test \
  check faults kill-test chaos chaos-sample format environment clean

help:
	@sed -n 's/^#   //p' Makefile

environment: $(BUILT)

$(BUILT): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 10) else 'PYTHON must be 3.10 or newer')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt "$(TORCH)" || { \
	  echo "the configured index has no $(TORCH); trying $(TORCH_INDEX)"; \
	  $(PIP) install -q -c constraints.txt --extra-index-url $(TORCH_INDEX) "$(TORCH)"; }
	$(PIP) install -q -c constraints.txt -e ".[dev]"
	touch $(BUILT)

quickstart: $(BUILT)
	$(BIN)/python examples/exercises/run.py

quickstart-full: $(BUILT)
	$(BIN)/python examples/exercises/run.py --full

quickstart-models: $(BUILT)
	$(BIN)/python examples/exercises/make_models.py

docstrings: $(BUILT)
	$(BIN)/python examples/quickstart/run.py

docstrings-full: $(BUILT)
	$(BIN)/python examples/quickstart/run.py --full

docstrings-models: $(BUILT)
	$(BIN)/python examples/quickstart/make_models.py

cross-tokenizer: $(BUILT)
	$(BIN)/python examples/cross_tokenizer/run.py

cross-tokenizer-full: $(BUILT)
	$(BIN)/python examples/cross_tokenizer/run.py --full

shared-tokenizer: $(BUILT)
	$(BIN)/python examples/shared_tokenizer/run.py

shared-tokenizer-full: $(BUILT)
	$(BIN)/python examples/shared_tokenizer/run.py --full

cross-models: $(BUILT)
	$(BIN)/python examples/cross_tokenizer/make_models.py

# Tests of several ranks mostly wait, and unit tests use one core: side by side they take the longer one's time.
# FLAGS go to both, as in `make test FLAGS=--durations=40`.
test: $(BUILT)
	$(MAKE) --no-print-directory -j2 --output-sync=target test-ranks test-unit

test-ranks: $(BUILT)
	$(BIN)/python -m pytest -m "not slow and not slurm" $(FLAGS) tests/parallel

test-unit: $(BUILT)
	$(BIN)/python -m pytest -m "not slow and not slurm" $(FLAGS) --ignore=tests/parallel

test-all: $(BUILT)
	$(BIN)/python -m pytest

# The same tests on Python >= 3.12, where pip finds the newer megatron-core.
test-312:
	$(MAKE) --no-print-directory test PYTHON=$(PYTHON312) VENV=.venv-312

check: $(BUILT)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry tide_megatron
	$(BIN)/deptry tools tests $(wildcard examples/*) --ignore DEP002,DEP004
	$(BIN)/python -m pytest -q tests/unit/test_house.py

# SLURM's packages are installed where that can be done; elsewhere the tests are skipped and say why.
SLURM_PACKAGES = slurmctld slurmd slurm-client munge iproute2
SLURM_HERE = @{ test -x /usr/sbin/slurmctld && test -x /usr/sbin/slurmd && test -x /usr/sbin/munged; } || \
  { [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; } || \
  apt-get install -y --no-install-recommends $(SLURM_PACKAGES) || \
  echo "SLURM cannot be installed here: what needs it is skipped, and says so"

test-slurm: $(BUILT)
	$(SLURM_HERE)
	$(BIN)/python -m pytest -m slurm $(FLAGS) tests/slurm

preempt-test: $(BUILT)
	$(SLURM_HERE)
	$(BIN)/python tools/preempt_test.py

kill-test: $(BUILT)
	$(BIN)/python tools/kill_test.py

chaos: $(BUILT)
	$(BIN)/python tools/chaos.py

chaos-sample: $(BUILT)
	$(BIN)/python -m pytest -q tests/parallel/test_chaos.py

gpu-rehearse: $(BUILT)
	PYTHONPATH=.:tools $(BIN)/python -m gpu_check --rehearse --out $(GPU_OUT)

gpu-assets: $(BUILT)
	PYTHONPATH=.:tools $(BIN)/python -m gpu_check.assets --out .gpu $(if $(GPU_PACK),--pack "$(GPU_PACK)")

# With a pack nothing is installed; without one the environment is built with torch as the index has it.
gpu-check: GPU_PROGRAM = -m gpu_check --out "$(GPU_OUT)"
gpu-bench: GPU_PROGRAM = tools/bench/gpu_step.py --json --out "$(GPU_OUT)/bench"
gpu-check gpu-bench:
	@if [ -d .gpu/pack ]; then PYTHONPATH=.:tools $(GPU_PYTHON) $(GPU_PROGRAM); else \
	  $(MAKE) --no-print-directory environment TORCH="torch>=2.11" && \
	  PYTHONPATH=.:tools $(BIN)/python $(GPU_PROGRAM); fi

faults: $(BUILT)
	$(BIN)/python tools/planted_faults.py

format: $(BUILT)
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-312 build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
