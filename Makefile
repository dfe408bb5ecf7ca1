# make demo   set up and run the whole way on the embedded model
# make test   set up and run the tests        make slow   the long ones
# make test-matrix   the core of the suite in the oldest, the pinned and the newest transformers, peft and torch
# make lint   ruff, pyright and the pages       make docs   the pages, in build/site
# make bench  side by side with bitsandbytes+peft
PYTHON ?= python3
BIN    := .venv/bin
STAMP  := .venv/.installed

.PHONY: demo test slow test-matrix test-matrix-short lint docs bench setup clean
setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "onecard needs Python >= 3.11, found $$($(PYTHON) --version); set PYTHON=/path/to/python3.11"; exit 1; }
	@$(BIN)/python -c '' 2>/dev/null || { rm -rf .venv; $(PYTHON) -m venv .venv; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint,docs]'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/onecard demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

test-matrix: $(STAMP)
	$(BIN)/python -m tests.matrix --page docs/releases.md

test-matrix-short: $(STAMP)
	$(BIN)/python -m tests.matrix --short

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(MAKE) --no-print-directory docs

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python -m benchmarks.train

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
