"""Pure-PyTorch reference of the decode step: the oracle of every kernel, and the path for CPU tensors and gradients.

For row ``b`` of a batch of ``B`` (arXiv 2601.05106, section 3)::

    e     = argmax_i weights[b, i]                                   ties: the lowest index
    token = argmax_v (router[b, v] + alpha * expert_e[b, v])         in float32, v < V; ties: the lowest index

Both log-softmax normalisers of the paper's ``log pi_router + log pi_expert`` are constant in ``v`` and drop out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import Layout, Step
from .noise import gumbel_noise

# Masses of top-p are integers in units of 2^-40 of the row's best token: a sum of integers is the same in any order.
MASS_SCALE = float(2**40)


class Draw(NamedTuple):
    """Parameters of one draw per row: each ``[B]`` or one number for all rows; None where it does not apply.

    ``log_min_p`` is log(min_p). ``seed`` ``[B]`` int64 and ``position`` key the noise, unless ``noise`` ``[B, >=V]``
    float32 stands in for it.
    """

    temperature: Tensor | float
    top_k: Tensor | int | None = None
    top_p: Tensor | float | None = None
    log_min_p: Tensor | float | None = None
    seed: Tensor | None = None
    position: Tensor | int | None = None
    noise: Tensor | None = None

    @property
    def is_filtered(self) -> bool:
        return any(x is not None for x in self[1:4])

    def per_row(self, step: Step) -> _Rows:
        """The parameters as ``[B]`` tensors: float32, int64 for ``top_k`` and ``position``; the noise as it is."""

        def spread(value: Tensor | float | None, dtype: torch.dtype = torch.float32) -> Any:
            if value is None or isinstance(value, Tensor):
                return value
            return torch.full((step.batch,), value, dtype=dtype, device=step.router.device)

        whole = torch.int64
        filters = spread(self.top_k, whole), spread(self.top_p), spread(self.log_min_p)
        return spread(self.temperature), *filters, self.seed, spread(self.position, whole), self.noise


_Optional = Tensor | None
_Rows = tuple[Tensor, _Optional, _Optional, _Optional, _Optional, _Optional, _Optional]


def expert_ids(step: Step) -> Tensor:
    """``[B]`` int64."""
    if step.selection is None:
        return torch.zeros(step.batch, dtype=torch.int64, device=step.router.device)
    if step.selection.ndim == 1:
        return step.selection.long().clone()  # never the argument itself: an operator's outputs must not alias inputs
    return step.selection.argmax(dim=-1)


def chosen_logits(step: Step, ids: Tensor) -> Tensor:
    """Each row's expert logits, ``[B, V]`` in the experts' dtype (float32 if they differ); NaN where there is none."""
    V = step.vocab_size
    if step.layout == Layout.GATHERED:
        return step.experts[0][:, :V]
    experts = list(step.experts[0].unbind(0)) if step.layout == Layout.STACKED else step.experts
    dtypes = {expert.dtype for expert in experts}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    rows = _rank(ids) if step.layout == Layout.RAGGED else torch.arange(step.batch, device=ids.device)
    chosen = torch.full((step.batch, V), float("nan"), dtype=dtype, device=ids.device)
    for i, expert in enumerate(experts):
        held = expert.shape[0]
        if held:
            mine = (ids == i) & (rows < held)
            chosen = torch.where(mine[:, None], expert[:, :V].to(dtype)[rows.clamp(max=held - 1)], chosen)
    return chosen


def fused_logits(step: Step, ids: Tensor) -> Tensor:
    """``router + alpha * expert``, ``[B, V]`` float32: product rounded, then sum rounded."""
    router, chosen = step.router[:, : step.vocab_size], chosen_logits(step, ids)
    if step.round_sum:
        return (router + step.alpha * chosen).float()
    return router.float() + chosen.float() * step.alpha


def argmax(step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, expert ids, the winning fused logits."""
    ids = expert_ids(step)
    fused = fused_logits(step, ids)
    tokens = fused.argmax(dim=-1)
    return tokens, ids, fused.gather(1, tokens[:, None])[:, 0]


