# Every command of the project. `make` lists them; each makes its own .venv when there is none.

PYTHON ?= python3
BIN := .venv/bin
# What `make bench` times: small, olmoe, qwen3-30b-a3b.
BENCH_SHAPES ?= small
# Tests and the demo need no network once the packages are there.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help venv demo bench study test test-all test-cluster test-chaos test-nightly parity check format lock clean

help:  ## This list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12

venv: .venv/ready  ## The virtual environment with the locked packages

# pip compiles on one core; where no process writes bytecode (PYTHONDONTWRITEBYTECODE), each would compile all it imports.
.venv/ready: requirements.lock pyproject.toml
	@.ci/make-venv $(PYTHON) .venv
	@echo "installing the packages of requirements.lock into .venv: a minute or two"
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-compile -r requirements.lock
	@$(BIN)/python -m compileall -qq -j 0 .venv/lib moe launch data_prep || true
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -e .
	@touch $@

demo: venv  ## Text to Hugging Face checkpoint in one go, small: under 10 minutes on 2 cores, installing included
	$(OFFLINE) $(BIN)/turnout demo

bench: venv  ## The sparse layer beside its peers, on CPU, figures in runs/bench: 20 minutes; BENCH_SHAPES="small olmoe": an hour
	@mkdir -p runs/bench
	@for shape in $(BENCH_SHAPES); do for dtype in fp32 bf16; do for threads in 1 2; do for allocator in default tuned; do \
	  $(OFFLINE) $(BIN)/python -m moe.bench.layer --shape $$shape --dtype $$dtype --threads $$threads \
	    --allocator $$allocator --json runs/bench/$$shape-$$dtype-$$threads-$$allocator.json || exit 1; \
	done; done; done; done
	@$(OFFLINE) $(BIN)/python -m moe.bench.columns $(foreach shape,$(BENCH_SHAPES),runs/bench/$(shape)-*.json)

study: venv  ## Dense against sparse at equal cost, and balancing policies: hours on 2 cores; goes on if stopped
	$(OFFLINE) $(BIN)/python -m moe.bench.study configs/study/study.yaml

test: venv  ## The tests, with real 2- and 4-process runs, under 15 minutes on 2 cores
	$(OFFLINE) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: venv  ## The slow tests that `make test` leaves out
	$(OFFLINE) $(BIN)/python -m pytest -m "slow and not cluster and not nightly" -n 2 --dist loadfile --no-loadscope-reorder

test-cluster: venv  ## Launches and doctor on a testbed of namespaces; as root, installs by apt what it lacks; on a quiet machine
	$(OFFLINE) $(BIN)/python -m pytest tests/cluster -m "cluster and not chaos and not nightly"

test-chaos: venv  ## 20 random faults in launched runs on a testbed; as root
	$(OFFLINE) $(BIN)/python -m pytest tests/cluster -m "chaos and not nightly"

test-nightly: venv  ## What CI has no time for: all layouts, recipes and kills; on a testbed each fault, 20 planned stops, 200 random faults; hours
	$(OFFLINE) $(BIN)/python -m pytest -m nightly

parity: venv  ## The layout parity, more of it than `make test` has, as a table: 151 layouts beside one process; half an hour
	$(OFFLINE) $(BIN)/python -m tests.dist.parity

check: venv  ## Format, lint, types and the floors between packages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv  ## Write the files as `check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock:  ## Resolve the ranges of pyproject.toml anew and write requirements.lock
	.ci/make-lock $(PYTHON)

clean:  ## Remove caches and the virtual environment; runs and data stay
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
