# Two commands do all the set-up in a fresh clone: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check format proofs faults studio docs clean

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

# Trains a small DDT on real handwritten digits for about two minutes, samples it and judges the samples.
demo: $(VENV)/.installed
	$(BIN)/python benchmarks/demo.py --out out/demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadgroup

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python tests/check_sizes.py

# Slow evidence: kill -9 at 20 random moments, guidance and modulation timings, import times.
proofs: $(VENV)/.installed
	$(BIN)/python benchmarks/kill_resume.py
	$(BIN)/python benchmarks/sampling_paths.py
	$(BIN)/python benchmarks/imports.py

# Every fault a run is said to survive, done to it: the table of the README. About ten minutes.
faults: $(VENV)/.installed
	$(BIN)/python benchmarks/kill_resume.py
	$(BIN)/python benchmarks/faults.py

# The studio: a page in the browser.
studio: $(VENV)/.installed
	$(BIN)/untwine app

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation, into out/site.
docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	$(BIN)/python docs/write_cli.py
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) out runs dist build
