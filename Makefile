PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
# Where installing finished; any change of the project's files installs again.
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $(CONSTRAINTS:%=-c %)
# Four on two cores too: tests of processes and of signals wait much.
PYTEST := $(BIN)/python -m pytest -n 4 --dist worksteal
PYTEST_MARKS := -m "not slow"
# OpenMP's threads otherwise spin while they wait, which on a machine with other work to do costs more than it saves.
export OMP_WAIT_POLICY := PASSIVE
# Images of containers often forbid bytecode, and every process that a test starts would compile all it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all test-latest test-interpreter test-rest static host bench lint clean

# Trains a small EDT on real digits, samples and judges it; pictures and report in outputs/demo.
demo: $(READY)
	env -u OMP_WAIT_POLICY $(BIN)/edt demo  # two waiting threads are as slow as one

test: lint test-interpreter test-rest

# Everything, also what is marked slow: the kernels compiled at all shapes for all targets, many random arguments.
test-all: PYTEST_MARKS :=
test-all: lint test-interpreter test-rest

# The tests with the newest release of everything, in an environment of its own, which `make clean` removes: PyPI's
# PyTorch is some GB of CUDA, and works without a GPU.
test-latest:
	$(MAKE) test-interpreter test-rest VENV=.venv-latest CONSTRAINTS=

# The Triton kernels on the CPU: TRITON_INTERPRET binds at import, hence a process of its own.
test-interpreter: $(READY)
	TRITON_INTERPRET=1 $(PYTEST) $(PYTEST_MARKS)

test-rest: $(READY)
	$(PYTEST) $(PYTEST_MARKS)

# Every kernel at all shapes for all targets, compiled unless benchmarks/results/static has it as it is now; fails on a
# spill, a narrow load and the like.
static: $(READY)
	$(BIN)/python -m benchmarks static --faults

# How long a call of each op keeps the CPU, beside its bound. Fails on errors alone, not on times: a machine that does
# other work too makes them longer.
host: $(READY)
	$(BIN)/python -m benchmarks host --quick

# Everything against what one would use instead, on the GPU or the CPU; results and a page in outputs/benchmarks. To
# commit them: make bench RESULTS=benchmarks/results
RESULTS := outputs/benchmarks
bench: $(READY)
	env -u OMP_WAIT_POLICY $(BIN)/python -m benchmarks all --quick --results $(RESULTS)  # waking threads would be most of a small op's time

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

$(READY): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e ".[train,bench,dev]"
	$(PIP) --no-deps torch-fidelity
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true  # as pip would, on all cores; one file needs a later Python
	touch $(READY)

clean:
	rm -rf .venv .venv-latest outputs build dist *.egg-info
