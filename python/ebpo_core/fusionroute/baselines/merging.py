"""Merging fine-tuned models of one architecture by their weights: task arithmetic, DARE and TIES, over state dicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b

import torch

StateDict = Mapping[str, torch.Tensor]
Weights = float | Sequence[float]
Change = Callable[[int, str, torch.Tensor], torch.Tensor]
Combine = Callable[[list[torch.Tensor]], torch.Tensor]


def task_arithmetic(base: StateDict, tuned: Sequence[StateDict], weights: Weights = 1.0) -> dict[str, torch.Tensor]:
    """Task arithmetic (Ilharco et al., arXiv 2212.04089, section 2): add what each fine-tuning changed.

    ``tau_i = theta_i - theta_base`` is the task vector of model i, and the result is
    ``theta_base + sum_i w_i tau_i``. One task of weight 1 gives back the fine-tuned model, weights 0 the base, and
    weights 1/n the average of n models.

    Args:
        base: state dict of the model that all were fine-tuned from.
        tuned: their state dicts, with the same names and shapes.
        weights: one weight for all, or one for each; any sign.

    Returns:
        A state dict of new tensors, on the base's devices and in its dtypes. Differences and sums are float32
        (float64 where the base is). Integer and boolean entries have to be equal everywhere and are copied. Names that
        share storage in the base (tied weights) share it in the result.

    Raises:
        ValueError: no models, weights that are not finite or not one for each, or names, shapes or integer entries
            that differ.
    """
    return _merge(base, tuned, weights, lambda _index, _name, change: change)


def dare(
    base: StateDict, tuned: Sequence[StateDict], weights: Weights = 1.0, *, drop: float, seed: int = 0
) -> dict[str, torch.Tensor]:
    """DARE (Yu et al., arXiv 2311.03099, section 3.2): drop changes at random, rescale the rest, then add as above.

    Each entry of each task vector is dropped with probability p, independently: with ``m ~ Bernoulli(1 - p)``,
    ``tau'_i = m * tau_i / (1 - p)``, whose mean over masks is ``tau_i``, and the result is
    ``theta_base + sum_i w_i tau'_i``.

    Args:
        base, tuned, weights: as for :func:`task_arithmetic`; ``drop=0`` is exactly that.
        drop: the probability p, in [0, 1).
        seed: of the masks. A mask depends on the seed, the model's index and the tensor's name alone, so neither the
            order of names nor the device changes it.

    Returns:
        As :func:`task_arithmetic`; tied weights get one mask, that of their first name.

    Raises:
        ValueError: ``drop`` outside [0, 1), or as :func:`task_arithmetic`.
    """
    if not 0 <= drop < 1:  # NaN fails too
        raise ValueError(f"drop={drop}: expected a probability in [0, 1); at 1 no change is left to be rescaled")

    def thin(index: int, name: str, change: torch.Tensor) -> torch.Tensor:
        digest = blake2b(f"{seed} {index} {name}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        kept = torch.rand(change.shape, generator=generator) >= drop
        return torch.where(kept.to(change.device), change / (1 - drop), 0.0)

    return _merge(base, tuned, weights, thin)


def ties(
    base: StateDict, tuned: Sequence[StateDict], weights: Weights = 1.0, *, density: float = 0.2
) -> dict[str, torch.Tensor]:
    """TIES (Yadav et al., arXiv 2306.01708, algorithm 1): trim small changes, elect a sign, average what agrees.

    Of each tensor of each task vector the share ``density`` of largest magnitude is kept, the rest is 0. An entry's
    sign is that of ``sum_i w_i tau_i``, and the result adds the mean of the changes that have it, weighted alike:
    ``sum_A w_i tau_i / sum_A w_i`` over the models A whose change is not 0 and has that sign. The paper scales the
    whole by a factor lambda and trims over all weights at once; here each tensor is trimmed by itself.

    Args:
        base, tuned: as for :func:`task_arithmetic`.
        weights: as there, but at least 0; equal ones of any size give the paper's mean.
        density: the share that is kept, in (0, 1]; the paper's 0.2.

    Returns:
        As :func:`task_arithmetic`.

    Raises:
        ValueError: ``density`` outside (0, 1], a negative weight, or as :func:`task_arithmetic`.
    """
    if not 0 < density <= 1:  # NaN fails too
        raise ValueError(f"density={density}: expected the share of changes to keep, above 0 and at most 1")
    scales = _scales(weights, len(tuned))
    if min(scales, default=0) < 0:
        raise ValueError(f"weights={weights!r}: a sign is elected by weights of at least 0")

    def trim(_index: int, _name: str, change: torch.Tensor) -> torch.Tensor:
        kept = max(1, round(density * change.numel())) if change.numel() else 0
        places = change.abs().flatten().topk(kept).indices
        trimmed = torch.zeros_like(change).flatten()
        trimmed[places] = change.flatten()[places]
        return trimmed.view_as(change)

    def elect(changes: list[torch.Tensor]) -> torch.Tensor:
        # [n, ...]: models first.
        stacked = torch.stack(changes)
        share = torch.tensor(scales, dtype=stacked.dtype, device=stacked.device).view(-1, *[1] * changes[0].ndim)
        sign = (share * stacked).sum(0).sign()
        agreeing = share * (stacked.sign() == sign) * (stacked != 0)
        return (agreeing * stacked).sum(0) / agreeing.sum(0).clamp(min=torch.finfo(stacked.dtype).tiny)

    return _merge(base, tuned, weights, trim, elect)


def _scales(weights: Weights, models: int) -> list[float]:
    """One finite weight for each model."""
    scales = [float(weights)] * models if isinstance(weights, int | float) else [float(w) for w in weights]
    if len(scales) != models or not all(map(math.isfinite, scales)):
        raise ValueError(f"weights={weights!r}: expected one finite number, or one for each of {models} models")
    return scales


def _merge(
    base: StateDict, tuned: Sequence[StateDict], weights: Weights, change: Change, combine: Combine | None = None
) -> dict[str, torch.Tensor]:
    """The base and the models' changes, which ``combine`` puts together; by default their weighted sum."""
    if not tuned:
        raise ValueError("tuned=[]: give the state dict of at least one fine-tuned model")
    scales = _scales(weights, len(tuned))
    for index, state in enumerate(tuned):
        _check_same(base, state, index)
    merged: dict[str, torch.Tensor] = {}
    tied: dict[tuple[object, ...], str] = {}
    with torch.no_grad():
        for name, start in base.items():
            place = (start.data_ptr(), start.device, start.dtype, start.shape, start.stride())
            first = tied.setdefault(place, name) if start.numel() else name
            if first != name:
                _check_tied(tuned, first, name)
                merged[name] = merged[first]
                continue
            if not start.is_floating_point():
                merged[name] = start.clone()
                continue
            precise = start.to(torch.promote_types(start.dtype, torch.float32))
            total = precise.clone()
            changes = (change(index, name, state[name].to(precise) - precise) for index, state in enumerate(tuned))
            if combine is not None:
                total += combine(list(changes))
            else:
                for scale, one in zip(scales, changes, strict=True):
                    total += scale * one
            merged[name] = total.to(start.dtype)
    return merged


