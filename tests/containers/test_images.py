"""What is in the images, and what is not."""

import json

import pytest

from tests.containers.engine import COORDINATOR, SOME_USER, WORKER, inspect, run_shell

pytestmark = pytest.mark.containers

IMAGES = (COORDINATOR, WORKER)
MAX_BYTES = 1_200_000_000
VARIANTS = {"portable", "avx2", "avx512", "avx512-bf16"}
PACKAGES = "cd /opt/shardmesh/lib/python3*/site-packages"


def test_the_worker_without_cuda_is_small() -> None:
    if run_shell(WORKER, 'python -c "import torch; print(torch.version.cuda)"') != "None":
        pytest.skip("these images were built with torch for CUDA")
    assert inspect(WORKER)["Size"] < MAX_BYTES


def test_the_images_share_all_that_is_big() -> None:
    coordinator, worker = (inspect(image)["RootFS"]["Layers"] for image in IMAGES)
    libraries = worker[:-1]
    assert coordinator[: len(libraries)] == libraries
    assert worker[-1] not in coordinator


def test_only_the_coordinator_speaks_to_kubernetes() -> None:
    found = [run_shell(image, f"{PACKAGES}; ls -d kubernetes 2>/dev/null || true") for image in IMAGES]
    assert found == ["kubernetes", ""]


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_holds_no_tools_and_no_model(image: str) -> None:
    assert run_shell(image, "for tool in gcc g++ cc c++ clang as ld make pip; do command -v $tool || true; done") == ""
    assert run_shell(image, "python -c 'import pip' 2>/dev/null && echo pip || true") == ""
    found = run_shell(
        image,
        "find /opt -name tests -o -name '*.gguf' -o -name '*.safetensors' -o -name '*.whl' -o -path '*/torch/include/*' "
        "-o -path '*/shardworker/*.[ch]' -o -name Dockerfile",
    )
    assert found == ""


@pytest.mark.parametrize("image", IMAGES)
def test_nothing_in_an_image_belongs_to_whom_it_runs_as(image: str) -> None:
    assert run_shell(image, "find /opt ! -user 0 -o ! -type l -perm -o+w") == ""


def test_the_worker_has_the_kernels_of_every_x86_processor_and_the_coordinator_none() -> None:
    variants = json.loads(
        run_shell(
            WORKER, "python -c 'import json; from shardworker.kernels import compiled; print(json.dumps(compiled.VARIANTS))'"
        )
    )
    assert "portable" in variants
    library = run_shell(WORKER, f"{PACKAGES}; cat shardworker/native/_operations.*.so | tr -c '[:alnum:]-' '\\n' | sort -u")
    assert set(library.split()) >= VARIANTS
    assert run_shell(COORDINATOR, f"{PACKAGES}; find shardworker -name '*.so'") == ""


@pytest.mark.parametrize(
    ("image", "title", "program", "port"),
    [(COORDINATOR, "coordinator", "coordctl", 7000), (WORKER, "worker", "shardworker", 7001)],
)
def test_an_image_says_what_it_is(image: str, title: str, program: str, port: int) -> None:
    config = inspect(image)["Config"]
    assert config["Entrypoint"] == [program]
    assert config["User"] == "10001:10001"
    assert config["StopSignal"] in {"SIGTERM", "15"}
    assert list(config["ExposedPorts"]) == [f"{port}/tcp"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.title"] == f"shardmesh {title}"
    version = run_shell(image, f"{program} --version").rpartition(" ")[2]
    assert labels["org.opencontainers.image.version"] == version
    assert "org.opencontainers.image.revision" in labels


@pytest.mark.parametrize("image", IMAGES)
def test_any_user_can_write_at_home_and_nowhere_else(image: str) -> None:
    assert run_shell(image, "id -u") == str(SOME_USER)
    assert run_shell(image, 'touch ~/here; df "$HOME" | tail -1 | cut -d" " -f1') == "tmpfs"
    assert run_shell(image, "touch /here 2>/dev/null && echo written || true") == ""
    hub = run_shell(image, 'python -c "import torch, huggingface_hub.constants as hub; print(hub.HF_HUB_CACHE)"; echo "$HOME"')
    cache, home = hub.split()
    assert cache.startswith(f"{home}/")
