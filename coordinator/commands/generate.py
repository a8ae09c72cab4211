"""`coordctl generate`: one completion, from a coordinator or from a private mesh of this command."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import time
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from coordinator.client import Credentials, GenerationClient
from coordinator.commands.options import (
    caller_credentials,
    caller_options,
    device_option,
    json_option,
    mesh_options,
    model_options,
    model_settings,
)
from coordinator.commands.running import run
from coordinator.embedded import EmbeddedWorkers
from coordinator.request import MAX_TOP_LOGPROBS, Sampling
from protos import generation_pb2, rpc
from protos.errors import InvalidArgument, MeshError
from protos.log import configure_logging

MAX_UINT32 = 2**32 - 1
UINT32 = click.IntRange(0, MAX_UINT32)

_FINISH_REASONS = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
}

_REMOTE_ONLY = ("tls", "api_key_file")
_EMBEDDED_ONLY = ("shards", "threads", "device", "dtype", "quantize", "load_format", "wire", "kv_tokens")


@click.command()
@click.option("--model", help="Folder or hub id; with --coordinator only checked against what it serves.")
@click.option("--prompt", help="Text as it is, with the tokenizer's own special tokens.")
@click.option("--prompt-ids", metavar="1,2,3", help="Token ids.")
@click.option(
    "--messages", type=click.File("rb"), metavar="FILE|-", help='JSON [{"role": ..., "content": ...}], for the chat template.'
)
@click.option("--shards", type=click.IntRange(min=1), default=1, show_default=True, help="Workers of the embedded mesh.")
@click.option("--threads", type=click.IntRange(1, 4096), help="Of each embedded worker; default: the cores, shared evenly.")
@device_option
@model_options
@mesh_options
@click.option("--max-tokens", type=click.IntRange(1, MAX_UINT32), help="Default: up to the end of the context.")
@click.option("--temperature", type=float, help="0 (default) is greedy.")
@click.option("--top-k", type=UINT32, help="Only the K most likely tokens.")
@click.option("--top-p", type=float, help="Only the most likely tokens that together reach P.")
@click.option("--min-p", type=float, help="Only tokens at least P times as likely as the most likely one.")
@click.option("--repetition-penalty", type=float, help="Divides the logits of seen tokens.")
@click.option("--presence-penalty", type=float, help="Subtracted from the logits of generated tokens.")
@click.option("--frequency-penalty", type=float, help="Subtracted once per occurrence.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Same seed, same mesh, same text.")
@click.option("--stop", multiple=True, help="Text that ends the completion; may be given several times.")
@click.option("--ignore-eos", is_flag=True, help="Go on after end-of-sequence tokens.")
@click.option(
    "--logprobs",
    type=click.IntRange(0, MAX_TOP_LOGPROBS),
    help="Log probabilities of each token and N alternatives (with --json).",
)
@click.option("--coordinator", metavar="HOST:PORT", help="Ask this coordinator instead of starting a private mesh.")
@caller_options
@json_option
@click.pass_context
def generate(context: click.Context, /, **flags: Any) -> None:  # noqa: ANN401  # click's own dict of flags
    """Generate text from a prompt, a chat or token ids."""
    configure_logging("error")
    request = _request(flags)
    if flags["coordinator"]:
        _refuse_embedded_flags(context)
        address = rpc.check_address(flags["coordinator"], insecure=flags["insecure"], tls=flags["tls"] is not None)
        credentials = caller_credentials(flags)
        run(_generate_remotely(address, credentials, flags["model"], request, Output(as_json=flags["as_json"])))
        return
    _refuse_remote_flags(context)
    if not flags["model"]:
        raise InvalidArgument("--model is needed: a folder with config.json and safetensors, or a hub id")
    run(_generate_embedded(flags, request, Output(as_json=flags["as_json"])))


@dataclass(slots=True)
class Output:
    """What a person, or a program, sees of a completion."""

    as_json: bool
    started: float = field(default_factory=time.monotonic)
    load_s: float | None = None
    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    prompt_tokens: int = 0

    def note_loaded(self) -> None:
        """Note that the mesh is ready."""
        self.load_s = time.monotonic() - self.started

    def show(self, delta: generation_pb2.Delta) -> None:
        """Show new text."""
        self.token_ids += delta.token_ids
        self.text.append(delta.text)
        for entry in delta.logprobs:
            top = [{"token_id": other.token_id, "logprob": other.logprob} for other in entry.top]
            self.logprobs.append({"token_id": entry.chosen.token_id, "logprob": entry.chosen.logprob, "top": top})
        if delta.text and not self.as_json:
            click.echo(delta.text, nl=False)

    def finish(self, finished: generation_pb2.Finished) -> None:
        """Show the end of the completion."""
        if self.as_json:
            timings = finished.timings
            seconds = {
                "queue_s": timings.queue_ns / 1e9,
                "prefill_s": timings.prefill_ns / 1e9,
                "decode_s": timings.decode_ns / 1e9,
            }
            self._print_json(_FINISH_REASONS[finished.reason], finished.usage.completion_tokens, seconds)
            return
        click.echo()
        if self.token_ids and not any(self.text):
            click.echo("coordctl: these tokens have no text; --json shows their ids", err=True)
        steps, decode_s = len(self.token_ids) - 1, finished.timings.decode_ns / 1e9
        if sys.stderr.isatty() and steps > 0 and decode_s > 0:
            click.echo(click.style(f"[{len(self.token_ids)} tokens, {steps / decode_s:.1f} tokens/s]", dim=True), err=True)

    def cancel(self) -> None:
        """Show that the person at the keyboard had enough."""
        if self.as_json:
            self._print_json("cancelled", len(self.token_ids), {})
        else:
            click.echo()

    def _print_json(self, reason: str, completion_tokens: int, seconds: dict[str, float]) -> None:
        result: dict[str, Any] = {
            "token_ids": self.token_ids,
            "text": "".join(self.text),
            "finish_reason": reason,
            "usage": {"prompt_tokens": self.prompt_tokens, "completion_tokens": completion_tokens},
            "timings": seconds if self.load_s is None else {"load_s": self.load_s, **seconds},
        }
        if self.logprobs:
            result["logprobs"] = self.logprobs
        click.echo(json.dumps(result, ensure_ascii=False))


async def _generate_embedded(flags: dict[str, Any], request: generation_pb2.GenerateRequest, output: Output) -> None:
    async with AsyncExitStack() as stack:
        workers = await stack.enter_async_context(EmbeddedWorkers(flags["shards"], flags["device"], flags["threads"]))
        # torch takes seconds to import: here they pass while the workers do the same, and a remote call needs none of it.
        private_mesh = await asyncio.to_thread(importlib.import_module, "coordinator.private_mesh")
        coordinator = await private_mesh.start_private_mesh(workers, model_settings(flags), flags["kv_tokens"], request)
        stack.push_async_callback(coordinator.stop, grace_s=0)
        output.note_loaded()
        client = await stack.enter_async_context(GenerationClient(coordinator.address))
        await _stream(client, request, output)


async def _generate_remotely(
    address: str, credentials: Credentials, model: str | None, request: generation_pb2.GenerateRequest, output: Output
) -> None:
    async with GenerationClient(address, credentials) as client:
        if model and not _same_model(model, served := (await client.model()).model):
            raise InvalidArgument(f"--model is {model}, but {address} serves {served}")
        await _stream(client, request, output)


def _same_model(one: str, other: str) -> bool:
    """Whether two values of --model mean the same: equal hub ids, or one folder."""
    return one == other or Path(one).resolve() == Path(other).resolve()


async def _stream(client: GenerationClient, request: generation_pb2.GenerateRequest, output: Output) -> None:
    try:
        async with aclosing(client.generate(request)) as responses:
            async for response in responses:
                match response.WhichOneof("event"):
                    case "accepted":
                        output.prompt_tokens = response.accepted.prompt_tokens
                    case "delta":
                        output.show(response.delta)
                    case "finished":
                        output.finish(response.finished)
                        return
    except asyncio.CancelledError:
        output.cancel()
        raise
    raise MeshError("the coordinator ended the stream without a terminal message")


def _request(flags: dict[str, Any]) -> generation_pb2.GenerateRequest:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
    given = {name: flags[name] for name in names if flags[name] is not None}
    # Checked here too, before anything is started.
    Sampling(**given)
    for text in flags["stop"]:
        _utf8("--stop", text)
    request = generation_pb2.GenerateRequest(
        sampling=generation_pb2.Sampling(**given),
        max_tokens=flags["max_tokens"],
        stop=flags["stop"],
        ignore_eos=flags["ignore_eos"],
        logprobs=flags["logprobs"],
    )
    _set_prompt(request, flags)
    return request


def _set_prompt(request: generation_pb2.GenerateRequest, flags: dict[str, Any]) -> None:
    kinds = ("prompt", "prompt_ids", "messages")
    if sum(flags[kind] is not None for kind in kinds) != 1:
        raise InvalidArgument("exactly one of --prompt, --prompt-ids and --messages is needed")
    if flags["prompt"] is not None:
        request.text = _utf8("--prompt", flags["prompt"])
    elif flags["prompt_ids"] is not None:
        request.token_ids.ids.extend(_token_ids(flags["prompt_ids"]))
    else:
        request.chat.messages.extend(_messages(flags["messages"].read()))


def _utf8(flag: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(f"{flag} is not valid UTF-8") from None
    return text


def _token_ids(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if junk := [part for part in parts if not _is_token_id(part)]:
        raise InvalidArgument(f"--prompt-ids must be token ids separated by commas, found {junk[0][:40]!r}")
    return [int(part) for part in parts]


def _is_token_id(text: str) -> bool:
    # `int` alone would take 1_0 and other scripts' digits, and refuses thousands of digits in its own words.
    return text.isascii() and text.isdecimal() and len(text) <= len(str(MAX_UINT32)) and int(text) <= MAX_UINT32


def _messages(data: bytes) -> list[generation_pb2.ChatMessage]:
    wanted = '--messages must hold JSON [{"role": "user", "content": "..."}, ...]'
    try:
        messages = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{wanted}: {error}") from None
    if not isinstance(messages, list) or not messages:
        raise InvalidArgument(f"{wanted}, found no list of messages")
    result = []
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InvalidArgument(f"{wanted}, found {json.dumps(message)[:80]}")
        if unknown := set(message) - {"role", "content"}:
            raise InvalidArgument(f"--messages: a message has role and content, found also {', '.join(sorted(unknown))}")
        texts = {key: _utf8("--messages", message[key]) for key in ("role", "content")}
        result.append(generation_pb2.ChatMessage(**texts))
    return result


def _refuse_embedded_flags(context: click.Context) -> None:
    for flag in _given(context, _EMBEDDED_ONLY):
        raise InvalidArgument(f"{flag} is about an embedded mesh; with --coordinator the mesh is what it is")


def _refuse_remote_flags(context: click.Context) -> None:
    for flag in _given(context, _REMOTE_ONLY):
        raise InvalidArgument(f"{flag} is for calling a coordinator: give --coordinator too")


def _given(context: click.Context, names: tuple[str, ...]) -> list[str]:
    from_line = click.core.ParameterSource.COMMANDLINE
    return ["--" + name.replace("_", "-") for name in names if context.get_parameter_source(name) is from_line]
