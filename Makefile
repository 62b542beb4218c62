# make demo: segment a real image and a made one.   make test: run the tests.   make check: format, lint, types.
# make test-browser: test the viewer's page; needs chromium and chromium-driver (apt-get).
# make viewer: build the page's libraries from npm (pipeline/segpipe/viewer/vendoring/README.md).
# make docs: write what is written from code (schema, default.yaml, docs/settings.md, docs/columns.md).
# make site: the documentation as HTML, in site/.
# Each makes .venv on first use, from nothing but Python 3.11 or newer and make.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test test-browser viewer check docs site format clean

demo: .venv/demo.done
	$(BIN)/segpipe demo

test: .venv/test.done
	$(BIN)/pytest

test-browser: .venv/test.done
	$(BIN)/pytest -m browser

viewer:
	cd pipeline/segpipe/viewer/vendoring && npm ci && npm run build

check: .venv/test.done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/snakefmt --check Snakefile workflows
	$(BIN)/snakemake --lint

docs: .venv/test.done
	$(BIN)/python -m segpipe.settings_docs

site: .venv/test.done
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -b html docs site

format: .venv/test.done
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/snakefmt Snakefile workflows

clean:
	rm -rf .venv demo site

.venv/demo.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

.venv/test.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,test,dev,docs]'
	touch $@
