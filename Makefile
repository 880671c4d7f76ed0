# Sets itself up: every target first makes .venv if it is not there or if its inputs have changed.
# Needs make and Python 3.10 or newer with its venv module.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# By file: what the tests of a file share is started once. Three workers keep two cores busy; each one more costs 5 s of
# CPU time.
PARALLEL := --numprocesses 3 --dist loadfile --no-loadscope-reorder
PIP := $(RUN) -m pip --disable-pip-version-check --quiet
LOCK := $(VENV)/bin/uv pip compile --quiet --universal --upgrade --generate-hashes --python-version 3.10 --no-header \
	--no-annotate
TYPED := $(wildcard nodepass tests/support tests/fuzz tests/soak tests/matrix benchmarks contrib/demo contrib/dist contrib/systemd/nodepass-manager)

# Compiled tests are kept: else every worker compiles them again, 4 s of CPU time each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help venv demo test programs coverage lint bench fuzz soak handovers matrix lock dist clean
.DELETE_ON_ERROR:

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

venv: $(VENV)/stamp ## Make .venv with what nodepass needs to run

demo: $(VENV)/stamp ## Show a tunnel at work; ends with Ctrl-C (ONCE=1: check and exit)
	@$(RUN) contrib/demo/demo.py $(if $(filter-out 0,$(ONCE)),--once)

test: $(VENV)/test.stamp ## Run the tests (ARGS='-k name' goes to pytest)
	$(RUN) -m pytest $(PARALLEL) $(ARGS)

programs: $(VENV)/test.stamp $(VENV)/kubernetes.stamp ## Run the tests that need other programs or root, take more than 3 s, or try rare conditions
	$(RUN) -m pytest $(PARALLEL) -m 'programs and not soak' $(ARGS)

coverage: $(VENV)/test.stamp $(VENV)/coverage.stamp ## Report which lines the unit tests run, and which all of make test
	$(RUN) -m tests.support.measure $(PARALLEL) $(ARGS)

lint: $(VENV)/test.stamp $(VENV)/lint.stamp ## Check style, format and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy $(TYPED)

bench: $(VENV)/bench.stamp ## Measure against other tunnels (ARGS='--quick', ARGS='--help')
	$(RUN) -m benchmarks $(ARGS)

fuzz: $(VENV)/fuzz.stamp ## Fuzz whatever parses a peer's bytes (SECONDS=30 each, TARGET=name)
	$(RUN) -m tests.fuzz --seconds $(or $(SECONDS),30) $(if $(TARGET),--target $(TARGET))

soak: $(VENV)/test.stamp ## Traffic and faults for MINUTES=10 (SEED=number repeats a run's choices)
	$(RUN) -m tests.soak --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED))
	$(RUN) -m pytest -m soak

handovers: $(VENV)/test.stamp ## Hand over HANDOVERS=50 times under wrk, iperf3 and a UDP flow, and under systemd
	HANDOVERS=$(or $(HANDOVERS),50) $(RUN) -m pytest -m '' -s tests/e2e/test_handover_programs.py \
		tests/systemd/test_units.py::test_handovers_under_load_lose_no_visitor

matrix: $(VENV)/test.stamp ## Test with each installed Python, highest and lowest dependencies (ARGS='--help')
	$(RUN) -m tests.matrix $(ARGS)

lock: $(VENV)/lock.stamp ## Resolve the locked dependencies of releases again
	$(LOCK) setup.py --output-file contrib/lock/base.txt
	$(LOCK) setup.py --extra metrics --output-file contrib/lock/metrics.txt
	$(LOCK) setup.py --extra top --output-file contrib/lock/top.txt
	echo 'setuptools>=77.0.1' | $(LOCK) - --output-file contrib/lock/build.txt
	printf 'setuptools>=77.0.1\npatchelf>=0.17.2,<0.20\n' | $(LOCK) - --output-file contrib/lock/dist.txt

dist: $(VENV)/dist.stamp ## Build what is released, reproducibly: wheel, sdist, executable, Debian package (dist/)
	$(RUN) -m contrib.dist $(ARGS)

clean: ## Remove everything that was made here
	rm -rf $(VENV) .matrix build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage* \
		benchmarks/out tests/fuzz/found
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/stamp: requirements.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit("nodepass needs Python 3.10 or newer, $(PYTHON) is %d.%d: say make PYTHON=..." \
		% sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --editable .
	@touch $@

$(VENV)/dist.stamp: $(VENV)/stamp contrib/lock/dist.txt
	$(PIP) install --require-hashes --requirement contrib/lock/dist.txt
	@touch $@

$(VENV)/%.stamp: $(VENV)/stamp
	$(PIP) install --editable '.[$*]'
	@touch $@
