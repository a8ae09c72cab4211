"""`GenerateRequest` -> `Request`: text becomes token ids, and everything is checked that needs no mesh.

The service does it for each call; a command with a private mesh does it before it spends minutes on loading.
"""

from __future__ import annotations

import secrets
import uuid
from typing import TYPE_CHECKING

from google.protobuf.json_format import MessageToDict

from coordinator.request import Request, Sampling, check_against_model
from protos.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coordinator.served_model import ServedModel
    from protos import generation_pb2

MAX_REQUEST_ID = 128
MAX_STOP_TEXTS = 16
MAX_STOP_TOKENS = 1024
MAX_MESSAGES = 16384
"""Of a chat: an empty one takes 2 bytes of a request and hundreds of a template's memory."""
MAX_ARGUMENT_BYTES = 2**20
"""Of a template's arguments as they come: likewise."""


def read_request(message: generation_pb2.GenerateRequest, model: ServedModel, most_tokens: int) -> Request:
    """Tokenize and check; may take long for a long prompt, or for a chat template, which is somebody else's program.

    Args:
        message: as it came.
        model: that is asked.
        most_tokens: prompt and completion together, for a request without max_tokens.

    Raises:
        InvalidArgument: what the caller must change.

    """
    request_id = message.request_id or uuid.uuid4().hex
    if len(request_id) > MAX_REQUEST_ID or not request_id.isprintable():
        raise InvalidArgument(f"request_id must be at most {MAX_REQUEST_ID} printable characters")
    check_stops(message.stop, model)
    if len(message.stop_token_ids) > MAX_STOP_TOKENS:
        raise InvalidArgument(f"stop_token_ids takes up to {MAX_STOP_TOKENS}, found {len(message.stop_token_ids)}")
    prompt = _prompt(message, model)
    request = Request(
        request_id=request_id,
        prompt=tuple(prompt),
        max_tokens=message.max_tokens if message.HasField("max_tokens") else _rest(len(prompt), most_tokens),
        sampling=_sampling(message.sampling),
        stop_ids=frozenset(message.stop_token_ids) | (frozenset() if message.ignore_eos else model.stop_ids),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
    )
    check_against_model(request, model.spec.vocabulary, model.spec.context)
    return request


def check_stops(stops: Sequence[str], model: ServedModel) -> None:
    """Check stop texts.

    Raises:
        InvalidArgument: too many, an empty one, or any without a tokenizer.

    """
    if len(stops) > MAX_STOP_TEXTS or not all(stops):
        raise InvalidArgument(f"stop takes up to {MAX_STOP_TEXTS} texts, none empty")
    if stops and model.tokenizer is None:
        raise InvalidArgument(f"{model.settings.model} has no tokenizer.json: stop texts cannot be found, use stop_token_ids")


def _prompt(message: generation_pb2.GenerateRequest, model: ServedModel) -> list[int]:
    kind = message.WhichOneof("prompt")
    if kind == "token_ids":
        return list(message.token_ids.ids)
    if kind is None:
        raise InvalidArgument("the request has no prompt: send text, token_ids or chat")
    if model.tokenizer is None:
        raise InvalidArgument(f"{model.settings.model} has no tokenizer.json: send token ids")
    if kind == "text":
        return model.tokenizer.encode(message.text)
    if not 1 <= len(message.chat.messages) <= MAX_MESSAGES:
        raise InvalidArgument(f"a chat has 1 to {MAX_MESSAGES} messages, found {len(message.chat.messages)}")
    if (size := message.chat.template_arguments.ByteSize()) > MAX_ARGUMENT_BYTES:
        raise InvalidArgument(f"template_arguments may take {MAX_ARGUMENT_BYTES} bytes, found {size}")
    messages = [{"role": one.role, "content": one.content} for one in message.chat.messages]
    try:
        arguments = MessageToDict(message.chat.template_arguments)
    except ValueError as error:
        raise InvalidArgument(f"template_arguments must hold JSON values: {error}") from None
    return model.tokenizer.encode_chat(messages, arguments)


def _rest(prompt_tokens: int, most_tokens: int) -> int:
    if prompt_tokens >= most_tokens:
        raise InvalidArgument(f"the prompt has {prompt_tokens} tokens, prompt and completion together may have {most_tokens}")
    return most_tokens - prompt_tokens


def _sampling(message: generation_pb2.Sampling) -> Sampling:
    fields = {descriptor.name: value for descriptor, value in message.ListFields()}
    return Sampling(**{"seed": secrets.randbits(64), **fields})
