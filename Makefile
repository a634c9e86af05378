# `make demo` and `make test` do all their set-up; a second run starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The pair is pinned together: other pairs of torch and torchvision break.
TORCH := torch==2.14.1 torchvision==0.29.1

.PHONY: demo test test-gpu soak bench bench-gpu clean

demo: $(READY)
	$(BIN)/patternnet demo --out demo-run

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 4 --dist loadfile --no-loadscope-reorder

test-gpu: $(READY)
	$(BIN)/python -m pytest tests/gpu

soak: $(READY)
	$(BIN)/python -m pytest -m slow

bench: $(READY)
	$(BIN)/python -m benchmarks --write docs/benchmarks.md

bench-gpu: $(READY)
	$(BIN)/python -m benchmarks --device cuda --write docs/benchmarks-gpu.md

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) demo-run
