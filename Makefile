# make demo: every format on the reference model, a report and a GGUF file (about 3 minutes after installation)
# make test: every part of the library, in minutes; `make test-slow`: the rest, what takes longer or wants a peer
# make results: the numbers of README, docs and paper, filled in from experiments/results (tests/test_documents.py and
#               tests/test_paper.py check them)
# make notebooks: executes notebooks/ and writes each .ipynb from its .py; ONLY=4 for those whose name begins so
# make mutants: features taken away one at a time, a test must fail for each (scripts/mutate.py --help; about 7 minutes)
# make chaos: a hundred times as many damaged files, kills and failing disks as the tests try (tests/chaos; an hour or more)
# make paper: paper/build/main.pdf, its numbers filled in first (wants TeX: on Debian latexmk texlive-latex-recommended
#             texlive-pictures lmodern)
# make pictures: docs/img/report-*.png, a report in headless Chromium (scripts/report_pictures.py)
# All make a virtual environment in .venv first; PYTHON=python3.12 chooses the interpreter.

# Tests run in WORKERS processes, a file at a time: most of their time is tracing and compiling, on one core each. What was
# compiled is kept in ~/.cache/qjax (tests/compiled_programs.py): a second run takes half the time.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin

.PHONY: demo test test-slow test-env results notebooks mutants chaos paper pictures lint clean

demo: .venv/.run
	$(BIN)/qjax run configs/quickstart.toml

test: test-env
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-slow: test-env
	@$(BIN)/python -m pytest -m slow -n $(WORKERS) --dist loadfile

test-env: .venv/.test

results: .venv/.run
	$(BIN)/qjax report experiments/results/quickstart.json --figure kl -o docs/img/kl.svg
	$(BIN)/qjax report experiments/results/smollm2_text.json --figure amount -o docs/img/amount.svg
	$(BIN)/qjax report experiments/results/budget.json --figure sum -o docs/img/budget.svg
	$(BIN)/qjax fill README.md docs paper

notebooks: test-env
	@$(BIN)/python scripts/notebooks.py $(ONLY)

mutants: test-env
	@$(BIN)/python scripts/mutate.py

chaos: test-env
	@QJAX_CHAOS=$(or $(N),100) $(BIN)/python -m pytest tests/chaos -m "slow or not slow" -rP

paper: .venv/.run
	$(BIN)/qjax fill paper
	latexmk -cd -pdf -interaction=nonstopmode -halt-on-error -outdir=build paper/main.tex

pictures: test-env
	@$(BIN)/python scripts/report_pictures.py

lint: test-env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv

.venv/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else "qjax needs Python 3.11 or newer, and $(PYTHON) is %d.%d: say make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv .venv

# The stamps are renewed when the dependencies change.
.venv/.run: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -q -e .
	@touch $@

.venv/.test: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -q -e '.[test]'
	@touch $@
