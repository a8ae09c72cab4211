"""The public Generation service: messages on one side, requests and tokens on the other; the only place that knows both."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from coordinator.config import QUANTIZATIONS
from coordinator.intake import read_request
from coordinator.request import FinishReason, Request
from coordinator.text.stop_texts import StopTexts
from coordinator.trace_context import bind_trace
from protos import generation_pb2, generation_pb2_grpc
from protos.errors import InvalidArgument, MeshError, NotServing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    import grpc

    from coordinator.completion import Completion
    from coordinator.engine import Engine
    from coordinator.sampler import Choice
    from coordinator.served_model import ServedModel
    from coordinator.status import MeshStatus

log = structlog.get_logger(__name__)

_REASONS = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}


@dataclass(frozen=True, slots=True)
class GenerationService(generation_pb2_grpc.GenerationServicer):
    """Serves one model."""

    model: ServedModel
    engine: Engine
    status: MeshStatus
    reshard: Callable[[int], Awaitable[None]]
    """Asks for so many shards, >= 1; raises InvalidArgument or TopologyError if the model or the settings do not allow them."""

    async def Generate(  # noqa: N802  # named by the proto
        self, message: generation_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        """Make one completion; see generation.proto."""
        # Cancellation and deadline end this generator; each call has a context of its own, which ends with it.
        bind_trace(context)
        with self.engine.arrive():
            # In a thread: it may take long.
            request = await asyncio.to_thread(read_request, message, self.model, self.engine.max_tokens)
        structlog.contextvars.bind_contextvars(request_id=request.request_id)
        text = CompletionText(self.model, message.stop)
        completion = self.engine.submit(request)
        num_tokens = 0
        try:
            accepted = generation_pb2.Accepted(
                request_id=request.request_id, prompt_tokens=len(request.prompt), seed=request.sampling.seed
            )
            yield generation_pb2.GenerateResponse(accepted=accepted)
            async for choice in completion.tokens():
                num_tokens += 1
                emitted = text.push(choice.token, is_text=choice.token not in request.stop_ids)
                yield generation_pb2.GenerateResponse(delta=_delta(choice, emitted))
                if text.stopped:
                    # At once: the caller may be slow to take the rest.
                    completion.stop()
                    break
            rest = text.flush()
            # Only now: the rest may complete a stop text.
            reason = FinishReason.STOP if text.stopped else completion.reason
            if rest:
                yield generation_pb2.GenerateResponse(delta=generation_pb2.Delta(text=rest))
            yield generation_pb2.GenerateResponse(finished=_finished(completion, request, reason, num_tokens))
        except MeshError as error:
            # A copy: others may end by the same one.
            told = copy.copy(error)
            told.details = (generation_pb2.Usage(prompt_tokens=len(request.prompt), completion_tokens=num_tokens),)
            raise told from None
        finally:
            completion.cancel()
            log.info(
                "completion ended",
                outcome=completion.outcome,
                prompt_tokens=len(request.prompt),
                completion_tokens=num_tokens,
            )

    async def GetModel(  # noqa: N802  # named by the proto
        self, message: generation_pb2.GetModelRequest, context: grpc.aio.ServicerContext
    ) -> generation_pb2.GetModelResponse:
        """Describe the model; see generation.proto."""
        del message, context
        spec, tokenizer = self.model.spec, self.model.tokenizer
        return generation_pb2.GetModelResponse(
            model=self.model.settings.model,
            family=spec.family,
            context_tokens=spec.context,
            vocabulary=spec.vocabulary,
            num_layers=spec.num_layers,
            hidden=spec.hidden,
            dtype=self.model.dtype,
            quantization=QUANTIZATIONS[self.model.settings.quantization],
            eos_token_ids=sorted(self.model.stop_ids),
            has_chat_template=tokenizer is not None and tokenizer.has_chat_template,
        )

    async def GetMesh(  # noqa: N802  # named by the proto
        self, message: generation_pb2.GetMeshRequest, context: grpc.aio.ServicerContext
    ) -> generation_pb2.GetMeshResponse:
        """Describe the mesh; see generation.proto."""
        del message, context
        return await self.status.report()

    async def Reshard(  # noqa: N802  # named by the proto
        self, message: generation_pb2.ReshardRequest, context: grpc.aio.ServicerContext
    ) -> generation_pb2.ReshardResponse:
        """Ask for another number of shards; see generation.proto."""
        bind_trace(context)
        if not message.num_shards:
            raise InvalidArgument("num_shards must be >= 1, found 0")
        await self.reshard(message.num_shards)
        # Whoever asked is bound to the line where API keys tell.
        log.info("reshard asked for", shards=message.num_shards)
        return generation_pb2.ReshardResponse()


class CompletionText:
    """The text of a completion as it grows: whole characters only, up to the first stop text."""

    def __init__(self, model: ServedModel, stops: Sequence[str]) -> None:
        """Start with nothing; `stops` were checked by `read_request`."""
        self.stopped = False
        self._detokenizer = model.tokenizer.detokenizer() if model.tokenizer else None
        self._stops = StopTexts(list(stops))

    def push(self, token: int, *, is_text: bool) -> str:
        """Return what may be shown now that `token` came; `stopped` tells whether a stop text was completed."""
        if self._detokenizer is None or not is_text:
            return ""
        emitted, self.stopped = self._stops.push(self._detokenizer.push(token))
        return emitted

    def flush(self) -> str:
        """Return what was held back, now that nothing follows."""
        if self._detokenizer is None or self.stopped:
            return ""
        emitted, self.stopped = self._stops.push(self._detokenizer.flush())
        return emitted if self.stopped else emitted + self._stops.flush()


def _delta(choice: Choice, text: str) -> generation_pb2.Delta:
    delta = generation_pb2.Delta(text=text, token_ids=[choice.token])
    if choice.logprob is not None:
        chosen = generation_pb2.TokenLogprob(token_id=choice.token, logprob=choice.logprob)
        top = [generation_pb2.TokenLogprob(token_id=token, logprob=logprob) for token, logprob in choice.top]
        delta.logprobs.add(chosen=chosen, top=top)
    return delta


def _finished(completion: Completion, request: Request, reason: FinishReason | None, num_tokens: int) -> generation_pb2.Finished:
    if reason is None:
        raise NotServing("the completion was dropped")
    timings = completion.timings
    return generation_pb2.Finished(
        reason=_REASONS[reason],
        usage=generation_pb2.Usage(prompt_tokens=len(request.prompt), completion_tokens=num_tokens),
        timings=generation_pb2.Timings(queue_ns=timings.queue_ns, prefill_ns=timings.prefill_ns, decode_ns=timings.decode_ns),
    )
