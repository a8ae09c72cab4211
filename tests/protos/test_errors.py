"""The error table itself, and what cannot be carried by it."""

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

import protos.errors
from protos.errors import ERROR_DOMAIN, ERRORS, MAX_TEXT_BYTES, MeshError, WorkerLost, from_rpc_error, to_status

DETAILS_KEY = "grpc-status-details-bin"


def failed_call(code: grpc.StatusCode, text: str | None = None, details: bytes | None = None) -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata(*([(DETAILS_KEY, details)] if details is not None else []))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, text)


def descendants(error: type[MeshError]) -> set[type[MeshError]]:
    return {error}.union(*(descendants(child) for child in error.__subclasses__()))


def test_the_table_holds_every_class_under_a_reason_of_its_own() -> None:
    assert set(ERRORS.values()) == {error for error in descendants(MeshError) if error.__module__ == "protos.errors"}
    assert all(reason == error.reason and reason.isupper() for reason, error in ERRORS.items())
    assert all(f"+-- {error.__name__} " in str(protos.errors.__doc__) for error in ERRORS.values() if error is not MeshError)


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS.keys())
def test_a_status_carries_code_text_and_reason(error: type[MeshError]) -> None:
    status = to_status(error("wanted 2, found 3"))
    details = dict(status.trailing_metadata)[DETAILS_KEY]
    info = error_details_pb2.ErrorInfo()
    assert status_pb2.Status.FromString(details).details[0].Unpack(info)
    assert (info.reason, info.domain) == (error.reason, ERROR_DOMAIN)
    retry = [
        detail for detail in status_pb2.Status.FromString(details).details if detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR)
    ]
    assert [error_details_pb2.RetryInfo.FromString(one.value).retry_delay.ToNanoseconds() for one in retry] == (
        [] if error.retry_s is None else [error.retry_s * 1e9]
    )
    back = from_rpc_error(failed_call(status.code, status.details, details), "worker-1:5000")
    assert type(back) is error
    assert str(back) == "worker-1:5000: wanted 2, found 3"


def test_whoever_is_told_that_it_is_busy_or_gone_for_now_is_told_when_to_come_back() -> None:
    assert {reason for reason, error in ERRORS.items() if error.retry_s} == {"QUEUE_FULL", "TOO_MANY_CALLS", "NOT_SERVING"}


@pytest.mark.parametrize("character", ["x", "\n", "é", "漢", "😀"])
def test_a_long_text_is_cut_between_characters(character: str) -> None:
    text = to_status(MeshError(character * 5000)).details
    assert text.endswith(character + "...")
    assert MAX_TEXT_BYTES - 4 < len(text.encode()) <= MAX_TEXT_BYTES
    assert set(text) == {character, "."}


def test_a_text_that_utf8_cannot_say_is_sent_all_the_same() -> None:
    assert to_status(MeshError("no folder /\udcff")).details == "no folder /?"


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_without_a_reason_only_codes_of_an_absent_peer_mean_that_it_is_lost(code: grpc.StatusCode) -> None:
    absent = code.name in {"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN", "INTERNAL"}
    error = from_rpc_error(failed_call(code), "worker-1:5000")
    assert type(error) is (WorkerLost if absent else MeshError)
    assert str(error) == f"worker-1:5000: {code.name}"


FOREIGN = {
    "garbage": b"\xff\xff\xff",
    "of another code": status_pb2.Status(code=3, message="x").SerializeToString(),
    "of another text": status_pb2.Status(code=14, message="y").SerializeToString(),
    "without details": status_pb2.Status(code=14, message="x").SerializeToString(),
    "empty": b"",
}


@pytest.mark.parametrize("details", FOREIGN.values(), ids=FOREIGN.keys())
def test_details_that_are_not_ours_are_no_reason(details: bytes) -> None:
    assert type(from_rpc_error(failed_call(grpc.StatusCode.UNAVAILABLE, "x", details), "peer")) is WorkerLost


@pytest.mark.parametrize(("reason", "domain"), [("QUEUE_FULL", "example.com"), ("FROM_THE_FUTURE", ERROR_DOMAIN)])
def test_a_foreign_domain_or_an_unknown_reason_is_judged_by_its_code(reason: str, domain: str) -> None:
    status = status_pb2.Status(code=8, message="x")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=domain))
    error = from_rpc_error(failed_call(grpc.StatusCode.RESOURCE_EXHAUSTED, "x", status.SerializeToString()), "peer")
    assert type(error) is MeshError
