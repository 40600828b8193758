# Purser: `make demo` and `make test` are the two commands; each does all of its own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.purser-ready

.PHONY: setup demo test soak bench lint clean
setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Purser needs Python 3.11 or newer; say make PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing packages into $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# The demo keeps its own books in .venv/demo, so that it never touches yours; run it again and it goes on with what is left.
demo: $(STAMP)
	@PURSER_HOME=$${PURSER_HOME:-$(CURDIR)/$(VENV)/demo} $(BIN)/purser tune infra/jobs/digits.yaml
	@PURSER_HOME=$${PURSER_HOME:-$(CURDIR)/$(VENV)/demo} $(BIN)/purser budget show digits

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

# What starts Ray mostly waits for processes to start, and runs beside the rest; the log of the rest is shown after it.
test: lint
	@$(BIN)/python -m pytest -m "not cluster" > $(VENV)/rest.log 2>&1 & rest=$$!; \
	$(BIN)/python -m pytest -m cluster; cluster=$$?; \
	wait $$rest; rest=$$?; cat $(VENV)/rest.log; exit $$((cluster || rest))

# The same tests with large counts: hours instead of minutes.
soak: $(STAMP)
	@PURSER_SOAK=1 $(BIN)/python -m pytest

bench: $(STAMP)
	@for file in tests/benchmarks/[a-z]*.py; do \
		name=$$(basename $$file .py); echo "$$name"; $(BIN)/python -m tests.benchmarks.$$name || exit 1; \
	done

clean:
	rm -rf $(VENV)
