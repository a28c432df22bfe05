"""EBPO of the twin: Algorithm 1 as the paper has it, and the estimator with its state, keys and options."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .prior import Array, Moments, Prior, mean

Key = tuple[Any, ...]


def algorithm_1(rewards: ArrayLike, eps: float = 1e-6) -> Array:
    """The paper's Algorithm 1 for a first batch of equal groups: rewards ``(M, G)`` to advantages ``(M, G)``."""
    r = np.asarray(rewards, dtype=np.float64)
    G = r.shape[1]
    mu = r.mean(axis=1, keepdims=True)
    mu_glob, sigma2, tau2 = r.mean(), r.var(), mu.var()
    S = (sigma2 / G) / (sigma2 / G + tau2) if sigma2 / G + tau2 > 0 else 0.0
    V = (1 - S) * mu + S * mu_glob
    raw = r - V
    std = raw.std(ddof=1) if raw.size > 1 else 0.0
    return np.asarray((raw - raw.mean()) / (std + eps))


@dataclass
class EBPO:
    """The estimator with its state; the options are those of :class:`ebpo_core.EBPO`."""

    normalize: str = "batch"
    sigma2: str = "total"
    tau2: str = "raw"
    score: str = "after"
    leave_one_out: bool | str = False
    shrinkage: float | None = None
    decay: float = 1.0
    decay_by: str = "update"
    eps: float = 1e-6
    ddof: int = 0
    norm_ddof: int = 1
    kappa: float = 10.0
    max_keys: int = 1024
    prior: Prior = field(default_factory=Prior)
    step: int | None = None
    keys: dict[Key, Prior] = field(default_factory=dict)  # without the root's, which is `prior`

    def theta(self, chain: list[Prior]) -> tuple[float, float, float]:
        """``theta~``: the root's numbers, blended with each key's on the way down; ``chain`` are these priors.

        ``theta~_k = (1 - h) theta_k + h theta~_parent`` with ``h = kappa / (kappa + groups seen by k)``, and 1 if none.
        """
        of = [(p.rewards.mean, p.sigma2(self.sigma2, self.ddof), p.tau2(self.tau2, self.ddof)) for p in chain]
        blended = of[0]
        for prior, own in zip(chain[1:], of[1:], strict=True):
            if prior.means.count:
                h = self.kappa / (self.kappa + prior.means.count)
                mu, sigma2, tau2 = (a + h * (b - a) for a, b in zip(own, blended, strict=True))
                blended = mu, sigma2, tau2
        return blended

    def chain(self, key: Key) -> list[Prior]:
        """The priors of the root, of each parent, and of the key; an empty one for those that have seen nothing."""
        return [self.prior] + [self.keys.get(key[:depth], Prior()) for depth in range(1, len(key) + 1)]

    def baselines(self, theta: tuple[float, float, float], group: Array) -> Array:
        """V of each row of a group: the group's own, or with ``leave_one_out="row"`` that of its others."""
        if self.leave_one_out != "row":
            return np.full(group.size, self.baseline(theta, group))
        return np.array([self.baseline(theta, np.delete(group, i)) for i in range(group.size)])

    def baseline(self, theta: tuple[float, float, float], group: Array) -> float:
        """V, the posterior mean of the group's expected reward; taken from mu_m so that S = 0 gives it exactly.

        S is 0 for an empty prior and where all rewards seen are equal, and 1 where the group has no row.
        """
        mu_glob, sigma2, tau2 = theta
        if group.size == 0:
            return mu_glob
        noise = sigma2 / group.size
        estimated = noise / (noise + tau2) if noise + tau2 > 0 else 0.0
        S = self.shrinkage if self.shrinkage is not None and noise + tau2 > 0 else estimated
        return mean(group) + S * (mu_glob - mean(group))

    def __call__(
        self,
        rewards: ArrayLike,
        groups: ArrayLike | None = None,
        *,
        mask: ArrayLike | None = None,
        update: bool = True,
        step: int | None = None,
        keys: list[Any] | None = None,
        prompts: list[Any] | None = None,
    ) -> Array:
        """Algorithm 1 with the options of §6; ``keys`` holds one key per group of a matrix, or one per reward.

        ``prompts`` holds one prompt per group, where ``leave_one_out`` leaves out all the groups of a prompt.
        """
        r, index, valid = arrange(rewards, groups, mask)
        members = [r[valid & (index == m)] for m in range(index.max() + 1)]
        key_of = [key_tuple(key) for key in ([()] * len(members) if keys is None else keys)]
        if keys is not None and groups is not None:
            key_of = [key_of[int(np.flatnonzero(index == m)[0])] for m in range(len(members))]
        if not self.is_new(step):
            update = False  # a retry or a replay: the prior already holds this batch
        past = self.decayed({key for group, key in zip(members, key_of, strict=True) if group.size})
        after = past.with_batch(members, key_of)
        if update and len(after.keys) > max(self.max_keys, len(self.keys)):
            raise ValueError(f"{len(after.keys)} keys are more than max_keys={self.max_keys}")
        scored_with = after if update and self.score == "after" else self

        raw = np.zeros_like(r)
        for m, group in enumerate(members):
            if group.size == 0:
                continue
            if self.leave_one_out and update and self.score == "after":
                same = [k == m if prompts is None else prompts[k] == prompts[m] for k in range(len(members))]
                others = [k for k in range(len(members)) if not same[k]]
                scored_with = past.with_batch([members[k] for k in others], [key_of[k] for k in others])
            rows = valid & (index == m)
            raw[rows] = r[rows] - self.baselines(self.theta(scored_with.chain(key_of[m])), group)
        if update:
            self.prior, self.keys, self.step = after.prior, after.keys, step if step is not None else self.step
        return normalized(raw, valid, self.normalize, self.norm_ddof, self.eps).reshape(np.shape(rewards))

    def group(
        self,
        rewards: ArrayLike,
        key: Any = None,
        *,
        mask: ArrayLike | None = None,
        update: bool = True,
        step: int | None = None,
    ) -> Array:
        """One group as it comes, without a batch: ``(r - V) / (sqrt(sigma2) + eps)`` by the prior before the group.

        While sigma2 is 0 so is S, and the group's own std (``norm_ddof``) stands in for ``sqrt(sigma2)``.
        """
        one = np.asarray(rewards, dtype=np.float64).reshape(1, -1)
        r, _, valid = arrange(one, None, None if mask is None else np.asarray(mask).reshape(1, -1))
        out, x = np.zeros_like(r), r[valid]
        if x.size:
            theta = self.theta(self.chain(key_tuple(key)))
            spread = np.sqrt(theta[1]) if theta[1] > 0 else np.sqrt(Moments.of(x).variance(self.norm_ddof))
            raw = x - self.baselines(theta, x)
            scale = 1.0 if self.normalize == "none" else spread + self.eps
            out[valid] = raw / scale if scale > 0 else 0.0
        self([r], mask=[valid], keys=[key], update=update, step=step)
        return out

    def is_new(self, step: int | None) -> bool:
        """True for an update whose id has not been applied yet."""
        return step is None or self.step is None or step > self.step

    def decayed(self, visited: set[Key]) -> EBPO:
        """The state as it enters an update with groups of these keys; without any, as it is.

        ``decay_by="update"``: all counts times ``decay``. ``"visit"``: those of the root, these keys and their parents.
        """
        if not visited:
            return self
        on_the_way = {key[:depth] for key in visited for depth in range(len(key) + 1)}
        forgets = {key: self.decay_by == "update" or key in on_the_way for key in self.keys}
        return replace(
            self,
            prior=self.prior.decay(self.decay),
            keys={key: prior.decay(self.decay) if forgets[key] else prior for key, prior in self.keys.items()},
        )

    def merge(self, other: EBPO) -> None:
        """Add what another estimator has seen: of each key, and of the root, the sum of both as discounted now."""
        every = {**self.keys, **other.keys}
        self.keys = {k: self.keys.get(k, Prior()).merge(other.keys.get(k, Prior())) for k in every}
        self.prior = self.prior.merge(other.prior)

    def with_batch(self, members: list[Array], keys: list[Key]) -> EBPO:
        """The state with these groups added to the root, to their keys, and to all parents of these."""
        priors = dict(self.keys)
        pairs = [(group, key) for group, key in zip(members, keys, strict=True) if group.size]
        for path in {key[:depth] for _, key in pairs for depth in range(1, len(key) + 1)}:
            under = Prior.of(group for group, key in pairs if key[: len(path)] == path)
            priors[path] = priors.get(path, Prior()).merge(under)
        return replace(self, prior=self.prior.merge(Prior.of(members)), keys=priors)


