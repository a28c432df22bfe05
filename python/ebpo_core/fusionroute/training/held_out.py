"""Held-out rows of the training formats: labels under the fused policy, the router and each expert alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebpo_core.fusionroute.decoding.routing import OPTION_NAMES, permitted_rows

from .batches import informative_positions
from .config import FusionRouteSFTConfig
from .losses import IGNORE, label_logprobs, routing_loss_normalized
from .metrics import Tally, routing_quotients
from .sequences import PreferencePairs, TokenSequences

FUSED, ROUTER = "fusionroute", "router"


@dataclass(frozen=True)
class _Labels:
    """What one model gives the labels of N sequences.

    Attributes:
        logprobs: ``[N]`` float64, sums over a sequence's labels.
        right: ``[N]`` int64, labels that are the model's most likely token.
        exact: ``[N]`` bool, all labels of the answer are.
    """

    logprobs: NDArray[np.float64]
    right: NDArray[np.int64]
    exact: NDArray[np.bool_]

    @classmethod
    def empty(cls, size: int) -> _Labels:
        return cls(np.zeros(size), np.zeros(size, dtype=np.int64), np.zeros(size, dtype=bool))


@dataclass(frozen=True)
class _Scored:
    """N sequences scored by every model, and sums of routing metrics."""

    fused: _Labels
    router: _Labels
    experts: dict[str, _Labels]
    selected: NDArray[np.float64]  # [N], log-probabilities of the selected experts
    tally: Tally


def evaluate_samples(
    model: Any, samples: TokenSequences, *, max_length: int | None = None, batch_size: int = 8, **options: Any
) -> dict[str, Any]:
    """Loss, exact match and routing on SFT samples.

    Args:
        model: a FusionRoute model with its experts.
        samples: of :func:`~.data.tokenize_samples`, masked as the trainer masks them.
        max_length: to which they were cut: a row that long may have lost the end of its answer, and counts for none.
        batch_size: sequences in one forward, of similar length.
        options: of :class:`~..decoding.routing.RoutingOptions`; by default the model's.

    Returns:
        JSON-safe values::

            rows, tokens, answers           counts; tokens are labels
            models                          for "fusionroute" (the fused policy), "router", and in "experts" by name:
                loss, perplexity            nats per label token; exp of it, None beyond float's range
                token_accuracy              share of labels that are the most likely token
                exact_match                 share of answers of which every token is, None without answers
            routing                         accuracy, informative, usage by expert, as the trainer logs them
            training                        loss_lm, loss_routing, loss, as the trainer's evaluation

        An answer is a row's last run of labels, if something stands before it. Every token of it is the most likely
        one exactly if greedy decoding, without penalties, writes it token for token.

    Raises:
        ValueError: no sequences, ids that the models lack, no experts, or an option that does not fit.
    """
    _check(model, samples, batch_size, options)
    found = _score(model, samples, batch_size, options)
    answered = _answered(samples, max_length)
    tokens = int(samples.label_counts.sum())

    def row(labels: _Labels) -> dict[str, Any]:
        loss = -float(labels.logprobs.sum()) / tokens
        return {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else None,
            "token_accuracy": int(labels.right.sum()) / tokens,
            "exact_match": float(labels.exact[answered].mean()) if answered.any() else None,
        }

    metrics = found.tally.results()
    return {
        "rows": len(samples),
        "tokens": tokens,
        "answers": int(answered.sum()),
        "models": _by_model(found, row),
        "routing": _routing(metrics),
        "training": {name: metrics[name] for name in ("loss", "loss_lm", "loss_routing")},
    }


def evaluate_pairs(model: Any, pairs: PreferencePairs, *, batch_size: int = 8, **options: Any) -> dict[str, Any]:
    """Margins on preference pairs: log π(chosen) − log π(rejected), sums over the completions' labels.

    There is no reference in them, unlike in the trainer's ``rewards/margins``: they say which completion a model finds
    likelier, not what training has changed.

    Args:
        model, batch_size, options: as for :func:`evaluate_samples`.
        pairs: of :func:`~.data.tokenize_pairs`.

    Returns:
        JSON-safe values: ``pairs``; ``models`` with ``margin`` (mean, nats) and ``accuracy`` (share of margins above
        0) by model; ``selected``, the same of the selected experts' log-probabilities, which CDPO's bias is made of;
        ``routing`` over chosen completions.

    Raises:
        ValueError: as for :func:`evaluate_samples`.
    """
    _check(model, pairs.sequences, batch_size, options)
    found = _score(model, pairs.sequences, batch_size, options, pairs=True)

    def row(logprobs: NDArray[np.float64]) -> dict[str, Any]:
        margins = logprobs[0::2] - logprobs[1::2]
        return {"margin": float(margins.mean()), "accuracy": float((margins > 0).mean())}

    return {
        "pairs": len(pairs),
        "models": _by_model(found, lambda labels: row(labels.logprobs)),
        "selected": row(found.selected),
        "routing": _routing(found.tally.results()),
    }


def _check(model: Any, sequences: TokenSequences, batch_size: int, options: Mapping[str, Any]) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give at least 1")
    unknown = sorted(options.keys() - set(OPTION_NAMES))
    if unknown:
        raise TypeError(f"{unknown[0]!r} is no option of routing: use {', '.join(OPTION_NAMES)}")
    if not len(model.experts):
        raise ValueError("no experts are loaded: load the model with its experts")
    permitted_rows(model.config.options().updated(**options), model.experts.names)
    if not len(sequences):
        raise ValueError(
            f"the data has no row to evaluate ({sequences.dropped} lost all their labels to max_length): give rows, or "
            "a larger max_length"
        )
    sequences.check(int(model.config.vocab_size))


def _answered(samples: TokenSequences, max_length: int | None) -> NDArray[np.bool_]:
    """``[N]``: rows with an answer, whole."""
    whole = samples.lengths < (math.inf if max_length is None else max_length)
    return np.array([bool(whole[i]) and _answer(samples[i][1]).start > 1 for i in range(len(samples))])


def _answer(labels: NDArray[np.integer[Any]]) -> slice:
    """The last run of labels; from 1 on for a row that is learnt from its beginning, which answers nothing."""
    at = np.flatnonzero(labels != IGNORE)
    first = at[-1] - int(np.argmax(np.diff(at[::-1], append=-2) != -1))
    return slice(int(first), int(at[-1]) + 1)


def _batches(sequences: TokenSequences, size: int) -> Iterator[list[int]]:
    """From long to short, so that what does not fit into memory fails at once."""
    order = sorted(range(len(sequences)), key=lambda i: (-sequences.lengths[i], i))
    yield from (order[start : start + size] for start in range(0, len(order), size))


@torch.no_grad()
def _score(
    model: Any, sequences: TokenSequences, size: int, options: Mapping[str, Any], *, pairs: bool = False
) -> _Scored:
    V, experts = int(model.config.vocab_size), model.experts
    settings = model.config.options().updated(**options)
    weight = FusionRouteSFTConfig.routing_loss_weight
    N = len(sequences)
    result = _Scored(
        _Labels.empty(N),
        _Labels.empty(N),
        {name: _Labels.empty(N) for name in experts.names},
        np.zeros(N),
        Tally(experts.names),
    )
    for batch in _batches(sequences, size):
        ids, mask, labels, keep = sequences.padded(batch)  # (B, T) three times
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        common: dict[str, Any] = {"logits_to_keep": keep, "use_cache": False}
        # 1. Router and selected experts; positions that predict a label, (B, K - 1).
        out = model(**{name: x.to(model.device) for name, x in inputs.items()}, fuse=False, **common, **options)
        router = out.router_logits[..., :V]
        fused = out.expert_logits.added_to(router, settings.alpha, settings.complementary)[:, :-1]
        router, weights, selected = router[:, :-1], out.routing_weights[:, :-1], out.expert_ids[:, :-1]
        wanted = torch.from_numpy(labels[:, 1 - keep :]).to(router.device)
        # 2. Every expert alone.
        alone = []
        for expert in experts:
            logits = expert(**{name: x.to(expert.device) for name, x in inputs.items()}, **common).logits
            alone.append(logits[:, -keep:-1, :V].to(router.device))
        # 3. What each of them gives the labels.
        _add(result.fused, batch, fused, wanted)
        own = _add(result.router, batch, router, wanted)
        by_expert = torch.stack(
            [_add(result.experts[each.name], batch, z, wanted) for each, z in zip(experts, alone, strict=True)], dim=-1
        )
        of_selected = by_expert.gather(-1, selected.clamp(min=0)[..., None])[..., 0]
        result.selected[batch] = of_selected.double().sum(dim=1).cpu().numpy()
        # 4. Routing, in the trainer's own terms.
        argmax = torch.stack([z.argmax(dim=-1) for z in alone], dim=-1).cpu().numpy().astype(np.int32)
        informative = torch.from_numpy(informative_positions(argmax, wanted.cpu().numpy())).to(router.device)
        routing = own.new_zeros(len(batch))
        if not pairs:
            losses = routing_loss_normalized(
                weights[informative], [z[informative] for z in alone], wanted[informative], vocab_size=V
            )
            routing = routing.to(losses.dtype).index_add(0, informative.nonzero()[:, 0], losses)
        chosen = [b for b, i in enumerate(batch) if not (pairs and i % 2)]
        lm, tokens = -own.sum(dim=1), (wanted != IGNORE).sum(dim=1)
        one_hot = torch.nn.functional.one_hot(selected.clamp(min=0), len(experts))
        quotients = {
            "loss": (lm + weight * routing, tokens),
            "loss_lm": (lm, tokens),
            "loss_routing": (routing, tokens),
            **routing_quotients(one_hot, by_expert, wanted, informative, experts.names),
        }
        if chosen:
            kept = {name: (above[chosen], below[chosen]) for name, (above, below) in quotients.items()}
            result.tally.add(result.tally.matrix(kept, len(chosen)))
    return result


def _add(into: _Labels, batch: list[int], logits: Tensor, wanted: Tensor) -> Tensor:
    """Fill in a batch's sums of one model; returns its label log-probabilities, ``[B, K - 1]``, 0 without a label."""
    logprobs = label_logprobs(logits, wanted)
    labels = wanted.cpu().numpy()
    right = (logits.argmax(dim=-1) == wanted).cpu().numpy()
    into.logprobs[batch] = logprobs.double().sum(dim=1).cpu().numpy()
    if not np.isfinite(into.logprobs[batch]).all():
        raise ValueError(
            "a label has no finite log-probability: a model excludes its token, or its weights are at fault"
        )
    for b, i in enumerate(batch):
        into.right[i] = right[b].sum()
        into.exact[i] = right[b, _answer(labels[b])].all()
    return logprobs


def _by_model(found: _Scored, row: Callable[[_Labels], dict[str, Any]]) -> dict[str, Any]:
    """``row`` of the fused policy, the router and each expert."""
    return {
        FUSED: row(found.fused),
        ROUTER: row(found.router),
        "experts": {name: row(labels) for name, labels in found.experts.items()},
    }


def _routing(metrics: Mapping[str, float]) -> dict[str, Any]:
    usage = "routing/usage/"
    return {
        "accuracy": metrics.get("routing/accuracy"),
        "informative": metrics["routing/informative"],
        "usage": {name.removeprefix(usage): value for name, value in metrics.items() if name.startswith(usage)},
    }
