# Everything runs in .venv, which is made once from constraints.txt and pyproject.toml.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.stamp

.PHONY: demo test proofs bench bench-peers docs soak lint format clean

$(STAMP): constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

# About two minutes: a text-to-image model learns to obey its prompts, the untouched one is steered beside it, and the
# last line is the path of a page about both. Every call starts anew; what an earlier one left stays until this one is
# done.
demo: $(STAMP)
	rm -rf runs/demo.new
	$(BIN)/python -m difftilt train demo --output runs/demo.new/demo
	$(BIN)/python -m difftilt steer demo-steering --output runs/demo.new/demo-steering
	rm -rf runs/demo runs/demo-steering
	mv runs/demo.new/demo runs/demo.new/demo-steering runs
	rmdir runs/demo.new
	$(BIN)/python -m difftilt report runs/demo runs/demo-steering

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

proofs: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m long

bench: $(STAMP)
	$(BIN)/python -m benchmarks

# TRL 0.23.1, in an environment of its own, and the stock pipeline of diffusers beside difftilt: docs/performance.md.
bench-peers: $(STAMP) .bench/trl/.stamp
	$(BIN)/python -m benchmarks.peers

.bench/trl/.stamp: benchmarks/peers/trl.txt
	test -x .bench/trl/bin/python || $(PYTHON) -m venv .bench/trl
	.bench/trl/bin/python -m pip install --quiet -r benchmarks/peers/trl.txt
	touch $@

# The pages as a site in build/docs; a broken link is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Kill -9 at random moments, fifty times per method; two hundred generated recipes and damaged checkpoints; faults of
# rewards; hostile prompts; a full disk.
soak: $(STAMP)
	DIFFTILT_KILLS=50 DIFFTILT_RECIPES=200 DIFFTILT_DAMAGES=200 $(BIN)/pytest -m '' tests/reliability --timeout 7200

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs build dist .pytest_cache .ruff_cache .hypothesis
