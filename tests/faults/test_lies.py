"""Workers that answer what cannot be right: it never becomes a token, and the worker is avoided."""

from __future__ import annotations

import math
import struct

import pytest

from protos.shardworker_pb2 import ExecuteRequest, ExecuteResponse
from tests.faults.injury import injure
from tests.faults.mesh import Mesh
from tests.faults.proxy import Act, Moment, When
from tests.faults.streams import Caller, Outcome
from tests.tiny import VOCABULARY

pytestmark = pytest.mark.asyncio(loop_scope="package")

ANSWERED = Moment(7, "feed_forward", 1, When.AFTER)
DRAWN = Moment(7, "head", 0, When.AFTER)


def _fill(value: float) -> Act:
    def fill(response: ExecuteResponse) -> None:
        response.partial.data = response.partial.data[:-4] + struct.pack("<f", value)

    return fill


def _set(**fields: int) -> Act:
    def change(response: ExecuteResponse) -> None:
        for name, difference in fields.items():
            setattr(response, name, getattr(response, name) + difference)

    return change


def _more_rows(response: ExecuteResponse) -> None:
    response.partial.shape[0] += 1


def _other_shape(response: ExecuteResponse) -> None:
    rows, columns = response.partial.shape
    response.partial.shape[:] = (rows * 2, columns // 2)


def _less_data(response: ExecuteResponse) -> None:
    response.partial.data = response.partial.data[:-4]


def _other_kind(response: ExecuteResponse) -> None:
    response.squares.CopyFrom(response.partial)


def _nothing(response: ExecuteResponse) -> None:
    response.ClearField("partial")


def _candidate(token: int) -> Act:
    def change(response: ExecuteResponse) -> None:
        response.head.candidates.data = struct.pack("<i", token) + response.head.candidates.data[4:]

    return change


def _no_candidates(response: ExecuteResponse) -> None:
    response.head.ClearField("candidates")


def _logit(value: float) -> Act:
    def change(response: ExecuteResponse) -> None:
        response.head.logits.data = struct.pack("<f", value) + response.head.logits.data[4:]

    return change


def _logsumexp(value: float) -> Act:
    def change(response: ExecuteResponse) -> None:
        response.head.logsumexp.data = struct.pack("<d", value) + response.head.logsumexp.data[8:]

    return change


def _other_plan(request: ExecuteRequest) -> None:
    request.plan_digest = bytes(32)


def _other_epoch(request: ExecuteRequest) -> None:
    request.epoch += 1


LIES: dict[str, tuple[Moment, Act]] = {
    "nan": (ANSWERED, _fill(math.nan)),
    "infinity": (ANSWERED, _fill(-math.inf)),
    "more rows": (ANSWERED, _more_rows),
    "other shape": (ANSWERED, _other_shape),
    "less data": (ANSWERED, _less_data),
    "other kind": (ANSWERED, _other_kind),
    "nothing": (ANSWERED, _nothing),
    "old epoch": (ANSWERED, _set(epoch=-1)),
    "old step": (ANSWERED, _set(step=-2)),
    "old round": (ANSWERED, _set(round=-1)),
    "other shard": (ANSWERED, _set(shard=1)),
    "no message": (ANSWERED, lambda _: b"\xff\xff\xff"),
    "token beyond the vocabulary": (DRAWN, _candidate(VOCABULARY)),
    "negative token": (DRAWN, _candidate(-1)),
    "no candidates": (DRAWN, _no_candidates),
    "logit nan": (DRAWN, _logit(math.nan)),
    "logit infinity": (DRAWN, _logit(math.inf)),
    "logsumexp nan": (DRAWN, _logsumexp(math.nan)),
}
SAMPLE = ("nan", "other shape", "old epoch", "no message", "token beyond the vocabulary")


@pytest.mark.parametrize("lie", [pytest.param(lie, marks=[] if lie in SAMPLE else pytest.mark.slow) for lie in LIES])
async def test_a_lie_never_becomes_a_token(mesh: Mesh, served: Caller, expected: dict[str, Outcome], lie: str) -> None:
    worker = (await mesh.serving(served))[1]
    epoch = (await served.mesh()).epoch
    moment, act = LIES[lie]
    await injure(mesh, served, expected, worker, moment, act=act)
    assert (await served.mesh()).epoch > epoch, "the lie was not noticed"
    assert worker not in await mesh.serving(served), "a worker that lied is avoided while others suffice"


@pytest.mark.parametrize("change", [_other_plan, _other_epoch])
async def test_a_worker_of_another_plan_or_epoch_refuses_and_the_mesh_is_made_anew(
    mesh: Mesh, served: Caller, expected: dict[str, Outcome], change: Act
) -> None:
    worker = (await mesh.serving(served))[1]
    epoch = (await served.mesh()).epoch
    await injure(mesh, served, expected, worker, Moment(7, "attend", 1), act=change)
    assert (await served.mesh()).epoch > epoch


async def test_an_answer_of_an_old_epoch_is_no_answer(mesh: Mesh, served: Caller, expected: dict[str, Outcome]) -> None:
    worker = (await mesh.serving(served))[0]
    kept: list[bytes] = []
    await injure(mesh, served, expected, worker, ANSWERED, act=lambda answer: kept.append(answer.SerializeToString()))
    # All sessions are opened again, on the same workers.
    await injure(mesh, served, expected, worker, Moment(3), act=lambda _: worker.link.reset())
    worker = (await mesh.serving(served))[0]
    epoch = (await served.mesh()).epoch
    await injure(mesh, served, expected, worker, ANSWERED, act=lambda _: kept[0])
    assert (await served.mesh()).epoch > epoch
