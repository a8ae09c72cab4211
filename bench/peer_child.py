"""One run of a peer, as one JSON object: `bench/peers.py` starts this with the interpreter that has the peer.

    python bench/peer_child.py llama.cpp model.gguf --threads 2 --prompt-tokens 512 --new-tokens 64 --repeats 3

What is timed is the peer's evaluation alone: a prompt of random ids in one call, with the last row's logits; then greedy tokens
one by one. Choosing a token and passing it on, which a caller of `coordctl bench` waits for too, are left out. One unmeasured
repeat comes first. Nothing of shardmesh is imported: the interpreter need not have it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import statistics
import sys
import time
from typing import Any, Protocol

SEED = 0
LOG_ERROR = 4
"""llama.cpp's level."""


class Peer(Protocol):
    """A loaded model with a cache."""

    vocabulary: int

    def clear(self) -> None:
        """Forget all tokens."""

    def evaluate(self, ids: list[int]) -> None:
        """Append tokens; returns when the last one's logits are there."""

    def best(self) -> int:
        """Id with the highest of the last logits."""

    def describe(self) -> dict[str, str]:
        """Version, and what the numbers depend on."""


class LlamaCpp:
    """llama.cpp by its C interface, everything that is not asked for at its default: as llama-bench runs it."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        """Load a GGUF file, with room for `context` tokens."""
        import llama_cpp  # type: ignore[import-not-found]  # noqa: PLC0415  # in one of two environments
        import numpy as np  # noqa: PLC0415  # comes with it

        self._api, self._np = llama_cpp, np
        # Kept here: llama.cpp calls it as long as it runs.
        self._log = llama_cpp.llama_log_callback(_log_errors)
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            sys.exit(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch = context, max(context, params.n_batch)
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self.vocabulary: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def clear(self) -> None:
        """Forget all tokens."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)

    def evaluate(self, ids: list[int]) -> None:
        """Append tokens; returns when the last one's logits are there."""
        # A batch points into the array, and does not keep it.
        tokens = (self._api.llama_token * len(ids))(*ids)
        if status := self._api.llama_decode(self._context, self._api.llama_batch_get_one(tokens, len(ids))):
            sys.exit(f"llama.cpp failed on {len(ids)} tokens with status {status}")
        self._api.llama_synchronize(self._context)

    def best(self) -> int:
        """Id with the highest of the last logits."""
        logits = self._api.llama_get_logits_ith(self._context, -1)
        return int(self._np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())

    def describe(self) -> dict[str, str]:
        """Version of the binding, and what llama.cpp was built for."""
        return {"llama-cpp-python": self._api.__version__, "system": self._api.llama_print_system_info().decode().strip()}


class Transformers:
    """transformers with random weights in bf16, experts by its default implementation."""

    def __init__(self, path: str, threads: int) -> None:
        """Make a model of the config.json in the folder `path`."""
        import torch  # noqa: PLC0415  # in one of two environments
        import transformers  # noqa: PLC0415  # likewise

        self._torch, self._version = torch, transformers.__version__
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        config = transformers.AutoConfig.from_pretrained(path)
        self._model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        self.vocabulary: int = config.vocab_size
        self._cache: Any = None
        self._logits = torch.empty(0)

    def clear(self) -> None:
        """Forget all tokens."""
        self._cache = None

    def evaluate(self, ids: list[int]) -> None:
        """Append tokens; returns when the last one's logits are there."""
        tokens = self._torch.tensor([ids])
        output = self._model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache, self._logits = output.past_key_values, output.logits[0, -1]

    def best(self) -> int:
        """Id with the highest of the last logits."""
        return int(self._logits.argmax())

    def describe(self) -> dict[str, str]:
        """Versions, and the instructions torch uses."""
        torch = self._torch
        return {"transformers": self._version, "torch": torch.__version__, "system": torch.backends.cpu.get_cpu_capability()}


def measure(peer: Peer, prompt_tokens: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Tokens per second of the prompt and of the tokens after the first, which belongs to it."""
    prompts = random.Random(SEED)  # noqa: S311  # no secret
    prefill, decode = [], []
    for repeat in range(repeats + 1):
        ids = prompts.choices(range(peer.vocabulary), k=prompt_tokens)
        peer.clear()
        prompt_s = _seconds(peer, ids)
        token_s = [_seconds(peer, [peer.best()]) for _ in range(new_tokens - 1)]
        if repeat:
            prefill.append(prompt_tokens / prompt_s)
            decode.append(len(token_s) / sum(token_s))
    return {
        "prefill": {"tokens_per_s": _spread(prefill)},
        "decode": {"tokens_per_s": _spread(decode)},
        "peer": peer.describe(),
    }


def _seconds(peer: Peer, ids: list[int]) -> float:
    start = time.perf_counter()
    peer.evaluate(ids)
    return time.perf_counter() - start


def _spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _log_errors(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    if level == LOG_ERROR:
        sys.stderr.write(text.decode(errors="replace"))


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["llama.cpp", "transformers"])
    parser.add_argument("model", help="a GGUF file for llama.cpp, a folder with config.json for transformers")
    for name in ("threads", "prompt-tokens", "new-tokens", "repeats"):
        parser.add_argument(f"--{name}", type=int, required=True)
    flags = parser.parse_args()
    peer: Peer
    if flags.peer == "llama.cpp":
        peer = LlamaCpp(flags.model, flags.threads, flags.prompt_tokens + flags.new_tokens)
    else:
        peer = Transformers(flags.model, flags.threads)
    sys.stdout.write(json.dumps(measure(peer, flags.prompt_tokens, flags.new_tokens, flags.repeats)) + "\n")


if __name__ == "__main__":
    main()
