"""The attention of a step: at most four launches a layer, however many sequences there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from shardworker.kernels.cuda.device import attention as device
from shardworker.kernels.cuda.device import heads as device_heads
from shardworker.kernels.cuda.frame import PROMPT_ROWS, Frame, Tables
from shardworker.kernels.cuda.tiles import COMMON

if TYPE_CHECKING:
    from shardworker.kernels.interface import HeadSpec
    from shardworker.kernels.rope import Rotation

SPLIT_TOKENS = 256
"""Tokens of a text that one program reads while decoding: fixed, so that a row's sums do not depend on the batch."""

TILE_BYTES = 16 << 10
"""Of the keys that a program reads at a time: with values, queries and the next ones on their way, below 99 KiB."""

LEAST = 16
"""Of a tile's side, for tensor cores."""


def power_of_2(count: int) -> int:
    """The least one that is not below."""
    return 1 << max(0, count - 1).bit_length()


def splits_of(tokens: int) -> int:
    """Stretches in so many tokens."""
    return -(-tokens // SPLIT_TOKENS)


@dataclass(frozen=True, slots=True, eq=False)
class HeadKernels:
    """Attention of one shard's heads over the pages of one session, with the tables of one step."""

    heads: HeadSpec
    page_tokens: int
    frame: Frame
    tables: Tables
    rotation: Rotation | None
    num_splits: int
    """Stretches of `SPLIT_TOKENS` in the longest decoding row."""

    def attend(
        self,
        qkv: torch.Tensor,
        qk_norm: torch.Tensor | None,
        mean_squares: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """See `StepAttention`; `qkv` may hold rows beyond those of the tables, which stay as they are."""
        heads = self.heads
        q = torch.empty((qkv.shape[0], heads.num_heads, heads.head_dim), dtype=heads.dtype, device=qkv.device)
        self._place(qkv.contiguous(), qk_norm, mean_squares, q, keys, values)
        out = torch.empty_like(q)
        if self.frame.decoding:
            self._decode(q, keys, values, out)
        if self.frame.tiles:
            self._read_prompts(q, keys, values, out)
        return out.view(qkv.shape[0], -1)

    def _place(  # noqa: PLR0917  # as `attend`
        self,
        qkv: torch.Tensor,
        qk_norm: torch.Tensor | None,
        mean_squares: torch.Tensor | None,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        heads = self.heads
        # Where a table is absent its place is taken by any tensor; nothing is read from it.
        cos, sin = (qkv, qkv) if self.rotation is None else self.rotation
        device_heads.place_heads[self.frame.rows, heads.num_heads + 2 * heads.num_kv_heads](
            qkv,
            qkv if qk_norm is None else qk_norm,
            qkv if mean_squares is None else mean_squares,
            cos,
            sin,
            self.tables.slots,
            q,
            keys,
            values,
            heads.qk_norm_eps,
            heads.clip_qkv,
            keys.stride(0),
            HEADS=heads.num_heads,
            KV_HEADS=heads.num_kv_heads,
            DIM=heads.head_dim,
            WIDTH=power_of_2(heads.head_dim),
            ROTARY=0 if self.rotation is None else heads.rotary_dims,
            HAS_NORM=qk_norm is not None,
            HAS_MEAN=qk_norm is not None and mean_squares is not None,
            HAS_CLIP=heads.clip_qkv != 0,
            num_warps=1,
            **COMMON,
        )

    def _decode(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
        heads, rows = self.heads, self.frame.decoding
        width = max(LEAST, power_of_2(heads.head_dim))
        parts = (rows, heads.num_heads, self.num_splits)
        mixed = torch.empty((*parts, heads.head_dim), dtype=torch.float32, device=q.device)
        best, weight = (torch.empty(parts, dtype=torch.float32, device=q.device) for _ in range(2))
        most = max(heads.kv_head_of.count(head) for head in set(heads.kv_head_of))
        device.attend_split[rows, heads.num_kv_heads, self.num_splits](
            q,
            keys,
            values,
            self.tables.decoding,
            self.tables.pages,
            self.tables.group_starts,
            mixed,
            best,
            weight,
            heads.scale,
            keys.stride(0),
            self.frame.pages,
            HEADS=heads.num_heads,
            GROUP=max(LEAST, power_of_2(most)),
            PAGE=self.page_tokens,
            SPLIT=SPLIT_TOKENS,
            STEP=self._step(width),
            DIM=heads.head_dim,
            WIDTH=width,
            num_warps=4,
            num_stages=2,
            **COMMON,
        )
        device.join_splits[rows, heads.num_heads](
            mixed,
            best,
            weight,
            self.tables.decoding,
            out,
            self.num_splits,
            HEADS=heads.num_heads,
            SPLIT=SPLIT_TOKENS,
            DIM=heads.head_dim,
            WIDTH=width,
            num_warps=1,
            **COMMON,
        )

    def _read_prompts(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
        heads = self.heads
        width = max(LEAST, power_of_2(heads.head_dim))
        device.attend_prompt[self.frame.tiles, heads.num_heads](
            q,
            keys,
            values,
            self.tables.tiles,
            self.tables.pages,
            self.tables.kv_head_of,
            out,
            heads.scale,
            keys.stride(0),
            self.frame.pages,
            HEADS=heads.num_heads,
            ROWS=PROMPT_ROWS,
            PAGE=self.page_tokens,
            STEP=self._step(width),
            DIM=heads.head_dim,
            WIDTH=width,
            num_warps=4,
            num_stages=2,
            **COMMON,
        )

    def _step(self, width: int) -> int:
        """Tokens at a time, a divisor of `SPLIT_TOKENS`."""
        return min(SPLIT_TOKENS, max(LEAST, TILE_BYTES // (width * self.heads.dtype.itemsize)))
