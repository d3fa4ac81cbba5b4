# `make demo` and `make test` do all their own set-up: they need Python >= 3.11, a C++ compiler,
# make and a package index, and are quick when run again.
PYTHON ?= python3
VENV   := .venv
STAMP  := $(VENV)/.installed
NATIVE := CMakeLists.txt $(shell find runtimes/native -type f)

.PHONY: demo test check install clean

demo: $(STAMP)
	$(VENV)/bin/losa demo -o demo-out

test: $(STAMP)
	scripts/check
	scripts/test

check: $(STAMP)
	scripts/check

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/install $(NATIVE)
	PYTHON='$(PYTHON)' scripts/install $(VENV)
	touch $(STAMP)

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
