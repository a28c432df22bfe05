"""What compiling cost: compiled beside uncompiled experts on held-out rows, position by position."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ebpo_core.fusionroute.decoding.fusing import ExpertLogits, Part
from ebpo_core.fusionroute.decoding.routing import RoutingOptions
from ebpo_core.fusionroute.training.sequences import TokenSequences

from .distillation import Batch, adapted_of, divergence, expert_of, read_batch
from .lowrank import LowRank
from .targets import target_modules

_TOKENS = 8192  # of a batch, padding included


@torch.no_grad()
def compare(model: Any, adapters: LowRank, sequences: TokenSequences) -> dict[str, Any]:
    """Compiled and uncompiled experts on the same rows, each under teacher forcing.

    Args:
        model: with its experts, uncompiled.
        adapters: of the same experts, in their order.
        sequences: held-out rows; positions that predict a label count.

    Returns:
        JSON-safe values::

            rows, tokens        counts; tokens are labels
            fused               of the fused policy, router and selected expert:
                kl              KL(uncompiled || compiled), nats a token
                agreement       share of tokens at which both have one argmax
                accuracy        {"uncompiled", "compiled"}: share of labels that are the argmax
                exact           the same for whole rows: every label is the argmax
            experts             by name:
                share           of the tokens at which the router selects it
                kl, agreement   of the expert and its adapter at these, None where there are none
                kl_all, agreement_all   at all tokens

    Raises:
        FloatingPointError: logits of an expert, or of its adapter, that are no numbers.
    """
    adapters.to(model.device, model.router.dtype)
    modules = target_modules(model.router)
    options = model.config.options()
    names = model.experts.names
    fused, own = torch.zeros(6, dtype=torch.float64), torch.zeros(len(names), 5, dtype=torch.float64)
    tokens = 0
    for rows in sequences.batches(range(len(sequences)), _TOKENS):
        batch = read_batch(model, sequences, rows)
        where = batch.labelled
        tokens += int(where.sum())
        targets, students = [], []
        for index, expert in enumerate(model.experts):
            target = expert_of(model, expert, batch)
            student = adapted_of(model, adapters, modules, batch, index)
            mine = (batch.selected == index)[where]
            kl = _kl(target[where], student[where])
            if not bool(kl.isfinite().all()):
                broken = not bool(target[where].softmax(-1).isfinite().all())
                whose, what = ("its own", "it") if broken else ("its adapter's", "the router")
                raise FloatingPointError(
                    f"expert {expert.name!r}: {whose} logits on held-out rows are no numbers: give {what} a wider "
                    "dtype, in which they do not overflow, and compile into another folder"
                )
            same = target[where].argmax(-1) == student[where].argmax(-1)
            own[index] += (
                torch.stack([mine.sum(), kl[mine].sum(), same[mine].sum(), kl.sum(), same.sum()]).double().cpu()
            )
            targets.append(target)
            students.append(student)
        fused += _fused(batch, torch.stack(targets), torch.stack(students), options)
    rows_count = len(sequences)
    kl, same, before, after, exact_before, exact_after = fused.tolist()
    return {
        "rows": rows_count,
        "tokens": tokens,
        "fused": {
            "kl": kl / tokens,
            "agreement": same / tokens,
            "accuracy": {"uncompiled": before / tokens, "compiled": after / tokens},
            "exact": {"uncompiled": exact_before / rows_count, "compiled": exact_after / rows_count},
        },
        "experts": {
            name: {
                "share": count / tokens,
                "kl": own_kl / count if count else None,
                "agreement": agreed / count if count else None,
                "kl_all": kl_all / tokens,
                "agreement_all": agreed_all / tokens,
            }
            for name, (count, own_kl, agreed, kl_all, agreed_all) in zip(names, own.tolist(), strict=True)
        },
    }


def _fused(batch: Batch, targets: Tensor, students: Tensor, options: RoutingOptions) -> Tensor:
    """Sums over a batch, in the order of :func:`compare`'s "fused"; logits are ``[n, B, K - 1, V]``."""
    where, wanted = batch.labelled, batch.labels
    index = batch.selected[None, :, :, None].expand(1, *targets.shape[1:])
    rows, positions = where.nonzero(as_tuple=True)
    before, after = (
        ExpertLogits((Part(rows, positions, logits.gather(0, index)[0][where]),), where.shape[1]).added_to(
            batch.router_logits, options.alpha, options.complementary
        )
        for logits in (targets, students)
    )
    right = [(logits.argmax(-1) == wanted) for logits in (before, after)]
    same = (before.argmax(-1) == after.argmax(-1))[where]
    sums = [_kl(before[where], after[where]).sum(), same.sum()]
    sums += [(one & where).sum() for one in right]
    sums += [(one | ~where).all(1).sum() for one in right]
    return torch.stack([value.double() for value in sums]).cpu()


def _kl(target: Tensor, student: Tensor) -> Tensor:
    """:func:`~.distillation.divergence`, float64 and never below 0, where rounding of equal ones would put it."""
    return divergence(target, student).double().clamp(min=0)
