"""Merged experts, with the best of a few settings: what the demo compares FusionRoute with beside its ablations."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ebpo_core.fusionroute.baselines import dare, task_arithmetic
from ebpo_core.tasks.supervised import IGNORED_LABEL

from .experts import encode

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

    from ebpo_core.data import Problem

WEIGHTS = (0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
DROPS = (0.2, 0.5, 0.9)


class Merge(NamedTuple):
    """A merged model and the setting it was made with."""

    model: LlamaForCausalLM
    setting: dict[str, float]


def greedy_fit(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]
) -> tuple[float, float]:
    """The share of problems that greedy decoding answers right, and the mean log-probability of the right answers.

    Both from one pass over the right answers: greedy decoding follows them exactly where each of their tokens is the
    most likely one after those before it.
    """
    ids, mask, labels = encode(problems, tokenizer)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    labels = labels[:, 1:]
    right = ((logits.argmax(-1) == labels) | (labels == IGNORED_LABEL)).all(dim=1).float().mean()
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED_LABEL)
    return right.item(), -loss.item()


def merges(
    base: LlamaForCausalLM,
    experts: Sequence[LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    seed: int,
) -> dict[str, Merge]:
    """Task arithmetic and DARE of the experts, each with the setting that does best on ``problems``.

    The papers tune the weight on validation data too. Give training problems, never the held-out ones.
    """
    start, tuned = base.state_dict(), [expert.state_dict() for expert in experts]
    return {
        "task arithmetic": _best(
            base, tokenizer, problems, ((task_arithmetic(start, tuned, w), {"weight": w}) for w in WEIGHTS)
        ),
        "DARE": _best(
            base,
            tokenizer,
            problems,
            (
                (dare(start, tuned, w, drop=p, seed=seed), {"weight": w, "drop": p, "seed": seed})
                for p in DROPS
                for w in WEIGHTS
            ),
        ),
    }


def _best(
    base: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    candidates: Iterable[tuple[dict[str, torch.Tensor], dict[str, Any]]],
) -> Merge:
    """Most problems right; among equals, the likeliest right answers."""
    model = copy.deepcopy(base)
    best: tuple[tuple[float, float], dict[str, torch.Tensor], dict[str, float]] | None = None
    for state, setting in candidates:
        model.load_state_dict(state)
        fit = greedy_fit(model, tokenizer, problems)
        if best is None or fit > best[0]:
            best = fit, state, setting
    assert best is not None  # noqa: S101 -- the grids above are not empty
    model.load_state_dict(best[1])
    return Merge(model, best[2])
