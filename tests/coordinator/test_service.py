"""The Generation service over a real gRPC server on a unix socket, with a model that says what it is told."""

import asyncio
import codecs
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import torch
from grpc_status import rpc_status

from coordinator.engine import Engine
from coordinator.models.spec import DenseSpec, ModelSpec
from coordinator.sampler import Choice
from coordinator.scheduler import Limits, Step
from coordinator.sequence import Sequence
from coordinator.service import CompletionText, GenerationService
from protos import rpc
from protos.errors import (
    InvalidArgument,
    MeshError,
    NotServing,
    QueueFull,
    TopologyError,
    WorkerLost,
    error_reason,
    from_rpc_error,
)
from protos.generation_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    Chat,
    ChatMessage,
    GenerateRequest,
    GenerateResponse,
    GetMeshResponse,
    GetModelRequest,
    ReshardRequest,
    Sampling,
    TokenIds,
    Usage,
)
from protos.generation_pb2_grpc import GenerationStub, add_GenerationServicer_to_server
from protos.interceptors import ErrorInterceptor
from protos.plan_pb2 import AttentionSpec
from protos.tensor_pb2 import DTYPE_F32

EOS = 0
MOST_SHARDS = 4


class FakeDetokenizer:
    """A token is a byte; half a character is never given away."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class FakeTokenizer:
    has_chat_template = True

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: list[dict[str, str]], arguments: dict[str, Any]) -> list[int]:
        if "raise" in arguments:
            raise InvalidArgument("the chat template refuses: no")
        return [byte for one in messages for byte in f"{one['role']}:{one['content']}".encode()]

    def detokenizer(self) -> FakeDetokenizer:
        return FakeDetokenizer()


SPEC = ModelSpec(
    family="fake",
    hidden=8,
    vocabulary=256,
    context=100,
    norm_eps=1e-5,
    attention=AttentionSpec(),
    feed_forward=(DenseSpec(4),),
    tied=False,
    names={},
    fused_names={},
    stop_ids=(),
)


def model_of(tokenizer: FakeTokenizer | None) -> Any:
    settings = SimpleNamespace(model="fake-model", quantization="none")
    return SimpleNamespace(spec=SPEC, tokenizer=tokenizer, settings=settings, stop_ids=frozenset({EOS}), dtype=DTYPE_F32)


class Script:
    """Forward and head: the n-th token of every completion is the n-th byte of a text, then end-of-sequence."""

    def __init__(self) -> None:
        self.text = b"Hello"
        self.steps_left = asyncio.Semaphore(10**6)

    async def run(self, step: Step, number: int) -> torch.Tensor:
        del number
        await asyncio.sleep(0)
        await self.steps_left.acquire()
        return torch.zeros(sum(rows.samples for rows in step.rows), 1)

    async def choose(self, hidden: torch.Tensor, sequences: list[Sequence], step: int) -> list[Choice]:
        del hidden, step
        return [self._next(sequence) for sequence in sequences]

    def _next(self, sequence: Sequence) -> Choice:
        at = len(sequence.generated)
        token = self.text[at] if at < len(self.text) else EOS
        return Choice(token) if sequence.request.logprobs is None else Choice(token, -0.5, ((token, -0.5), (1, -2.0)))


class Scene:
    def __init__(self, engine: Engine, script: Script, channel: grpc.aio.Channel) -> None:
        self.engine, self.script, self.channel = engine, script, channel
        self.resharded: list[int] = []
        self.stub = GenerationStub(channel)

    async def all(self, request: GenerateRequest, timeout: float = 10.0) -> list[GenerateResponse]:  # noqa: ASYNC109  # the call's deadline
        return [response async for response in self.stub.Generate(request, timeout=timeout)]

    async def refusal(self, request: GenerateRequest) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await self.all(request)
        assert not self.engine.scheduler.waiting
        assert not self.engine.scheduler.running
        return raised.value

    async def wait_idle(self) -> None:
        await asyncio.wait_for(self.engine.wait_idle(), 5)
        assert not self.engine.scheduler.waiting
        assert not self.engine.scheduler.running
        assert self.engine.scheduler.pool.num_used == 0


@contextlib.asynccontextmanager
async def serve(folder: Path, tokenizer: FakeTokenizer | None, limits: Limits) -> AsyncIterator[Scene]:
    engine, script = Engine(limits, SPEC.vocabulary, SPEC.context), Script()
    server = grpc.aio.server(interceptors=[ErrorInterceptor()])

    async def report() -> GetMeshResponse:
        raise RuntimeError("a secret of the inside")

    async def reshard(num_shards: int) -> None:
        if num_shards > MOST_SHARDS:
            raise TopologyError("there are 4 heads")
        scene.resharded.append(num_shards)

    status: Any = SimpleNamespace(report=report)
    add_GenerationServicer_to_server(GenerationService(model_of(tokenizer), engine, status, reshard), server)
    address = f"unix:{folder}/s"
    server.add_insecure_port(address)
    await server.start()
    task = asyncio.create_task(engine.run(script, script))  # type: ignore[arg-type]
    async with grpc.aio.insecure_channel(
        address, options=rpc.channel_options(max_send_bytes=-1, max_receive_bytes=-1)
    ) as channel:
        scene = Scene(engine, script, channel)
        try:
            yield scene
        finally:
            task.cancel()
            await server.stop(0)


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with serve(tmp_path, FakeTokenizer(), Limits(num_pages=100, page_tokens=4)) as running:
        yield running


def text_of(responses: list[GenerateResponse]) -> str:
    return "".join(response.delta.text for response in responses)


def kinds_of(responses: list[GenerateResponse]) -> list[str | None]:
    return [response.WhichOneof("event") for response in responses]


async def test_completion_is_accepted_then_deltas_then_one_terminal_message(scene: Scene) -> None:
    responses = await scene.all(GenerateRequest(request_id="mine", text="hi", sampling=Sampling(seed=5)))
    assert kinds_of(responses) == ["accepted", *["delta"] * 6, "finished"]
    accepted, finished = responses[0].accepted, responses[-1].finished
    assert (accepted.request_id, accepted.prompt_tokens, accepted.seed) == ("mine", 2, 5)
    assert text_of(responses) == "Hello"
    assert [token for response in responses for token in response.delta.token_ids] == [*b"Hello", EOS]
    assert finished.reason == FINISH_REASON_STOP
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (2, 6)
    assert finished.timings.decode_ns > 0
    await scene.wait_idle()


async def test_seed_and_request_id_are_made_by_the_server_if_absent(scene: Scene) -> None:
    first, second = [(await scene.all(GenerateRequest(text="hi", max_tokens=1)))[0].accepted for _ in range(2)]
    assert first.seed != second.seed
    assert first.request_id != second.request_id
    assert first.request_id


async def test_max_tokens_ends_with_length_and_default_is_the_context(scene: Scene) -> None:
    scene.script.text = b"x" * 1000
    assert (await scene.all(GenerateRequest(text="hi", max_tokens=3)))[-1].finished.reason == FINISH_REASON_LENGTH
    finished = (await scene.all(GenerateRequest(text="hi")))[-1].finished
    assert (finished.reason, finished.usage.completion_tokens) == (FINISH_REASON_LENGTH, 98)


async def test_ignore_eos_goes_on_and_own_stop_ids_count(scene: Scene) -> None:
    scene.script.text = b"a\x00bcd"
    assert text_of(await scene.all(GenerateRequest(text="hi"))) == "a"
    responses = await scene.all(GenerateRequest(text="hi", ignore_eos=True, stop_token_ids=[ord("c")]))
    assert text_of(responses) == "a\x00b"
    assert responses[-1].finished.reason == FINISH_REASON_STOP


async def test_stop_text_across_tokens_is_never_shown(scene: Scene) -> None:
    scene.script.text = "wörld END. and more".encode()
    responses = await scene.all(GenerateRequest(text="hi", stop=["END.", "zzz"]))
    assert text_of(responses) == "wörld "
    assert responses[-1].finished.reason == FINISH_REASON_STOP
    assert responses[-1].finished.usage.completion_tokens == len("wörld END.".encode())
    await scene.wait_idle()


async def test_beginning_of_a_stop_text_is_shown_after_all_at_the_end(scene: Scene) -> None:
    scene.script.text = b"go EN"
    responses = await scene.all(GenerateRequest(text="hi", stop=["END."]))
    assert text_of(responses) == "go EN"
    assert kinds_of(responses)[-1] == "finished"


async def test_stop_text_completed_by_the_last_flush_is_a_stop(scene: Scene) -> None:
    # Half a character at the end becomes U+FFFD only when nothing follows.
    scene.script.text = b"ab\xc3"
    responses = await scene.all(GenerateRequest(text="hi", stop=["\ufffd"], max_tokens=3))
    assert text_of(responses) == "ab"
    assert responses[-1].finished.reason == FINISH_REASON_STOP


async def test_logprobs_come_with_each_token(scene: Scene) -> None:
    responses = await scene.all(GenerateRequest(text="hi", logprobs=2, max_tokens=2))
    entries = [entry for response in responses for entry in response.delta.logprobs]
    assert [(entry.chosen.token_id, entry.chosen.logprob) for entry in entries] == [(ord("H"), -0.5), (ord("e"), -0.5)]
    assert [one.token_id for one in entries[0].top] == [ord("H"), 1]


async def test_chat_is_rendered(scene: Scene) -> None:
    chat = Chat(messages=[ChatMessage(role="user", content="hey")])
    responses = await scene.all(GenerateRequest(chat=chat, max_tokens=1))
    assert responses[0].accepted.prompt_tokens == len("user:hey")


def with_arguments(**arguments: float) -> Chat:
    chat = Chat(messages=[ChatMessage(role="user", content="hey")])
    chat.template_arguments.update(arguments)
    return chat


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (GenerateRequest(), "the request has no prompt"),
        (GenerateRequest(text=""), "the prompt is empty"),
        (GenerateRequest(token_ids=TokenIds()), "the prompt is empty"),
        (GenerateRequest(token_ids=TokenIds(ids=[256])), "token id 256 is outside the vocabulary of 256"),
        (GenerateRequest(token_ids=TokenIds(ids=[2**32 - 1])), "token id 4294967295 is outside"),
        (GenerateRequest(text="x" * 100), "the prompt has 100 tokens, prompt and completion together may have 100"),
        (GenerateRequest(text="x", max_tokens=100), "the model's context holds 100"),
        (GenerateRequest(text="x", max_tokens=2**32 - 1), "the model's context holds 100"),
        (GenerateRequest(text="x", max_tokens=0), "max_tokens must be >= 1, found 0"),
        (GenerateRequest(text="x", logprobs=21), "logprobs must be in"),
        (GenerateRequest(text="x", stop=[""]), "stop takes up to 16 texts, none empty"),
        (GenerateRequest(text="x", stop=["a"] * 17), "stop takes up to 16 texts"),
        (GenerateRequest(text="x", request_id="a\nb"), "request_id must be at most 128 printable"),
        (GenerateRequest(text="x", request_id="a" * 129), "request_id must be at most 128"),
        (GenerateRequest(text="x", sampling=Sampling(temperature=float("nan"))), "temperature must be >= 0"),
        (GenerateRequest(text="x", sampling=Sampling(temperature=-1)), "temperature must be >= 0"),
        (GenerateRequest(text="x", sampling=Sampling(top_p=0)), "top_p must be in"),
        (GenerateRequest(text="x", sampling=Sampling(min_p=2)), "min_p must be in"),
        (GenerateRequest(text="x", sampling=Sampling(repetition_penalty=0)), "repetition_penalty must be in"),
        (GenerateRequest(text="x", sampling=Sampling(presence_penalty=9)), "presence_penalty must be in"),
        (GenerateRequest(chat=Chat()), "a chat has 1 to 16384 messages"),
        (GenerateRequest(chat=with_arguments(**{"raise": 1})), "the chat template refuses: no"),
        (GenerateRequest(chat=with_arguments(number=float("nan"))), "template_arguments"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_bad_request_is_an_invalid_argument_with_its_reason(scene: Scene, request_: GenerateRequest, text: str) -> None:
    error = await scene.refusal(request_)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error_reason(error) == "INVALID_ARGUMENT"
    assert text in (error.details() or "")


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x12\x02\xff\xfe", b"\x3a\x01\xff"], ids=["junk", "text", "stop"])
async def test_bytes_that_are_no_message_are_an_invalid_argument(scene: Scene, data: bytes) -> None:
    call = scene.channel.unary_stream("/shardmesh.v1.Generation/Generate", request_serializer=None, response_deserializer=None)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        async for _ in call(data, timeout=5):
            pass
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error_reason(raised.value) == "INVALID_ARGUMENT"


async def test_without_tokenizer_token_ids_work_and_the_rest_is_refused(tmp_path: Path) -> None:
    async with serve(tmp_path, None, Limits(num_pages=100, page_tokens=4)) as scene:
        responses = await scene.all(GenerateRequest(token_ids=TokenIds(ids=[1, 2])))
        assert text_of(responses) == ""
        assert responses[-1].finished.usage.completion_tokens == 6
        ids = TokenIds(ids=[1])
        for request in (GenerateRequest(text="x"), GenerateRequest(token_ids=ids, stop=["x"])):
            error = await scene.refusal(request)
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "fake-model has no tokenizer.json" in (error.details() or "")


async def test_full_queue_and_full_cache_are_resource_exhausted(tmp_path: Path) -> None:
    async with serve(tmp_path, FakeTokenizer(), Limits(num_pages=5, page_tokens=4, max_running=1, max_waiting=1)) as scene:
        scene.script.steps_left = asyncio.Semaphore(1)
        scene.script.text = b"x" * 90
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await scene.all(GenerateRequest(text="c", max_tokens=20))
        assert (raised.value.code(), error_reason(raised.value)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY")
        first = scene.stub.Generate(GenerateRequest(text="a", max_tokens=9))
        await first.read()
        await first.read()
        second = scene.stub.Generate(GenerateRequest(text="b", max_tokens=9))
        await second.read()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await scene.all(GenerateRequest(text="c", max_tokens=9))
        assert (raised.value.code(), error_reason(raised.value)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        first.cancel()
        second.cancel()
        scene.script.steps_left.release()
        await scene.wait_idle()


async def test_cancelled_call_drops_its_sequence(scene: Scene) -> None:
    scene.script.text = b"x" * 90
    scene.script.steps_left = asyncio.Semaphore(3)
    call = scene.stub.Generate(GenerateRequest(text="hi"))
    for _ in range(3):
        await call.read()
    assert scene.engine.scheduler.running
    call.cancel()
    # The step under way is held: the sequence is dropped without it.
    await scene.wait_idle()
    assert scene.engine.statistics.completion_tokens == 3


async def test_deadline_ends_the_call_and_drops_its_sequence(scene: Scene) -> None:
    scene.script.text = b"x" * 90
    scene.script.steps_left = asyncio.Semaphore(1)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await scene.all(GenerateRequest(text="hi"), timeout=0.1)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await scene.wait_idle()


async def test_stop_text_stops_the_work_though_the_caller_is_slow(scene: Scene) -> None:
    scene.script.text = b"ab" + b"x" * 80
    service: Any = GenerationService(model_of(FakeTokenizer()), scene.engine, SimpleNamespace(), reshard=None)
    context = SimpleNamespace(invocation_metadata=lambda: None)
    async with contextlib.aclosing(service.Generate(GenerateRequest(text="hi", stop=["b"]), context)) as responses:
        async for response in responses:
            if response.WhichOneof("event") == "finished":
                break
        # The caller has the end in hand and the call is not over, but nothing works for it any more.
        assert not scene.engine.scheduler.waiting
        assert not scene.engine.scheduler.running


async def test_stop_text_needs_no_further_step(scene: Scene) -> None:
    scene.script.text = b"ab" + b"x" * 80
    scene.script.steps_left = asyncio.Semaphore(2)
    responses = await scene.all(GenerateRequest(text="hi", stop=["b"]))
    assert text_of(responses) == "a"
    await scene.wait_idle()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotServing("no full mesh: gone"), grpc.StatusCode.UNAVAILABLE),
        (WorkerLost("worker 1 died"), grpc.StatusCode.UNAVAILABLE),
        (MeshError("internal error"), grpc.StatusCode.INTERNAL),
    ],
)
async def test_engine_that_gives_up_ends_the_stream_with_the_error(scene: Scene, error: MeshError, code: grpc.StatusCode) -> None:
    scene.script.steps_left = asyncio.Semaphore(2)
    call = scene.stub.Generate(GenerateRequest(text="hi"))
    kinds = [(await call.read()).WhichOneof("event") for _ in range(3)]
    scene.engine.fail(error)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call.read()
    assert kinds == ["accepted", "delta", "delta"]
    assert raised.value.code() is code
    assert error_reason(raised.value) == error.reason
    assert type(from_rpc_error(raised.value, "coordinator")) is type(error)
    # What was made until then is accounted for, and nothing of it sticks to the error that others share.
    (usage,) = [detail for detail in rpc_status.from_call(raised.value).details if detail.Is(Usage.DESCRIPTOR)]
    assert Usage.FromString(usage.value) == Usage(prompt_tokens=2, completion_tokens=2)
    assert error.details == ()


async def test_refusal_is_told(scene: Scene) -> None:
    scene.engine.refusal = QueueFull("later")
    error = await scene.refusal(GenerateRequest(text="hi"))
    assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "later")


async def test_defect_reaches_no_caller(scene: Scene) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await scene.channel.unary_unary("/shardmesh.v1.Generation/GetMesh", None, None)(b"", timeout=5)
    assert raised.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in (raised.value.details() or "")


async def test_another_number_of_shards_is_passed_on_or_refused(scene: Scene) -> None:
    await scene.stub.Reshard(ReshardRequest(num_shards=MOST_SHARDS), timeout=5)
    assert scene.resharded == [MOST_SHARDS]
    for num_shards, code, text in (
        (0, grpc.StatusCode.INVALID_ARGUMENT, "num_shards must be >= 1, found 0"),
        (5, grpc.StatusCode.FAILED_PRECONDITION, "there are 4 heads"),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match=text) as raised:
            await scene.stub.Reshard(ReshardRequest(num_shards=num_shards), timeout=5)
        assert raised.value.code() is code
    assert scene.resharded == [MOST_SHARDS]


async def test_model_is_described(scene: Scene) -> None:
    model = await scene.stub.GetModel(GetModelRequest(), timeout=5)
    assert (model.model, model.family, model.context_tokens, model.vocabulary) == ("fake-model", "fake", 100, 256)
    assert list(model.eos_token_ids) == [EOS]
    assert model.has_chat_template


def test_completion_text_never_shows_half_a_character() -> None:
    text = CompletionText(model_of(FakeTokenizer()), [])
    pieces = [text.push(byte, is_text=True) for byte in "a€b".encode()]
    assert pieces == ["a", "", "", "€", "b"]
    assert text.push(EOS, is_text=False) == ""
    assert text.flush() == ""


def test_completion_text_shows_the_rest_at_the_end() -> None:
    text = CompletionText(model_of(FakeTokenizer()), ["bcd"])
    assert [text.push(byte, is_text=True) for byte in b"abc\xe2"] == ["a", "", "", ""]
    assert (text.flush(), text.stopped) == ("bc\ufffd", False)
