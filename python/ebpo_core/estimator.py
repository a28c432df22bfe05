"""EBPO advantages: one function without state, one estimator with a running prior (arXiv 2602.05165, §3).

For a group m with n valid rows, mean ``mu_m``, and a prior with mean ``mu_glob``, noise variance ``sigma2`` and spread
``tau2``::

    S_m    = (sigma2 / n) / (sigma2 / n + tau2)        shrinkage factor in [0, 1]; 0 where the denominator is 0
    V_m    = (1 - S_m) * mu_m + S_m * mu_glob          baseline
    raw    = r - V_m
    A      = (raw - mean(raw)) / (std(raw) + eps)      over all valid rows of the batch
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from ebpo_core import _core
from ebpo_core.arguments import flag, real, step_id, text, zero_or_one
from ebpo_core.inputs import is_tensor, read_batch
from ebpo_core.prior import VERSION, Prior, check_version, load_statistics, statistics_of

Rewards = TypeVar("Rewards")
Method = Literal["ebpo", "grpo", "dr_grpo", "rloo", "reinforce_pp", "james_stein"]


class Options(TypedDict):
    """Every option of the estimator; see :class:`EBPO`."""

    normalize: Literal["batch", "scale", "none"]
    sigma2: Literal["total", "within"]
    tau2: Literal["raw", "debiased"]
    score: Literal["after", "before"]
    leave_one_out: bool
    decay: float
    eps: float
    ddof: int
    norm_ddof: int


@dataclass(frozen=True, eq=False)
class Diagnostics:
    """What the last call of an estimator computed, M groups in order of their rows or of first appearance."""

    shrinkage: NDArray[np.float64]
    """``S_m``, shape (M,); NaN for a group without valid rows."""
    baseline: NDArray[np.float64]
    """``V_m``, shape (M,); NaN for a group without valid rows."""
    count: NDArray[np.float64]
    """Valid rows of each group, shape (M,)."""
    mu_glob: float
    """Mean of the prior the batch was scored with, before any group is left out; NaN if it was empty."""
    sigma2: float
    """Noise variance, as the option ``sigma2`` estimates it; NaN if that prior was empty."""
    tau2: float
    """Variance of group means, as the option ``tau2`` estimates it; NaN if that prior was empty."""
    saturated_fail: float
    """Share of the non-empty groups whose valid rewards are all equal and below ``mu_glob`` (or at it, and <= 0)."""
    saturated_pass: float
    """Share of the non-empty groups whose valid rewards are all equal and above ``mu_glob`` (or at it, and > 0)."""
    outlier: float
    """Largest ``|r - mean| / std`` of the batch against the prior before it; NaN if that had no variance."""

    @property
    def saturated(self) -> float:
        """Share of the non-empty groups whose valid rewards are all equal: plain GRPO learns nothing from them."""
        return self.saturated_fail + self.saturated_pass


class EBPO:
    """The estimator with its running prior.

    Args:
        normalize: ``"batch"`` (paper): ``(raw - mean) / (std + eps)`` over the batch. ``"scale"``:
            ``raw / (rms + eps)``, not centred, so that the advantage of an all-failed group stays negative (§3a).
            ``"none"``: ``raw``.
        sigma2: ``"total"`` (paper): variance of all rewards seen. ``"within"``: ``sum(SSW_m) / sum(n_m - 1)``, SSW_m
            the sum of squares within a group, over the run; as ``"total"`` until a group has had two rows.
        tau2: ``"raw"`` (paper): variance of all group means seen. ``"debiased"``:
            ``max(0, Var1(mu) - sigma2_within * mean(1 / n_m))``, Var1 with n - 1.
        score: ``"after"`` (paper): the batch enters the prior, then is scored. ``"before"``: scored first; an empty
            prior then gives S = 0, the group's own mean.
        leave_one_out: Score each group against history and batch without that group; S = 0 if nothing is left.
            Raises with ``score="before"``, where it has no meaning.
        decay: rho in (0, 1]; before each update every count, M2 and sum is multiplied by it, so that the prior
            remembers about ``1 / (1 - rho)`` batches. 1 (paper) never forgets. A batch without valid rows is no update.
        eps: Added to the denominator of ``normalize``; at least 0. With 0 nothing damps rounding where the exact
            advantages are 0 without the rewards being equal.
        ddof: 0 or 1; the variances ``sigma2="total"`` and ``tau2="raw"`` divide by ``count - ddof``.
        norm_ddof: 0 or 1; the std of ``normalize="batch"`` divides by ``rows - norm_ddof`` (1 as ``torch.std``).

    An object may be shared by threads and is intact in a forked child. Arrays must not change during a call.
    """

    __slots__ = ("_checked", "_last", "_options", "_state")

    def __init__(
        self,
        *,
        normalize: Literal["batch", "scale", "none"] = "batch",
        sigma2: Literal["total", "within"] = "total",
        tau2: Literal["raw", "debiased"] = "raw",
        score: Literal["after", "before"] = "after",
        leave_one_out: bool = False,
        decay: float = 1.0,
        eps: float = 1e-6,
        ddof: int = 0,
        norm_ddof: int = 1,
    ) -> None:
        self._options = Options(
            normalize=text("normalize", normalize),
            sigma2=text("sigma2", sigma2),
            tau2=text("tau2", tau2),
            score=text("score", score),
            leave_one_out=flag("leave_one_out", leave_one_out),
            decay=real("decay", decay),
            eps=real("eps", eps),
            ddof=zero_or_one("ddof", ddof),
            norm_ddof=zero_or_one("norm_ddof", norm_ddof),
        )
        self._checked = _core.Options(**self._options)
        self._state = _core.State()
        self._last: tuple[Any, Any] | None = None

    def __call__(
        self, rewards: Rewards, groups: Any = None, *, mask: Any = None, update: bool = True, step: int | None = None
    ) -> Rewards:
        """Score a batch and take it into the prior.

        Args:
            rewards: As in :func:`advantages`.
            groups: As in :func:`advantages`.
            mask: As in :func:`advantages`.
            update: False scores against the stored prior alone and leaves it unchanged (evaluation); an empty prior
                gives S = 0.
            step: Id of this update, growing through training. An update whose id is not newer than the last one
                applied scores like ``update=False``, so a retried or replayed batch is counted once. (Its advantages
                are those of the first time only with ``score="after"`` and without ``leave_one_out``.)

        Returns:
            Advantages in the container, shape, device and float dtype of ``rewards``.

        Raises:
            ValueError, TypeError: as in :func:`advantages`; the prior is then untouched.
        """
        batch = read_batch(rewards, groups, mask)
        flat, vectors, scalars = self._state.advance(
            self._checked, batch.rewards, batch.groups, batch.mask, flag("update", update), step_id(step)
        )
        self._last = vectors, scalars  # one assignment, so that threads never see a mixture of two calls
        result: Rewards = batch.restore(flat)
        return result

    @property
    def diagnostics(self) -> Diagnostics | None:
        """What the last call computed; None before the first."""
        last = self._last
        return None if last is None else Diagnostics(*last[0], *last[1])

    @property
    def options(self) -> Options:
        """A copy of the options."""
        return self._options.copy()

    @property
    def prior(self) -> Prior:
        """A copy of the running prior; changing it changes nothing here (see :meth:`merge`)."""
        prior = Prior()
        prior._state.load(self._state.parts()[0], None)
        return prior

    @property
    def step(self) -> int | None:
        """Id of the last update applied, or None."""
        return self._state.parts()[1]

    def merge(self, other: EBPO | Prior) -> None:
        """Add everything that ``other`` has seen: an estimator with the same options, or a prior to start from."""
        if not isinstance(other, (EBPO, Prior)):
            raise TypeError(f"other is of type {type(other).__name__}: expected ebpo_core.EBPO or ebpo_core.Prior")
        if isinstance(other, EBPO):
            self._same_options(other._options, "other")
        self._state.merge(other._state)

    def reset(self) -> None:
        """Forget everything seen; the options stay."""
        self._state, self._last = _core.State(), None

    def state_dict(self) -> dict[str, Any]:
        """Options, prior and step as a JSON-safe dict, exact to the bit."""
        parts, step = self._state.parts()  # at once: a step newer than its prior would lose a batch on resume
        return {"version": VERSION, "options": dict(self._options), "prior": statistics_of(parts), "step": step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace prior and step by those of ``state``, which must have been written with the same options.

        Raises ValueError, leaving everything untouched, on a newer version, other options, or anything else that
        :meth:`state_dict` cannot have written.
        """
        check_version(state, "an EBPO state")
        options, prior, step = state.get("options"), state.get("prior"), state.get("step")
        if not isinstance(options, Mapping) or not isinstance(prior, Mapping):
            raise ValueError("state has no fields 'options' and 'prior': pass what EBPO.state_dict() returned")
        self._same_options(options, "state")
        load_statistics(self._state, prior, step_id(step))
        self._last = None

    def _same_options(self, options: Mapping[str, Any], what: str) -> None:
        for name, mine in self._options.items():
            if options.get(name, "missing") != mine:
                raise ValueError(
                    f"{what} has option {name}={options.get(name, 'missing')!r}, this estimator {name}={mine!r}: "
                    "build the estimator with the options of the state"
                )
        unknown = sorted(set(options) - set(self._options))
        if unknown:
            raise ValueError(f"{what} has the unknown option {unknown[0]!r}: it was not written by this release")

    def __getstate__(self) -> dict[str, Any]:
        return self.state_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["options"])  # type: ignore[misc]
        self.load_state_dict(state)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EBPO):
            return NotImplemented
        return self._options == other._options and self._state.parts() == other._state.parts()

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        defaults = EBPO.__init__.__kwdefaults__ or {}
        changed = [f"{name}={value!r}" for name, value in self._options.items() if value != defaults.get(name)]
        return f"EBPO({', '.join(changed)}) with {self.prior!r}"


