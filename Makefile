# `make demo`, `make test` and `make bench` each make the virtual environment that they need.
PYTHON ?= python3
VENV ?= .venv

.PHONY: demo test quick-test fuzz bench lint clean

demo: $(VENV)/.installed
	$(VENV)/bin/python scripts/demo.py

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest

quick-test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -m "not slow and not long"

# 10,000 damaged files for each reader; FUZZ_INPUTS=500 for fewer.
fuzz: $(VENV)/.installed-test
	cd tests && $(abspath $(VENV))/bin/python -m fuzz --folder=../fuzz-results

# Speed beside the peers, on an otherwise idle machine; BENCH_FLAGS=--quick to see that it runs.
bench: $(VENV)/.installed-bench
	$(VENV)/bin/python -m benchmarks.run $(BENCH_FLAGS)

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) demo build fuzz-results *.egg-info

# setup.py and pyproject.toml decide what is installed; a change of either installs again.
$(VENV)/.installed: pyproject.toml setup.py
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -e .
	touch $@

$(VENV)/.installed-test: pyproject.toml setup.py
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -e ".[test]"
	touch $@ $(VENV)/.installed

$(VENV)/.installed-bench: pyproject.toml setup.py
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -e ".[bench]"
	touch $@ $(VENV)/.installed
