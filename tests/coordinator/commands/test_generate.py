"""Flags of `coordctl generate`: what is wrong is said before anything starts."""

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from coordinator.commands import generate as generate_module
from coordinator.commands.generate import Output, generate
from protos.errors import InvalidArgument
from protos.generation_pb2 import (
    FINISH_REASON_LENGTH,
    Delta,
    Finished,
    GenerateRequest,
    Timings,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)


@pytest.fixture(autouse=True)
def _nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(coroutine: Any) -> None:
        coroutine.close()
        raise AssertionError("it went on to run")

    monkeypatch.setattr(generate_module, "run", run)


def invoke(*arguments: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(generate, arguments, input=stdin)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--temperature", "nan"], "temperature must be >= 0 (0 is greedy), found nan"),
        (["--temperature", "inf"], "temperature must be"),
        (["--temperature", "-0.1"], "temperature must be >= 0"),
        (["--top-p", "0"], "top_p must be in (0, 1], found 0.0"),
        (["--top-p", "1.5"], "top_p must be in (0, 1]"),
        (["--min-p", "nan"], "min_p must be in [0, 1]"),
        (["--repetition-penalty", "0"], "repetition_penalty must be in [0.01, 100]"),
        (["--presence-penalty", "3"], "presence_penalty must be in [-2, 2]"),
        (["--frequency-penalty", "nan"], "frequency_penalty must be in"),
        (["--stop", "ok", "--stop", "\udcff"], "--stop is not valid UTF-8"),
        (["--prompt-ids", "1"], "exactly one of --prompt, --prompt-ids and --messages"),
        (["--coordinator", "host:1"], "TCP without TLS: say --insecure"),
        (["--coordinator", "nonsense"], "neither HOST:PORT nor unix:PATH"),
        *[
            (["--coordinator", "unix:/x", flag, value], f"{flag} is about an embedded mesh")
            for flag, value in [
                ("--shards", "1"),
                ("--threads", "1"),
                ("--device", "auto"),
                ("--dtype", "f32"),
                ("--quantize", "none"),
                ("--load-format", "random"),
                ("--wire", "f32"),
                ("--kv-tokens", "5"),
            ]
        ],
    ],
    ids=lambda value: " ".join(value[:2]).encode("ascii", "replace").decode() if isinstance(value, list) else "",
)
def test_bad_flag_is_one_clear_error(flags: list[str], text: str) -> None:
    result = invoke("--model", "m", "--prompt", "hi", *flags)
    assert isinstance(result.exception, InvalidArgument)
    assert text in str(result.exception)


@pytest.mark.parametrize(
    "flags",
    [
        ["--top-k", "-1"],
        ["--top-k", "4294967296"],
        ["--max-tokens", "4294967296"],
        ["--max-tokens", "x"],
        ["--seed", "-1"],
        ["--seed", str(2**64)],
        ["--logprobs", "21"],
        ["--shards", "0"],
        ["--threads", "0"],
        ["--kv-tokens", "0"],
        ["--dtype", "f64"],
        ["--quantize", "int3"],
        ["--wire", "f16"],
        ["--device", "tpu"],
        ["--temperature", "warm"],
        ["--no-such-flag"],
        ["stray"],
    ],
    ids=" ".join,
)
def test_flag_that_click_refuses_is_exit_code_2(flags: list[str]) -> None:
    result = invoke("--model", "m", "--prompt", "hi", *flags)
    assert result.exit_code == 2
    assert flags[0] in result.output


@pytest.mark.parametrize(
    "ids",
    [
        "",
        ",",
        "1,",
        "1,,2",
        "a",
        "1 2",
        "-1",
        "1.5",
        "1_0",
        "0x10",
        "٣",
        "4294967296",
        "9" * 5000,
        "0" * 11 + "9" * 5000,
        "1;2",
        "\udcff",
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_junk_in_prompt_ids_is_refused(ids: str) -> None:
    result = invoke("--model", "m", "--prompt-ids", ids)
    assert isinstance(result.exception, InvalidArgument)
    assert "--prompt-ids must be token ids separated by commas, found '" in str(result.exception)
    assert len(str(result.exception)) < 150


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", '--messages must hold JSON [{"role": "user", "content": "..."}, ...]'),
        (b"{", "--messages must hold JSON"),
        (b"\xff\xfe\x00", "--messages must hold JSON"),
        (b"[" * 100_000, "--messages must hold JSON"),
        (b"{}", "found no list of messages"),
        (b"[]", "found no list of messages"),
        (b"null", "found no list of messages"),
        (b"[1]", "found 1"),
        (b'[{"role": "user"}]', 'found {"role": "user"}'),
        (b'[{"role": "user", "content": 5}]', "found"),
        (b'[{"role": "user", "content": null}]', "found"),
        (b'[{"role": "user", "content": "hi", "name": "bob", "a": 1}]', "a message has role and content, found also a, name"),
        (b'[{"role": "user", "content": "\\ud800"}]', "--messages is not valid UTF-8"),
        (b'[{"role": "\\ud800", "content": "x"}]', "--messages is not valid UTF-8"),
    ],
    ids=lambda value: ascii(value[:20]) if isinstance(value, bytes) else "",
)
def test_bad_messages_are_refused(data: bytes, text: str) -> None:
    result = invoke("--model", "m", "--messages", "-", stdin=data)
    assert isinstance(result.exception, InvalidArgument)
    assert text in str(result.exception)