def advantages(
    rewards: Rewards, groups: Any = None, *, mask: Any = None, method: Method = "ebpo", **options: Any
) -> Rewards:
    """Advantages of one batch, without state: for ``method="ebpo"`` the batch is its own prior.

    Args:
        rewards: ``(M, G)``, one row per group, or ``(N,)`` with ``groups``. A list, a NumPy array of floats, ints or
            bools, or a torch tensor on any device (copied to the CPU once and back once). Finite, of magnitude at most
            1e140; NaN marks a completion that could not be scored. Tuples come back as lists, other array-likes (a
            pandas Series, say) as NumPy arrays.
        groups: ``(N,)`` group ids of any hashable kind (ints, strings, uuids); the rows of a group may stand in any
            order and groups may differ in size.
        mask: Shape of ``rewards``; True (or 1) where a reward counts, as in a response mask.
        method: ``"ebpo"``; ``"grpo"``: ``(r - mu) / (s + eps)``, s with n - 1, 0 where s = 0 or n = 1; ``"dr_grpo"``:
            ``r - mu``; ``"rloo"``: ``n / (n - 1) * (r - mu)``, 0 where n = 1; ``"reinforce_pp"``:
            ``(r - mean) / (std + eps)`` over the batch, std with n - 1; ``"james_stein"``: two-level leave-one-out
            James-Stein baseline (arXiv 2511.03710).
        **options: Those of :class:`EBPO`; the other methods take ``eps`` alone, and only those that divide by a std.

    Returns:
        Advantages in the container, shape, device and float dtype of ``rewards``, computed in float64 and rounded once;
        ints and bools give the default float. Rows that do not count get 0. A value beyond the range of a narrow dtype
        saturates at its largest finite value.

    Raises:
        ValueError: infinite or too large rewards, wrong shapes or lengths, empty input, an option out of its domain.
        TypeError: complex or object rewards, a mask that is not boolean, unhashable group ids.
    """
    if method == "ebpo":
        if groups is None and mask is None and not options:
            fast = _fast(rewards)
            if fast is not None:
                return fast  # type: ignore[no-any-return]
        return EBPO(**options)(rewards, groups, mask=mask)
    eps = _baseline_eps(text("method", method), options)
    batch = read_batch(rewards, groups, mask)
    result: Rewards = batch.restore(_core.baseline_advantages(method, eps, batch.rewards, batch.groups, batch.mask))
    return result


def _fast(rewards: Any) -> Any:
    """The default case in one call of the core, or None where it does not apply."""
    if is_tensor(rewards):
        import torch

        plain = rewards.is_cpu and rewards.layout is torch.strided and rewards.dtype in (torch.float32, torch.float64)
        if not plain or rewards.requires_grad or rewards.is_neg():
            return None
        result = _core.equal_advantages(rewards.numpy())
        return None if result is None else torch.from_numpy(result)
    return _core.equal_advantages(rewards)


def _baseline_eps(method: str, options: dict[str, Any]) -> float:
    divides = method in ("grpo", "reinforce_pp")
    for name in options if method in get_args(Method) else ():  # an unknown method is named by the core
        if name != "eps" or not divides:
            takes = "only eps" if divides else "no options"
            raise ValueError(f"{name}={options[name]!r} was passed with method={method!r}, which takes {takes}")
    return real("eps", options.get("eps", 1e-6))
