# In a fresh clone, run `make demo`, `make test` (takes some minutes) or `make test-all`. Each of them
# first installs jepa3d and its tools into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all check

demo: .venv/ready
	$(BIN)/jepa3d demo --out demo

test: .venv/ready check
	$(BIN)/pytest -n auto --dist worksteal -m "not slow"

test-all: .venv/ready check
	$(BIN)/pytest -n auto --dist worksteal

check: .venv/ready
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/pyrefly check

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[io,view,search,ray,export,vit,track,fast,docs,dev]'
	touch $@
