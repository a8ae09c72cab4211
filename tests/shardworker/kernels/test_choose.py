from __future__ import annotations

import sys
from unittest.mock import Mock

import pytest
import torch

from protos.errors import InvalidArgument
from shardworker.kernels import choose
from shardworker.kernels.choose import choose_kernels
from shardworker.kernels.plain import PlainKernels

CPU = torch.device("cpu")


def test_a_cpu_gets_compiled_kernels() -> None:
    compiled = pytest.importorskip("shardworker.kernels.compiled", reason="no C compiler", exc_type=ImportError)
    kernels = choose_kernels(CPU, 1)
    assert isinstance(kernels, compiled.CompiledKernels)
    assert kernels.name == compiled.VARIANTS[0]


def test_a_cpu_without_compiled_kernels_gets_torch_and_the_log_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shardworker.kernels.compiled", None)
    warned = Mock()
    monkeypatch.setattr(choose, "log", warned)
    assert isinstance(choose_kernels(CPU, 1), PlainKernels)
    assert [call.args for call in warned.warning.call_args_list] == [
        ("no compiled kernels: install with a C compiler for speed",)
    ]


def test_threads_that_cannot_be_had_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = pytest.importorskip("shardworker.kernels.compiled", reason="no C compiler", exc_type=ImportError)

    def no_threads(num_threads: int) -> None:
        raise OSError(f"{num_threads} threads cannot be had")

    monkeypatch.setattr(compiled._operations, "create_pool", no_threads)
    with pytest.raises(InvalidArgument, match="3 threads cannot be had: ask for fewer with --threads"):
        choose_kernels(CPU, 3)
