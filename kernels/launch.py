"""From a checked step to kernel launches: tile sizes, scratch, arguments.

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

from .arguments import Form, Step
from .reference import Filters

_FROM_WEIGHTS, _FROM_IDS, _ZERO = 0, 1, 2  # triton_tiles
_NO_EXPERT = 4
# Enough programs to give each of an H100's 132 multiprocessors eight; below that, tiles stay small.
_PROGRAMS = 8 * 132
_WAVEFRONT = 64 if torch.version.hip else 32


class Tile(NamedTuple):
    """Tokens per program, and its warps."""

    block: int
    warps: int


_TILES = (Tile(4096, 8), Tile(2048, 4), Tile(1024, 4))
_ROW_TILE = Tile(1024, 16)  # of the threshold search, which walks a whole row


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


def tile_for(batch: int, vocab_size: int, wavefront: int = _WAVEFRONT) -> Tile:
    """The largest tile that still gives enough programs, else the smallest; as many threads on AMD as on NVIDIA."""
    enough = (tile for tile in _TILES if batch * -(-vocab_size // tile.block) >= _PROGRAMS)
    block, warps = next(enough, _TILES[-1])
    return Tile(block, warps * 32 // wavefront)


def run(launches: list[Launch], device: torch.device) -> None:
    """Launch in order on the current stream of ``device``."""
    guard: AbstractContextManager[Any] = nullcontext()
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        guard = torch.cuda.device(device)
    with guard:
        for launch in launches:
            launch.kernel[launch.grid](**launch.arguments, **launch.options)


class Tokens(NamedTuple):
    """Outputs of :func:`tokens`, each ``[B]``; what was not asked for is None."""

    token_ids: Tensor
    expert_ids: Tensor
    logits: Tensor | None
    logprobs: Tensor | None
    scores: Tensor | None


def tokens(step: Step, given: Tensor | None, logprobs: bool, tile: Tile | None = None) -> tuple[Tokens, list[Launch]]:
    """Argmax (unless token ids are given) and log-probabilities (if asked for)."""
    from .triton_select import finish_kernel, partial_kernel

    step = _with_ids(step)
    B, V, device = step.batch, step.vocab_size, step.router.device
    tile = tile or tile_for(B, V)
    count = -(-V // tile.block)
    argmax = given is None
    token_ids = torch.empty(B, dtype=torch.int64, device=device) if given is None else given.contiguous()
    out = Tokens(
        token_ids,
        torch.empty(B, dtype=torch.int64, device=device),
        torch.empty(B, dtype=torch.float32, device=device) if argmax else None,
        torch.empty(B, dtype=torch.float32, device=device) if logprobs else None,
        torch.empty(B, dtype=torch.float32, device=device) if logprobs else None,
    )
    partials = torch.empty(2, B, count, dtype=torch.int32, device=device) if argmax else (None, None)
    scratch = {
        "keys_ptr": partials[0],
        "indices_ptr": partials[1],
        "sums_ptr": torch.empty(6, B, count, dtype=torch.float32, device=device) if logprobs else None,
        "expert_ids_ptr": out.expert_ids,
        "expert_rows_ptr": torch.empty(B, dtype=torch.int32, device=device) if logprobs else None,
    }
    fused = _fused_arguments(step)
    partial = {
        **fused,
        "batch": B,
        **scratch,
        **_shape(V, tile.block),
        "ARGMAX": argmax,
        "LOGPROBS": logprobs,
    }
    kept = finish_kernel.arg_names
    finish = {
        **{name: value for name, value in fused.items() if name in kept},
        **scratch,
        "batch": B,
        "tokens_ptr": out.token_ids,
        "logits_ptr": out.logits,
        "logprobs_ptr": out.logprobs,
        "scores_ptr": out.scores,
        "V": V,
        "TILES": count,
        "BLOCK_TILES": _power_of_2(count),
        "GIVEN": not argmax,
        "LOGPROBS": logprobs,
    }
    return out, [
        Launch(partial_kernel, (B * count,), partial, tile.warps),
        Launch(finish_kernel, (B,), finish, 1),
    ]


def add(step: Step, tile: Tile | None = None, temperature: Any = None) -> tuple[Tensor, Tensor, list[Launch]]:
    """Fused logits ``[B, V]`` float32 (over the temperature, if one is given) and expert ids."""
    from .triton_select import add_kernel

    step = _with_ids(step)
    B, V, device = step.batch, step.vocab_size, step.router.device
    tile = tile or tile_for(B, V)
    out = torch.empty(B, V, dtype=torch.float32, device=device)
    ids = torch.empty(B, dtype=torch.int64, device=device)
    arguments = {
        **_fused_arguments(step),
        "temperature": temperature,
        "out_ptr": out,
        "expert_ids_ptr": ids,
        **_shape(V, tile.block),
        "DIVIDE": temperature is not None,
        "PER_ROW_TEMPERATURE": isinstance(temperature, Tensor),
    }
    return out, ids, [Launch(add_kernel, (B * arguments["TILES"],), arguments, tile.warps)]


def sample(
    step: Step,
    filters: Filters,
    seed: Tensor | None,
    position: Tensor | int | None,
    noise: Tensor | None,
    tile: Tile | None = None,
    row_tile: Tile = _ROW_TILE,
) -> tuple[Tensor, Tensor, list[Launch]]:
    """Token ids and expert ids of a draw. ``filters`` may hold plain numbers in place of tensors."""
    from .triton_sample import sample_kernel, threshold_kernel
    from .triton_select import finish_kernel

    step = _with_ids(step)
    B, V, device = step.batch, step.vocab_size, step.router.device
    tile = tile or tile_for(B, V)
    launches: list[Launch] = []
    thresholds = None
    ids = torch.empty(B, dtype=torch.int64, device=device)
    arguments = _fused_arguments(step)
    filtered = any(parameter is not None for parameter in filters[1:])
    if filtered:
        scores, ids, launches = add(step, tile, filters.temperature)
        thresholds = torch.empty(B, dtype=torch.int32, device=device)
        threshold = {
            "scores_ptr": scores,
            "thresholds_ptr": thresholds,
            "top_k": filters.top_k,
            "top_p": filters.top_p,
            "log_min_p": filters.log_min_p,
            "V": V,
            "BLOCK": row_tile.block,
            "TOP_K": _kind(filters.top_k),
            "TOP_P": _kind(filters.top_p),
            "MIN_P": _kind(filters.log_min_p),
        }
        launches.append(Launch(threshold_kernel, (B,), threshold, row_tile.warps))
        arguments = _fused_arguments(step._replace(router=scores, selection=None, experts=[scores]), no_expert=True)
    shape = _shape(V, tile.block)
    partials = torch.empty(2, B, shape["TILES"], dtype=torch.int32, device=device)
    draw = {
        **arguments,
        "temperature": filters.temperature,
        "seeds_ptr": seed,
        "step": position,
        "thresholds_ptr": thresholds,
        "noise_ptr": noise,
        "noise_stride": noise.stride(0) if noise is not None else 0,
        "keys_ptr": partials[0],
        "indices_ptr": partials[1],
        "expert_ids_ptr": ids,
        **shape,
        "PER_ROW_TEMPERATURE": isinstance(filters.temperature, Tensor),
        "PER_ROW_STEP": isinstance(position, Tensor),
        "FILTERED": filtered,
        "NOISE": noise is not None,
    }
    launches.append(Launch(sample_kernel, (B * shape["TILES"],), draw, tile.warps))
    token_ids = torch.empty(B, dtype=torch.int64, device=device)
    finish = _finish(partials, token_ids, V, shape["TILES"])
    launches.append(Launch(finish_kernel, (B,), finish, 1))
    return token_ids, ids, launches


def _with_ids(step: Step) -> Step:
    """Ragged experts need every row's id in each program (a row's place is a count over earlier rows)."""
    if step.form == Form.RAGGED and step.selection is not None and step.selection.ndim == 2:
        return step._replace(selection=step.selection.argmax(dim=-1))
    return step


def _fused_arguments(step: Step, no_expert: bool = False) -> dict[str, Any]:
    """The arguments of triton_tiles.fused_tile that do not depend on the tile."""
    selection, experts = step.selection, step.experts
    weights = selection is not None and selection.ndim == 2
    n = selection.shape[1] if selection is not None and weights else step.num_experts
    strides = tuple(expert.stride(-2) for expert in experts)
    expert_stride = experts[0].stride(0) if step.form == Form.STACKED else 0
    promoted = torch.promote_types(step.router.dtype, experts[0].dtype)
    return {
        "router_ptr": step.router,
        "router_stride": step.router.stride(0),
        "expert_ptrs": tuple(experts),
        "expert_strides": strides,
        # Triton's launcher specialises numbers inside a tuple whatever it is told: 1 becomes a constant, multiples of
        # 16 are marked. Ragged experts have new ones at every step, so they travel as numbers that are neither.
        "expert_rows": tuple(32 * expert.shape[-2] + 17 for expert in experts),
        "expert_stride": expert_stride,
        "selection_ptr": selection,
        "selection_row_stride": selection.stride(0) if selection is not None else 0,
        "selection_column_stride": selection.stride(1) if selection is not None and weights else 0,
        "alpha": step.alpha,
        "N": n,
        "BLOCK_N": _power_of_2(n),
        "FORM": _NO_EXPERT if no_expert else int(step.form),
        "SELECTION": _ZERO if selection is None else _FROM_WEIGHTS if weights else _FROM_IDS,
        "ALIGN_ROUTER": _alignment(step.router.stride(0)),
        "ALIGN_EXPERT": _alignment(expert_stride, *strides),
        "PRODUCT": _ROUNDING[experts[0].dtype] if step.round_sum else "fp32",
        "SUM": _ROUNDING[promoted] if step.round_sum else "fp32",
    }


_ROUNDING = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _finish(partials: Tensor, tokens: Tensor, vocab_size: int, count: int) -> dict[str, Any]:
    """Arguments of a finish that only picks the best partial: no logits are looked at, so none are passed."""
    from .triton_select import finish_kernel

    return {
        **dict.fromkeys(finish_kernel.arg_names),
        "keys_ptr": partials[0],
        "indices_ptr": partials[1],
        "tokens_ptr": tokens,
        "V": vocab_size,
        "TILES": count,
        "BLOCK_TILES": _power_of_2(count),
        "GIVEN": False,
        "LOGPROBS": False,
    }


def _shape(vocab_size: int, block: int) -> dict[str, int]:
    return {"V": vocab_size, "TILES": -(-vocab_size // block), "BLOCK": block}


def _alignment(*strides: int) -> int:
    """The largest power of two up to 8 (16 bytes of bfloat16) that divides every stride, in elements."""
    return next(a for a in (8, 4, 2, 1) if all(stride % a == 0 for stride in strides))


def _kind(parameter: Any) -> int:
    return 0 if parameter is None else 2 if isinstance(parameter, Tensor) else 1


def _power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


_HEAD_TILE = Tile(64, 4)  # tokens per program: two float32 accumulators leave room for no more
_HEAD_ROWS = 16  # the smallest side of a matrix unit
_HEAD_DEPTH_BYTES = 128  # of a hidden state, per step of the product; more spills


def lm_heads(
    router_hidden: Tensor,
    router_head: Tensor,
    ids: Tensor,
    expert_hidden: Tensor,
    heads: list[Tensor],
    alpha: float,
    vocab_size: int,
) -> tuple[Tensor, list[Launch]]:
    """Token ids from hidden states. Sorting the rows by expert is left to PyTorch: B numbers, without a wait."""
    from .triton_lm_head import lm_head_kernel
    from .triton_select import finish_kernel

    B, n, device = router_hidden.shape[0], len(heads), router_hidden.device
    count = -(-vocab_size // _HEAD_TILE.block)
    order = ids.argsort(stable=True)
    starts = torch.searchsorted(ids[order], torch.arange(n + 1, device=device))
    partials = torch.zeros(2, B, count, dtype=torch.int32, device=device)  # rows of no expert are never written
    tokens = torch.empty(B, dtype=torch.int64, device=device)
    arguments = {
        "router_hidden_ptr": router_hidden,
        "router_hidden_stride": router_hidden.stride(0),
        "router_head_ptr": router_head,
        "router_head_stride": router_head.stride(0),
        "expert_hidden_ptr": expert_hidden,
        "expert_hidden_stride": expert_hidden.stride(0),
        "expert_head_ptrs": tuple(heads),
        "expert_head_strides": tuple(head.stride(0) for head in heads),
        "order_ptr": order,
        "starts_ptr": starts,
        "alpha": alpha,
        "keys_ptr": partials[0],
        "indices_ptr": partials[1],
        "V": vocab_size,
        "TILES": count,
        "N": n,
        "D_ROUTER": router_hidden.shape[1],
        "D_EXPERT": expert_hidden.shape[1],
        "BLOCK": _HEAD_TILE.block,
        "ROWS": _HEAD_ROWS,
        "BLOCK_D": _HEAD_DEPTH_BYTES // max(router_head.element_size(), heads[0].element_size()),
    }
    finish = _finish(partials, tokens, vocab_size, count)
    return tokens, [
        Launch(lm_head_kernel, (count * n, -(-B // _HEAD_ROWS)), arguments, _HEAD_TILE.warps),
        Launch(finish_kernel, (B,), finish, 1),
    ]