def logprobs(step: Step, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The policy's log-probability and the score of given tokens, ``[B]`` float32 each; NaN for ids outside of V."""
    ids = expert_ids(step)
    router, chosen = step.router[:, : step.vocab_size].float(), chosen_logits(step, ids).float()
    index = tokens.long().clamp(0, step.vocab_size - 1)[:, None]
    inside = (tokens >= 0) & (tokens < step.vocab_size)
    policy = fused_logits(step, ids).log_softmax(-1).gather(1, index)[:, 0]
    score = router.log_softmax(-1).gather(1, index) + chosen.log_softmax(-1).gather(1, index) * step.alpha
    nan = torch.full_like(policy, float("nan"))
    return torch.where(inside, policy, nan), torch.where(inside, score[:, 0], nan)


def tempered(fused: Tensor, temperature: Tensor) -> Tensor:
    """Scores over temperature; a row at temperature 0 keeps its scores (it is greedy)."""
    return fused / torch.where(temperature == 0, torch.ones_like(temperature), temperature)[:, None]


def kept(scores: Tensor, top_k: Tensor | None, top_p: Tensor | None, log_min_p: Tensor | None) -> Tensor:
    """Tokens that the filters leave, ``[B, V]`` bool, in transformers' order: top-k, top-p, min-p.

    Every filter keeps equal scores together, so that nothing depends on the order of a sort. A row whose best score is
    not finite is left whole: there is no distribution to cut.
    """
    keep = torch.ones_like(scores, dtype=torch.bool)
    best = scores.amax(-1, keepdim=True)  # [B, 1]; NaN where the row holds one
    descending = scores.sort(-1, descending=True).values
    if top_k is not None:
        k = top_k.long()[:, None]
        off = (k <= 0) | (k >= scores.shape[1])
        smallest = descending.gather(1, (k - 1).clamp(0, scores.shape[1] - 1))
        keep &= off | (scores >= smallest)
    if top_p is not None:
        p = top_p[:, None]
        mass = ((scores - best).exp() * MASS_SCALE).nan_to_num(0.0).long() * keep
        total = mass.sum(-1, keepdim=True).double()
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        cumulative = mass.gather(1, order).cumsum(-1)
        # The mass of all tokens strictly above: what was summed before the first token of the same score.
        ascending = -scores.gather(1, order)
        first = torch.searchsorted(ascending.contiguous(), ascending.contiguous())
        above = torch.where(first > 0, cumulative.gather(1, (first - 1).clamp(min=0)), torch.zeros_like(cumulative))
        survives = above.double() < (p.double() * total).clamp(min=1.0)
        keep &= (p >= 1) | torch.zeros_like(keep).scatter(1, order, survives)
    if log_min_p is not None:
        keep &= scores >= best + log_min_p[:, None]
    return keep | ~best.isfinite()


def sample(step: Step, draw: Draw) -> tuple[Tensor, Tensor]:
    """Token ids and expert ids of the Gumbel-max draw."""
    ids = expert_ids(step)
    fused = fused_logits(step, ids)
    temperature, top_k, top_p, log_min_p, seed, position, noise = draw.per_row(step)
    scores = tempered(fused, temperature)
    if noise is None:
        if seed is None or position is None:
            raise TypeError("a draw needs seed and position, or the noise itself")
        noise = gumbel_noise(seed, position, step.vocab_size)
    noisy = scores + noise[:, : step.vocab_size]
    if draw.is_filtered:
        noisy = torch.where(kept(scores, top_k, top_p, log_min_p), noisy, torch.full_like(noisy, float("-inf")))
    return torch.where((temperature == 0)[:, None], fused, noisy).argmax(-1), ids


def _rank(ids: Tensor) -> Tensor:
    """Number of rows before this one that selected the same expert, ``[B]`` int64."""
    return (ids[None, :] == ids[:, None]).long().tril(-1).sum(-1)
