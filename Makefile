# Plain make from 3.81 on, with sh. `make` alone lists the targets.
.DEFAULT_GOAL := help
.PHONY: help setup demo test bench soak compare device lint format docs site constraints clean distclean

# Every tool runs as a module of .venv's Python: scripts on PATH may belong to another environment.
python := .venv/bin/python

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: ## make or update .venv with everything in it (PYTHON=python3.12 picks the Python)
	@sh tools/setup.sh

demo: setup ## run the whole worker on this machine, queue and callbacks included (ARGS='--help')
	@.venv/bin/cvworker demo $(ARGS)

test: lint ## lint, check types and run all tests, three at a time (ARGS='-k name -n 0')
	$(python) -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

bench: setup ## how fast this machine is: the ladder of designs, then load tests; ten minutes, HTML in build/bench
	.venv/bin/cvworker bench --out build/bench
	$(python) -m load.scenarios all --out build/bench --seconds 10 --bursts 1 --minutes 1 $(ARGS)

soak: setup ## half an hour of mixed faults against whole workers (ARGS='--seconds 300 --seed 7')
	$(python) -m load.faults mixed --seconds 1800 $(ARGS)

fuzz: setup ## search for messages, URLs and pictures that break something; takes minutes (ARGS='-k urls')
	HYPOTHESIS_PROFILE=fuzz $(python) -m pytest -o timeout=7200 tests/fuzz $(ARGS)

compare: setup ## this worker and others at the same work, in turn; takes an hour (ARGS='--load cpu --rounds 1')
	$(python) -m load.compare $(ARGS)

device: setup ## the whole worker with ResNet-50 on a GPU beside its limits; ten minutes (ARGS='--device cpu --help')
	$(python) -m load.device $(ARGS)

lint: setup ## ruff and mypy, without the tests
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

format: setup ## put the code into the project's form
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

docs: setup ## write docs/settings.md anew from the settings class
	@$(python) tools/settings_reference.py

site: setup ## the documentation as a site, in build/site; a link that leads nowhere fails
	$(python) -m sphinx -W --keep-going -n -q -b html docs build/site
	@echo build/site/index.html

constraints: ## pin anew what make setup installs, in constraints.txt (takes minutes and a second environment)
	@sh tools/setup.sh constraints

clean: ## remove caches and build outputs
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name .venv -prune -o -name .git -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf .venv
