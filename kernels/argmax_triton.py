"""Triton kernels of argmax and of the sum itself; argmax with its log-probabilities is one pass, in two launches.

The first launch cuts each row into tiles of ``BLOCK`` tokens and leaves one partial result per tile; the second
combines a row's partials. Nothing is shared between launches but the scratch of this call, so any grid order gives the
same result, on any number of streams.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .arguments import Step
from .launch import Launch, Tile
from .logprob_triton import finish_logprobs_kernel, store_sums
from .tiles import _OUTSIDE_KEY, best_of, finish, fused_tile, score_key, tempered


@triton.jit(do_not_specialize=["batch"])
def partial_kernel(
    inputs,
    batch,
    keys_ptr,  # [B, TILES] int32, when ARGMAX
    indices_ptr,  # [B, TILES] int32, when ARGMAX
    sums_ptr,  # [6, B, TILES] float32, when LOGPROBS
    expert_ids_ptr,  # [B] int64
    expert_rows_ptr,  # [B] int32, when LOGPROBS: the row in the expert's tensor
    PLAN: tl.constexpr,
    ARGMAX: tl.constexpr,
    LOGPROBS: tl.constexpr,
):
    """One tile of one row: its best (key, token), and the sums of its log-probabilities."""
    row, tile = tl.program_id(0) // PLAN.TILES, tl.program_id(0) % PLAN.TILES
    start = tile * PLAN.BLOCK
    offsets = start + tl.arange(0, PLAN.BLOCK)
    inside = offsets < PLAN.V
    # [BLOCK] each
    router, chosen, fused, expert, expert_row = fused_tile(inputs, row, offsets, start, PLAN)
    slot = row.to(tl.int64) * PLAN.TILES + tile
    if ARGMAX:
        key, index = best_of(tl.where(inside, score_key(fused), _OUTSIDE_KEY), offsets)
        tl.store(keys_ptr + slot, key)
        tl.store(indices_ptr + slot, index)
    if LOGPROBS:
        store_sums(sums_ptr + slot, batch.to(tl.int64) * PLAN.TILES, router, chosen, fused, inside)
    if tile == 0:
        tl.store(expert_ids_ptr + row, expert.to(tl.int64))
        if LOGPROBS:
            tl.store(expert_rows_ptr + row, expert_row)


@triton.jit
def add_kernel(
    inputs,
    temperature,  # float, or [B] float32 when PER_ROW_TEMPERATURE
    out_ptr,  # [B, V] float32
    expert_ids_ptr,  # [B] int64
    PLAN: tl.constexpr,
    DIVIDE: tl.constexpr,
    PER_ROW_TEMPERATURE: tl.constexpr,
):
    """One tile of the fused logits themselves, divided by the temperature when sampling asks for it."""
    row, tile = tl.program_id(0) // PLAN.TILES, tl.program_id(0) % PLAN.TILES
    start = tile * PLAN.BLOCK
    offsets = start + tl.arange(0, PLAN.BLOCK)
    _, _, fused, expert, _ = fused_tile(inputs, row, offsets, start, PLAN)
    if DIVIDE:
        fused = tempered(fused, temperature, row, PER_ROW_TEMPERATURE)
    tl.store(out_ptr + row.to(tl.int64) * PLAN.V + offsets, fused, mask=offsets < PLAN.V)
    if tile == 0:
        tl.store(expert_ids_ptr + row, expert.to(tl.int64))


def tokens(
    step: Step, given: Tensor | None, logprobs: bool, tile: Tile | None = None
) -> tuple[tuple[Tensor | None, ...], list[Launch]]:
    """(token ids, expert ids, fused logits, log-probabilities, scores), and the launches that write them.

    Each is ``[B]``, None where not asked for; token ids and fused logits are asked for unless tokens are ``given``.
    """
    B, V, device = step.batch, step.vocab_size, step.router.device
    tile = tile or launch.tile_for(B, V)
    inputs, plan = launch.describe(step, tile.block)

    def new(dtype: torch.dtype, wanted: bool) -> Tensor | None:
        return torch.empty(B, dtype=dtype, device=device) if wanted else None

    argmax = given is None
    tokens, logits = new(torch.int64, argmax), new(torch.float32, argmax)
    policy, score = new(torch.float32, logprobs), new(torch.float32, logprobs)
    expert_ids = torch.empty(B, dtype=torch.int64, device=device)
    # Scratch: what the first launch leaves to the second.
    partials = torch.empty(2, B, plan.TILES, dtype=torch.int32, device=device) if argmax else None
    scratch = {
        "keys_ptr": partials[0] if partials is not None else None,
        "indices_ptr": partials[1] if partials is not None else None,
        "sums_ptr": torch.empty(6, B, plan.TILES, dtype=torch.float32, device=device) if logprobs else None,
        "expert_ids_ptr": expert_ids,
        "expert_rows_ptr": new(torch.int32, logprobs),
    }
    first = {"inputs": inputs, "batch": B, **scratch, "PLAN": plan, "ARGMAX": argmax, "LOGPROBS": logprobs}
    launches = [Launch(partial_kernel, (B * plan.TILES,), first, tile.warps)]
    if policy is not None and score is not None:
        second = {
            "inputs": inputs,
            "batch": B,
            **scratch,
            "tokens_ptr": tokens if given is None else given.contiguous(),
            "logits_ptr": logits,
            "logprobs_ptr": policy,
            "scores_ptr": score,
            "PLAN": plan,
            "BLOCK_TILES": launch.power_of_2(plan.TILES),
            "GIVEN": not argmax,
        }
        launches.append(Launch(finish_logprobs_kernel, (B,), second, 1))
    elif tokens is not None and partials is not None:
        launches.append(finish(partials, tokens, logits, V))
    return (tokens, expert_ids, logits, policy, score), launches


def add(step: Step, tile: Tile | None = None, temperature: Any = None) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """(fused logits ``[B, V]`` float32, over the temperature if one is given; expert ids ``[B]``), and the launch."""
    B, V, device = step.batch, step.vocab_size, step.router.device
    tile = tile or launch.tile_for(B, V)
    inputs, plan = launch.describe(step, tile.block)
    out = torch.empty(B, V, dtype=torch.float32, device=device)
    ids = torch.empty(B, dtype=torch.int64, device=device)
    arguments = {
        "inputs": inputs,
        "temperature": temperature,
        "out_ptr": out,
        "expert_ids_ptr": ids,
        "PLAN": plan,
        "DIVIDE": temperature is not None,
        "PER_ROW_TEMPERATURE": isinstance(temperature, Tensor),
    }
    return (out, ids), [Launch(add_kernel, (B * plan.TILES,), arguments, tile.warps)]