def test_missing_messages_file_is_exit_code_2(tmp_path: Path) -> None:
    result = invoke("--model", "m", "--messages", str(tmp_path / "none.json"))
    assert result.exit_code == 2
    assert "none.json" in result.output


def test_prompt_that_is_no_utf8_is_refused() -> None:
    result = invoke("--model", "m", "--prompt", "a\udcff")
    assert isinstance(result.exception, InvalidArgument)
    assert "--prompt is not valid UTF-8" in str(result.exception)


def test_prompt_and_model_are_needed() -> None:
    assert "exactly one of" in str(invoke("--model", "m").exception)
    assert "--model is needed" in str(invoke("--prompt", "hi").exception)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "m"),
        ("--coordinator", "unix:/x"),
        ("--coordinator", "h:1", "--insecure"),
        ("--coordinator", "unix:/x", "--model", "m"),
    ],
)
def test_good_flags_go_on_to_run(arguments: tuple[str, ...]) -> None:
    result = invoke("--prompt-ids", " 1, 4294967295 ,007", *arguments)
    assert str(result.exception) == "it went on to run"


def test_request_says_what_the_flags_say(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[GenerateRequest] = []
    monkeypatch.setattr(generate_module, "_generate_embedded", lambda _flags, request, _output: requests.append(request))
    monkeypatch.setattr(generate_module, "run", lambda nothing: nothing)
    flags = ["--top-k", "3", "--top-p", "0.5", "--min-p", "0.1", "--temperature", "0.7", "--stop", "a", "--stop", "b"]
    result = invoke(
        "--model",
        "m",
        "--prompt-ids",
        "1,2",
        *flags,
        "--max-tokens",
        "9",
        "--seed",
        str(2**64 - 1),
        "--ignore-eos",
        "--logprobs",
        "0",
    )
    assert result.exception is None, result.exception
    (request,) = requests
    sampling = request.sampling
    assert (sampling.top_k, sampling.top_p, sampling.min_p, sampling.temperature, sampling.seed) == (3, 0.5, 0.1, 0.7, 2**64 - 1)
    assert (list(request.stop), request.max_tokens, request.ignore_eos) == (["a", "b"], 9, True)
    assert (list(request.token_ids.ids), request.HasField("logprobs")) == ([1, 2], True)
    assert not sampling.HasField("repetition_penalty")


def deltas() -> list[Delta]:
    entry = TokenLogprobs(chosen=TokenLogprob(token_id=5, logprob=-0.5), top=[TokenLogprob(token_id=5, logprob=-0.5)])
    return [Delta(text="wör", token_ids=[5], logprobs=[entry]), Delta(text="", token_ids=[6]), Delta(text="ld\n")]


def output_of(*, as_json: bool) -> str:
    @click.command()
    def show() -> None:
        output = Output(as_json=as_json)
        output.prompt_tokens = 4
        for delta in deltas():
            output.show(delta)
        usage = Usage(prompt_tokens=4, completion_tokens=2)
        output.finish(Finished(reason=FINISH_REASON_LENGTH, usage=usage, timings=Timings(queue_ns=10**9)))

    result = CliRunner().invoke(show)
    assert result.exception is None
    return result.stdout


def test_text_is_printed_as_it_comes() -> None:
    assert output_of(as_json=False) == "wörld\n\n"


def test_json_is_one_object_and_nothing_else() -> None:
    printed = output_of(as_json=True)
    assert printed.count("\n") == 1
    assert json.loads(printed) == {
        "token_ids": [5, 6],
        "text": "wörld\n",
        "finish_reason": "length",
        "usage": {"prompt_tokens": 4, "completion_tokens": 2},
        "timings": {"queue_s": 1.0, "prefill_s": 0.0, "decode_s": 0.0},
        "logprobs": [{"token_id": 5, "logprob": -0.5, "top": [{"token_id": 5, "logprob": -0.5}]}],
    }
