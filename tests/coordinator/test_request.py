"""Ranges of a request."""

from typing import Any

import pytest

from coordinator.request import Request, Sampling
from protos.errors import InvalidArgument


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[
            (name, bad)
            for name in ("temperature", "top_p", "min_p", "repetition_penalty")
            for bad in (float("nan"), float("inf"), -0.1)
        ],
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", 1.01),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 0.0099),
        ("repetition_penalty", 1e-308),
        ("repetition_penalty", 100.1),
        ("repetition_penalty", 1e308),
        ("presence_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("frequency_penalty", float("nan")),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_sampling_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InvalidArgument, match=f"{name} must be .*, found {value}".replace("+", r"\+")):
        Sampling(**{name: value})


def test_sampling_takes_the_ends_of_its_ranges() -> None:
    Sampling(temperature=0, top_k=2**32 - 1, top_p=1, min_p=1, presence_penalty=2, frequency_penalty=-2, seed=2**64 - 1)
    assert [Sampling(repetition_penalty=value).penalized for value in (0.01, 100)] == [True, True]


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ({"prompt": ()}, "the prompt is empty"),
        ({"max_tokens": 0}, "max_tokens must be >= 1, found 0"),
        ({"logprobs": 21}, r"logprobs must be in \[0, 20\], found 21"),
    ],
)
def test_request_out_of_range_is_refused(field: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        Request(**{"request_id": "r", "prompt": (1,), "max_tokens": 1, **field})


def test_penalized_is_whatever_changes_logits() -> None:
    assert not Sampling().penalized
    assert all(Sampling(**{name: 0.5}).penalized for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"))
