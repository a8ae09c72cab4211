"""What is wrong with a request is said without a mesh."""

from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf.struct_pb2 import Struct

from coordinator.intake import read_request
from protos.errors import InvalidArgument
from protos.generation_pb2 import Chat, ChatMessage, GenerateRequest, TokenIds

EOS = 9


def _model(*, tokenizer: bool = True) -> Any:
    reader = SimpleNamespace(encode=lambda text: [ord(letter) for letter in text])
    return SimpleNamespace(
        spec=SimpleNamespace(vocabulary=128, context=20),
        tokenizer=reader if tokenizer else None,
        settings=SimpleNamespace(model="some/model"),
        stop_ids=frozenset({EOS}),
    )


def _arguments(num_bytes: int) -> Struct:
    arguments = Struct()
    arguments.update({"a": "x" * num_bytes})
    return arguments


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (GenerateRequest(), "the request has no prompt"),
        (GenerateRequest(text=""), "the prompt is empty"),
        (GenerateRequest(token_ids=TokenIds()), "the prompt is empty"),
        (GenerateRequest(token_ids=TokenIds(ids=[128])), "token id 128 is outside the vocabulary of 128"),
        (GenerateRequest(chat=Chat()), "a chat has 1 to 16384 messages, found 0"),
        (GenerateRequest(chat=Chat(messages=[ChatMessage()] * 16385)), "a chat has 1 to 16384 messages, found 16385"),
        (GenerateRequest(chat=Chat(messages=[ChatMessage()], template_arguments=_arguments(2**20))), "may take 1048576 bytes"),
        (GenerateRequest(text="x", stop_token_ids=range(1025)), "stop_token_ids takes up to 1024, found 1025"),
        (GenerateRequest(text="x", max_tokens=0), "max_tokens must be >= 1, found 0"),
        (GenerateRequest(text="x" * 10, max_tokens=11), "are 21 tokens together, the model's context holds 20"),
        (GenerateRequest(text="x" * 15), "the prompt has 15 tokens, prompt and completion together may have 15"),
        (GenerateRequest(text="x", stop=[""]), "none empty"),
        (GenerateRequest(text="x", stop=["y"] * 17), "up to 16 texts"),
        (GenerateRequest(text="x", request_id="a\nb"), "request_id must be at most 128 printable characters"),
        (GenerateRequest(text="x", request_id="a" * 129), "request_id must be"),
        (GenerateRequest(text="x", logprobs=21), "logprobs must be in"),
    ],
)
def test_request_that_no_mesh_could_serve_is_refused(message: GenerateRequest, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        read_request(message, _model(), most_tokens=15)


@pytest.mark.parametrize(
    "message", [GenerateRequest(text="x"), GenerateRequest(token_ids=TokenIds(ids=[1]), stop=["end"])], ids=["text", "stop"]
)
def test_model_without_a_tokenizer_takes_ids_only(message: GenerateRequest) -> None:
    with pytest.raises(InvalidArgument, match=r"some/model has no tokenizer\.json"):
        read_request(message, _model(tokenizer=False), most_tokens=15)


def test_absent_fields_get_their_defaults() -> None:
    request = read_request(GenerateRequest(text="abc", stop_token_ids=[4]), _model(), most_tokens=15)
    assert request.prompt == (97, 98, 99)
    assert request.max_tokens == 12
    assert request.stop_ids == {4, EOS}
    assert len(request.request_id) == 32
    other = read_request(GenerateRequest(text="abc", ignore_eos=True), _model(), most_tokens=15)
    assert other.stop_ids == frozenset()
    assert other.sampling.seed != request.sampling.seed
