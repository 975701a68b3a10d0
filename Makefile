# Everything that these targets need is installed into $(VENV) first: a machine with make and Python >= 3.10 will do.
# The environment is made once, and brought up to date when pyproject.toml changes.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= 2

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Without bytecode files every process compiles torch anew: importing it takes 4 s instead of 1.6 s.
unexport PYTHONDONTWRITEBYTECODE
# What is tested is this tree in that environment, and nothing else that the caller's shell points at.
unexport PYTHONPATH PYTHONHOME

python := "$(VENV)/bin/python"
# uv where it could be had (seconds), else pip (minutes). Only what is imported is compiled, when it is.
install = install() { \
	if [ -x "$(VENV)/bin/uv" ]; then "$(VENV)/bin/uv" pip install --python $(python) "$$@"; \
	else $(python) -m pip install --no-compile "$$@"; fi; }; install
benchmarks := benchmarks/step_cost.py benchmarks/epoch.py benchmarks/import_cost.py benchmarks/ddp.py benchmarks/checkpoint.py \
	benchmarks/compiled.py benchmarks/vision.py benchmarks/callbacks.py benchmarks/algorithms.py benchmarks/scale.py \
	benchmarks/growth.py benchmarks/scaling.py
PEERS ?= raw learnkit fastai lightning accelerate ignite keras skorch pytorch-accelerated poutyne

unaccelerated := $(python) -m pytest --ignore tests/ray --ignore tests/accelerator -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)
accelerated := LEARNKIT_ACCELERATOR=twin $(python) -m pytest -o testpaths=tests/accelerator -n $(JOBS) --dist loadfile $(ARGS)
# The CPU's tests once more, with the stand-in as this machine's accelerator.
elsewhere := $(python) -m pytest -p tests.accelerator.elsewhere -o testpaths= -n $(JOBS) --dist load tests/callbacks tests/vision tests/test_*.py $(ARGS)
# Which exit code of one of the three is no failure where the other one has run tests: ARGS may select none here (pytest's 5).
no_test := $(if $(strip $(ARGS)),5,0)

.PHONY: help train test test-accelerator test-ray reliability fuzz lint bench bench-peers gpu clean
help:
	@echo "make train    train on the embedded handwritten digits: bar, table, loss.png   (ARGS='...' are passed on)"
	@echo "make test     run the tests, those on a stand-in accelerator too   (ARGS='-k name' runs some)"
	@echo "make test-accelerator   those on a stand-in accelerator alone: needs g++ and Python's headers"
	@echo "make test-ray   run the tests that need a Ray cluster, on this machine: installs ray[train], some 300 MB"
	@echo "make reliability   the fault injections with their full counts: takes half an hour"
	@echo "make fuzz     random configurations against what must hold of all: ARGS='--minutes 60', '--from 1 --count 500', '--shrink 17'"
	@echo "make lint     ruff and pyright"
	@echo "make bench    measure against loops written by hand: prints ratios"
	@echo "make gpu      what only a GPU can show: its tests, waits and speed, within ten minutes; writes benchmarks/gpu.md"
	@echo "make bench-peers   the same scripts with other libraries, each in an environment of its own   (PEERS='learnkit fastai')"
	@echo "make clean    remove what builds, tests and runs left; '$(VENV)' stays: delete it to begin anew"
	@echo "Variables: PYTHON=$(PYTHON) (the interpreter, >= 3.10), VENV=$(VENV) (where everything is installed),"
	@echo "           JOBS=$(JOBS) (processes that run tests at a time)"

train: $(VENV)/.installed
	$(python) examples/01_digits.py $(ARGS)

test: $(VENV)/.installed-dev
ifneq ($(filter tests/%,$(ARGS)),)
	$(unaccelerated)
else
	first=0; $(unaccelerated) || first=$$?; [ $$first = 0 ] || [ $$first = $(no_test) ] || exit $$first; \
	second=0; $(accelerated) || second=$$?; [ $$second = 0 ] || [ $$second = $(no_test) ] || exit $$second; \
	$(elsewhere) || { third=$$?; [ $$third = $(no_test) ] && [ $$first$$second != 55 ]; }
endif

test-accelerator: $(VENV)/.installed-dev
	second=0; $(accelerated) || second=$$?; [ $$second = 0 ] || [ $$second = $(no_test) ] || exit $$second; \
	$(elsewhere) || { third=$$?; [ $$third = $(no_test) ] && [ $$second = 0 ]; }

test-ray: $(VENV)/.installed-ray
	RAY_AUTH_MODE=disabled RAY_USAGE_STATS_ENABLED=0 $(python) -m pytest tests/ray $(ARGS)

reliability: $(VENV)/.installed-dev
	RELIABILITY=full $(python) -m pytest tests/reliability tests/distributed/test_composition.py -s -o faulthandler_timeout=1800 $(ARGS)

fuzz: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(python) -m tests.fuzz --jobs $(JOBS) $(ARGS)

lint: $(VENV)/.installed-dev
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m pyright --pythonpath $(python)

bench: $(VENV)/.installed-bench
	set -e; for script in $(benchmarks); do echo "== $$script"; $(python) "$$script" $(ARGS); done

gpu: $(VENV)/.installed-dev
	$(python) benchmarks/gpu.py $(ARGS)

bench-peers: $(VENV)/.installed-bench
	UV="$(abspath $(VENV))/bin/uv" PYTHON_VERSION="$(abspath $(VENV))/bin/python" benchmarks/peers/setup.sh $(PEERS)
	$(python) benchmarks/peers/bench.py $(or $(ARGS),--all)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .coverage .coverage.* htmlcov
	find . -path './$(VENV)' -prune -o -path ./.git -prune -o -type d -name __pycache__ -exec rm -rf {} +

$(VENV)/.made:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	|| { echo "learnkit needs Python >= 3.10, and $(PYTHON) is not: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@"$(PYTHON)" -m venv "$(VENV)" \
	|| { echo "$(PYTHON) makes no virtual environments. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(python) -m pip install --quiet --disable-pip-version-check uv==0.13.9 \
	|| { echo "No uv to be had; going on with pip, which takes longer." >&2; \
	     $(python) -m pip install --quiet "pip>=25.1"; }
	@touch "$@"

$(VENV)/.installed: pyproject.toml $(VENV)/.made
	@$(install) --editable '.[plots,examples]'
	@touch "$@"

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	@$(install) --group dev
	@touch "$@"

$(VENV)/.installed-ray: pyproject.toml $(VENV)/.installed-dev
	@$(install) --group ray
	@touch "$@"

$(VENV)/.installed-bench: pyproject.toml $(VENV)/.installed
	@$(install) --group bench
	@touch "$@"
