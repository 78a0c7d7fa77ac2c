# minivit. Needs Python >= 3.11, git and make. The first call installs into .venv;
# after that nothing is installed again and nothing needs the network.
#
#   PYTHON=python3.12 make test          another interpreter
#   UV_TORCH_BACKEND=cpu make book       PyTorch's CPU-only wheels (much smaller on Linux)

# An interpreter that no longer runs is mended by another.
PYTHON ?= $(shell test -e .venv/installed && .venv/bin/python -c "" 2>/dev/null \
                    && echo .venv/bin/python || echo python3)
BIN    := .venv/bin
HTML   := _build/html/index.html
JOBS   ?= 2
TESTS  ?= tests book
# One thread a process, unless it is said otherwise.
ONE    := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}
PYTEST := $(ONE) $(BIN)/pytest
ALL     = -n $(JOBS) --dist loadfile --durations 15 \
          --nbval --nbval-current-env --nbval-cell-timeout 120 $(TESTS)

.DEFAULT_GOAL := help
.PHONY: help install book test portable floors browser colab slow bench claims execute serve lint format lock repository clean distclean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "%-14s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install:  ## create .venv with the pinned tools (every target does so by itself)
	@command -v $(PYTHON) >/dev/null || { \
	  echo "'$(PYTHON)' was not found. Install Python 3.11 or newer, or name one:" \
	       "PYTHON=python3.12 make ..." >&2; exit 1; }
	@$(PYTHON) tools/install.py

# --all: what an earlier build warned of would not be said again.
book: install  ## build the book strictly: any warning is an error
	@$(BIN)/jupyter-book build --all -n -W --keep-going .
	@echo "The book: $(CURDIR)/$(HTML)"

test: install  ## run every test and every chapter, outputs compared
	$(PYTEST) $(ALL)

portable: install  ## run `make test` as other machines would, an hour (or a part: ONLY="no AVX" TESTS=book/vit.ipynb)
	@$(BIN)/python tools/portable.py $(if $(ONLY),--only "$(ONLY)") $(TESTS)

floors: install  ## run `make test` with the lowest versions that pyproject.toml names for package and tests
	@$(BIN)/python tools/install.py floors
	$(ONE) .venv-floors/bin/pytest $(ALL)

browser: book  ## look at the built book with headless Chromium
	$(PYTEST) -m browser tests

colab: install  ## run every chapter as Colab would, with the package from a wheel
	@$(BIN)/python tools/install.py colab
	$(PYTEST) -n 2 -m colab --durations 0 tests

slow: install  ## run the tests that take minutes
	$(BIN)/pytest -m slow tests

bench: install  ## measure speed against other libraries, write it into the book (ROUNDS=3: a quick look)
	@ROUNDS=$(ROUNDS) $(BIN)/python tools/benchmarks.py

claims: install  ## hold what the book says of training against its records (or new runs: ONLY=training SEEDS=100-109)
	$(BIN)/python -m minivit.experiments $(ONLY) $(if $(SEEDS),--seeds $(SEEDS))

execute: install  ## run all chapters in place and store their outputs (or CHAPTERS="book/vit.ipynb")
	$(BIN)/python tools/execute.py $(CHAPTERS)

serve: book  ## build the book and show it on http://localhost:8000
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html 8000

lint: install  ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: install  ## put code and notebooks into shape
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

lock: install  ## renew constraints.txt from pyproject.toml and constraints.in
	@$(BIN)/python -m pip install --quiet uv --constraint constraints.txt
	UV_SYSTEM_CERTS=1 $(BIN)/python -m uv pip compile pyproject.toml --all-extras --universal \
	  --python-version 3.11 --constraint constraints.in --upgrade --quiet \
	  --custom-compile-command "make lock" --output-file constraints.txt

repository:  ## make URL=https://github.com/... the project's address everywhere
	@$(PYTHON) tools/repository.py "$$URL"

clean:  ## remove what was built
	rm -rf _build build .pytest_cache .ruff_cache .hypothesis .benchmarks
	find minivit tests tools book -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## remove the environments too
	rm -rf .venv .venv-colab .venv-floors minivit.egg-info