def _check_same(base: StateDict, state: StateDict, index: int) -> None:
    """Raise a ValueError where a model is not one fine-tuned from ``base``."""
    if base.keys() != state.keys():
        names = sorted(base.keys() ^ state.keys())
        where = "the base" if names[0] in state else f"tuned[{index}]"
        raise ValueError(
            f"tuned[{index}]: {names[0]!r} is missing in {where} ({len(names)} names differ in all); "
            "merge models that were fine-tuned from this base"
        )
    for name, start in base.items():
        other = state[name]
        if start.shape != other.shape:
            raise ValueError(
                f"tuned[{index}]: {name!r} has shape {tuple(other.shape)} and the base's has {tuple(start.shape)}; "
                "merge models of one architecture"
            )
        if start.is_floating_point() != other.is_floating_point():
            raise ValueError(f"tuned[{index}]: {name!r} is {other.dtype} and the base's is {start.dtype}")
        if not start.is_floating_point() and not torch.equal(start, other.to(start.device)):
            raise ValueError(
                f"tuned[{index}]: {name!r} ({start.dtype}) differs from the base's, and integers cannot be added up; "
                "make them equal, or leave them out"
            )


def _check_tied(tuned: Sequence[StateDict], first: str, name: str) -> None:
    for index, state in enumerate(tuned):
        if not torch.equal(state[first], state[name].to(state[first])):
            raise ValueError(
                f"tuned[{index}]: {first!r} and {name!r} differ, but the base ties them; "
                "clone them in the base's state dict"
            )