def key_tuple(key: Any) -> Key:
    """A key as the tuple of its parts; None is the root."""
    return () if key is None else key if isinstance(key, tuple) else (key,)


def arrange(rewards: ArrayLike, groups: ArrayLike | None, mask: ArrayLike | None) -> tuple[Array, Any, Any]:
    """Flat rewards, a dense group index and the valid rows (mask True and reward not NaN)."""
    r = np.asarray(rewards, dtype=np.float64)
    if groups is None:
        index = np.repeat(np.arange(r.shape[0]), r.shape[1])
    else:
        index = np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    valid = np.ones(r.shape, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    flat = r.reshape(-1)
    return flat, index, valid.reshape(-1) & ~np.isnan(flat)


def normalized(raw: Array, valid: NDArray[np.bool_], kind: str, ddof: int, eps: float) -> Array:
    """Step 6 of Algorithm 1 over the valid rows; the others get 0."""
    out = np.zeros_like(raw)
    x = raw[valid]
    if x.size == 0:
        return out
    if kind == "batch":
        moments = Moments.of(x)
        centre, scale = moments.mean, np.sqrt(moments.variance(ddof)) + eps
    elif kind == "scale":
        centre, scale = 0.0, np.sqrt((x**2).mean()) + eps
    else:
        centre, scale = 0.0, 1.0
    out[valid] = (x - centre) / scale if scale > 0 else 0.0
    return out
