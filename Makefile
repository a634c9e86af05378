# `make demo` and `make test` do all their set-up; a second run starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := $(VENV)/.ready-demo
# The pair is pinned together: other pairs of torch and torchvision break.
TORCH := torch==2.14.1 torchvision==0.29.1

# The tests start hundreds of processes, which would all compile the same modules if bytecode were not kept.
unexport PYTHONDONTWRITEBYTECODE

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo lint check test test-gpu soak docs bench bench-gpu lock audit dist image clean

demo: $(DEMO)
	$(BIN)/patternnet demo --out demo-run

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	git ls-files -z | xargs -0 $(BIN)/codespell

# Numerics and jobs in this process, without Ray.
check: lint
	$(PYTEST) -m "not slow and not full and not ray" -n 2 --dist loadfile --no-loadscope-reorder --timeout 300

# All tests except the slow ones.
test: lint
	$(PYTEST) -m "not slow" -n 4 --dist loadfile --no-loadscope-reorder --timeout 600

test-gpu: $(READY)
	$(BIN)/python -m pytest tests/gpu

# Long trials, and tests that need these programs; tests whose program is missing are skipped and say so.
TOOLS := chromium chromium-driver slurm-wlm prometheus kubernetes-client debootstrap shellcheck zsh fish

soak: $(READY)
	if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends $(TOOLS); fi
	$(BIN)/python -m pytest -m slow -rs

docs: $(READY)
	$(BIN)/mkdocs build --strict

bench: $(READY)
	$(BIN)/python -m benchmarks --write docs

bench-gpu: $(READY)
	$(BIN)/python -m benchmarks --device cuda --write docs

# What the image installs. Versions stay unless UPGRADE=--upgrade. The CPU's lock leaves out torch, which comes from
# another index, and CUDA's libraries.
LOCK := $(BIN)/uv pip compile --quiet --generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	--custom-compile-command 'make lock' $(UPGRADE)
LOCKS := cluster/image/requirements
VARIANT ?= cuda
VERSION := $(shell sed -n 's/^version = "\(.*\)"$$/\1/p' pyproject.toml)

lock: $(READY)
	echo $(TORCH) | tr ' ' '\n' | $(LOCK) pyproject.toml --extra s3 --extra timm --extra zarr --extra serve \
		--constraints - --output-file $(LOCKS)-cuda.txt
	awk '/^[^ ]/ { cuda = /^(torch|torchvision|triton|nvidia-.*|cuda-.*)==/ } !cuda' $(LOCKS)-cuda.txt > $(LOCKS)-cpu.txt
	printf 'setuptools>=77\ncyclonedx-bom\n' | $(LOCK) - --output-file $(LOCKS)-build.txt
	$(BIN)/python docs/licences.py

audit: $(READY)
	for lock in cuda build; do \
		$(BIN)/pip-audit --strict --disable-pip --require-hashes --requirement $(LOCKS)-$$lock.txt || exit 1; done

dist: $(READY)
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*

image:
	docker build --file cluster/image/Dockerfile --tag patternnet-ray:$(VERSION)-$(VARIANT) --build-arg VARIANT=$(VARIANT) \
		--build-arg TORCH_INDEX=$(TORCH_INDEX) --build-arg VERSION=$(VERSION) \
		--build-arg REVISION=$$(git rev-parse HEAD) .

$(READY): EXTRA := dev
$(DEMO): EXTRA := demo
$(READY) $(DEMO): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[$(EXTRA)]'
	touch $@

clean:
	rm -rf $(VENV) demo-run
