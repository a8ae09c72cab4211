"""What a worker may ask for, and what it gets."""

from pathlib import Path

import pytest

from coordinator.workers.supplier import Supplier
from protos import rpc
from protos.errors import ModelError
from protos.plan_pb2 import CheckpointFile
from protos.shardworker_pb2 import SupplyResponse

DATA = bytes(range(200))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.safetensors").write_bytes(DATA)
    (tmp_path / "secret").write_bytes(b"secret")
    return tmp_path


def supplier_of(folder: Path, size: int = len(DATA)) -> Supplier:
    return Supplier(folder, [CheckpointFile(name="a.safetensors", size=size)])


@pytest.mark.parametrize(
    ("pieces", "data"),
    [
        ({"offset": 0, "length": 200, "count": 1}, DATA),
        ({"offset": 199, "length": 1, "count": 1}, DATA[199:]),
        ({"offset": 10, "length": 3, "count": 4, "pitch": 50}, DATA[10:13] + DATA[60:63] + DATA[110:113] + DATA[160:163]),
        ({"offset": 0, "length": 100, "count": 2, "pitch": 100}, DATA),
    ],
)
async def test_pieces_come_one_after_the_other(folder: Path, pieces: dict[str, int], data: bytes) -> None:
    with supplier_of(folder) as supplier:
        wanted = SupplyResponse(number=7, file="a.safetensors", **pieces)
        answer = await supplier.answer(wanted)
    assert (answer.number, answer.data, answer.error) == (7, data, "")


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        (SupplyResponse(file="secret", length=1, count=1), "the plan has no file 'secret'"),
        (SupplyResponse(file="../a.safetensors", length=1, count=1), "the plan has no file"),
        (SupplyResponse(file="a.safetensors", length=0, count=1), "0 bytes"),
        (SupplyResponse(file="a.safetensors", length=1, count=0), "0 pieces"),
        (SupplyResponse(file="a.safetensors", offset=200, length=1, count=1), "are not in its 200 bytes"),
        (SupplyResponse(file="a.safetensors", length=2, count=2, pitch=1), "1 apart"),
        (SupplyResponse(file="a.safetensors", length=2, count=3, pitch=100), "are not in its 200 bytes"),
        (SupplyResponse(file="a.safetensors", length=2**63, count=2**63, pitch=2**63), "are not in its 200 bytes"),
        (SupplyResponse(file="a.safetensors", length=1, count=rpc.MAX_SUPPLY_BYTES + 1, pitch=1), "or more than 8388608"),
    ],
)
async def test_what_is_not_the_plans_is_an_error_that_says_so(folder: Path, wanted: SupplyResponse, error: str) -> None:
    with supplier_of(folder) as supplier:
        answer = await supplier.answer(wanted)
    assert answer.data == b""
    assert error in answer.error


async def test_a_file_that_became_shorter_is_an_error(folder: Path) -> None:
    with supplier_of(folder, size=300) as supplier:
        answer = await supplier.answer(SupplyResponse(file="a.safetensors", offset=150, length=100, count=1))
    assert "became shorter: 100 bytes at 150 wanted, 50 left" in answer.error


def test_a_file_that_is_gone_is_named_before_anything_is_sent(folder: Path) -> None:
    (folder / "a.safetensors").unlink()
    with pytest.raises(ModelError, match=r"a\.safetensors cannot be read"), supplier_of(folder):
        pass
