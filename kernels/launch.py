"""Launches of the Triton kernels: tile sizes, a step as kernels take it, and running them.

A launch is built as data and then run, so that the same description can be compiled ahead of time for a device that is
not there. Tile sizes are a pure function of batch and vocabulary: nothing is tuned, timed or synchronised on the decode
path, and a captured graph replays what eager runs.

Scratch comes from PyTorch's caching allocator at every call: ordered by stream, private to a graph under capture, and
free of state between calls.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import Layout, Step

FROM_WEIGHTS, FROM_IDS, ZERO = 0, 1, 2  # where a row's expert id comes from
FUSED = 4  # in the place of a Layout: no expert, the router's tensor already holds the fused scores
# Enough programs to give each of an H100's 132 multiprocessors eight; below that, tiles stay small.
_PROGRAMS = 8 * 132
_WAVEFRONT = 64 if torch.version.hip else 32


class Tile(NamedTuple):
    """Tokens per program, and its warps."""

    block: int
    warps: int


_TILES = (Tile(4096, 8), Tile(2048, 4), Tile(1024, 4))


def tile_for(batch: int, vocab_size: int, wavefront: int = _WAVEFRONT) -> Tile:
    """The largest tile that still gives enough programs, else the smallest; as many threads on AMD as on NVIDIA."""
    enough = (tile for tile in _TILES if batch * -(-vocab_size // tile.block) >= _PROGRAMS)
    block, warps = next(enough, _TILES[-1])
    return Tile(block, warps * 32 // wavefront)


class Launch(NamedTuple):
    """One kernel, its grid, its arguments by name, its warps. Contraction is always off."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int

    @property
    def options(self) -> dict[str, Any]:
        # Every Triton target fuses multiply and add unless told not to, which would skip a rounding.
        return {"num_warps": self.warps, "enable_fp_fusion": False}


def run(launches: list[Launch], device: torch.device) -> None:
    """Launch in order on the current stream of ``device``; an empty batch launches nothing."""
    guard: AbstractContextManager[Any] = nullcontext()
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        guard = torch.cuda.device(device)
    with guard:
        for launch in launches:
            if all(launch.grid):
                launch.kernel[launch.grid](**launch.arguments, **launch.options)


class Inputs(NamedTuple):
    """A step's tensors and numbers, as every kernel takes them; strides in elements."""

    router: Tensor  # [B, >=V]
    router_stride: int
    experts: tuple[Tensor, ...]  # as the layout says
    row_strides: tuple[int, ...]  # of the experts
    # Triton specialises numbers inside a tuple whatever it is told: 1 becomes a constant, multiples of 16 are marked.
    # Ragged experts have new ones at every step, so they travel as numbers that are neither: 32 * rows + 17.
    rows: tuple[int, ...]
    expert_stride: int  # between the experts of a stacked tensor, else 0
    selection: Tensor | None  # weights [B, n] or ids [B]
    selection_row_stride: int
    selection_column_stride: int
    alpha: float


class Plan(NamedTuple):
    """The constants that a step's kernels are compiled for."""

    V: int
    TILES: int  # per row
    BLOCK: int  # tokens per tile
    N: int  # experts; 0 where only the ids know
    BLOCK_N: int
    LAYOUT: int
    SELECTION: int
    ALIGN_ROUTER: int  # elements that divide every stride
    ALIGN_EXPERT: int
    PRODUCT: str  # dtype that alpha * expert is rounded to
    SUM: str


_ROUNDING = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def describe(step: Step, block: int) -> tuple[Inputs, Plan]:
    """A step as its kernels take it, in tiles of ``block`` tokens."""
    router, selection, experts, V = step.router, step.selection, step.experts, step.vocab_size
    if step.layout == Layout.RAGGED and selection is not None and selection.ndim == 2:
        selection = selection.argmax(dim=-1)  # a row's place in its expert's tensor is a count over earlier ids
    weights = selection is not None and selection.ndim == 2
    n = selection.shape[1] if selection is not None and weights else step.num_experts
    row_strides = tuple(expert.stride(-2) for expert in experts)
    expert_stride = experts[0].stride(0) if step.layout == Layout.STACKED else 0
    inputs = Inputs(
        router,
        router.stride(0),
        tuple(experts),
        row_strides,
        tuple(32 * expert.shape[-2] + 17 for expert in experts),
        expert_stride,
        selection,
        selection.stride(0) if selection is not None else 0,
        selection.stride(1) if selection is not None and weights else 0,
        step.alpha,
    )
    promoted = torch.promote_types(router.dtype, experts[0].dtype)
    plan = Plan(
        V,
        -(-V // block),
        block,
        n,
        power_of_2(n),
        int(step.layout),
        ZERO if selection is None else FROM_WEIGHTS if weights else FROM_IDS,
        _alignment(router.stride(0)),
        _alignment(expert_stride, *row_strides),
        _ROUNDING[experts[0].dtype] if step.round_sum else "fp32",
        _ROUNDING[promoted] if step.round_sum else "fp32",
    )
    return inputs, plan


def describe_fused(scores: Tensor, block: int) -> tuple[Inputs, Plan]:
    """Finished scores ``[B, V]`` in the place of a step."""
    step = Step(scores, None, [scores], Layout.GATHERED, 1.0, scores.shape[1], round_sum=False)
    inputs, plan = describe(step, block)
    return inputs, plan._replace(LAYOUT=FUSED)


def power_of_2(n: int) -> int:
    """The smallest power of two from ``n`` on."""
    return 1 << max(n - 1, 0).bit_length()


def _alignment(*strides: int) -> int:
    """The largest power of two up to 8 (16 bytes of bfloat16) that divides every stride, in elements."""
    return next(a for a in (8, 4, 2, 1) if all(stride % a == 0 for stride in strides))
