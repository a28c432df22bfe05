"""The EBPO estimator with its running priors (arXiv 2602.05165, §3).

For a group m with n valid rows, mean ``mu_m``, and a prior with mean ``mu_glob``, noise variance ``sigma2`` and spread
``tau2``::

    S_m    = (sigma2 / n) / (sigma2 / n + tau2)        shrinkage factor in [0, 1]; 0 where the denominator is 0
    V_m    = (1 - S_m) * mu_m + S_m * mu_glob          baseline
    raw    = r - V_m
    A      = (raw - mean(raw)) / (std(raw) + eps)      over all valid rows of the batch

With keys the three numbers of a group's prior are blended along its key, from the root down (``h = 1`` for a key that
has seen no group, so that it starts as its parent)::

    theta~_k = (1 - h) * theta_k + h * theta~_parent   for theta = mu_glob, sigma2, tau2
    h        = kappa / (kappa + groups seen by k)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar

import numpy as np

from ebpo_core import _core
from ebpo_core.arguments import count, flag, left_out, real, step_id, text, zero_or_one
from ebpo_core.diagnostics import Diagnostics, warn_of_one_prompt
from ebpo_core.inputs import Batch, on_memory, read_group, round_to
from ebpo_core.keys import Key, Keys, key_of, path_of
from ebpo_core.prior import Prior, prior_of
from ebpo_core.state import check_options, read_state, write_state
from ebpo_core.trajectories import read_rows

Rewards = TypeVar("Rewards")


class Options(TypedDict):
    """Every option of the estimator; see :class:`EBPO`."""

    normalize: Literal["batch", "scale", "none"]
    sigma2: Literal["total", "within"]
    tau2: Literal["raw", "debiased"]
    score: Literal["after", "before"]
    leave_one_out: bool | Literal["row"]
    shrinkage: float | None
    decay: float
    decay_by: Literal["update", "visit"]
    eps: float
    ddof: int
    norm_ddof: int
    kappa: float
    max_keys: int


class ShrunkenPrior(NamedTuple):
    """The numbers that a group is shrunk with: ``theta~`` of its key. All 0 while nothing has been seen."""

    mean: float
    sigma2: float
    tau2: float


class EBPO:
    """The estimator with its running priors.

    Args:
        normalize: ``"batch"`` (paper): ``(raw - mean) / (std + eps)`` over the batch. With one prompt in a batch that
            is GRPO: its baseline is one number, which the mean takes out again (logged, once). ``"scale"``:
            ``raw / (rms + eps)``, not centred, so that the advantage of an all-failed group stays negative (§3a).
            ``"none"``: ``raw``.
        sigma2: ``"total"`` (paper): variance of all rewards seen. ``"within"``: ``sum(SSW_m) / sum(n_m - 1)``, SSW_m
            the sum of squares within a group, over the run; as ``"total"`` until a group has had two rows.
        tau2: ``"raw"`` (paper): variance of all group means seen. ``"debiased"``:
            ``max(0, Var1(mu) - sigma2_within * mean(1 / n_m))``, Var1 with n - 1.
        score: ``"after"`` (paper): the batch enters the prior, then is scored. ``"before"``: scored first; an empty
            prior then gives S = 0, the group's own mean.
        leave_one_out: True (or ``"group"``): score each group against history and batch without that group; S = 0 if
            nothing is left. Raises with ``score="before"``, where it has no meaning. ``"row"``: besides, the group's
            mean that a reward is compared with is that of the group's n - 1 others, and S is that of n - 1 rows; n = 1
            gives S = 1 (and V = 0 while the prior is empty). Nothing in the baseline then depends on the reward, so the
            policy gradient is unbiased. For that it needs ``normalize="none"``: the other two divide by a number that
            the reward is in. (Scored again, by ``update=False`` or an old ``step``, the batch is in the prior already.)
        shrinkage: None (paper): S of each group is estimated. A number in [0, 1] is the S of every group, of whatever
            size, once rewards that differ have been seen (0 until then): with groups of equal size a fixed mix of the
            group's and the batch's mean. Raises with ``sigma2="within"`` or ``tau2="debiased"``, which estimate S.
        decay: rho in (0, 1]; before each update every count, M2 and sum is multiplied by it, so that the prior
            remembers about ``1 / (1 - rho)`` batches. 1 (paper) never forgets. A batch without valid rows is no update.
        decay_by: The updates that count for ``decay``. ``"update"``: every key is discounted at each update, as the
            root is, whether the batch holds it or not, so a key that is idle becomes young again and falls back to
            its parent. ``"visit"``: a prior is discounted at the updates that hold a group of it, and at no other.
            The root and a parent are visited with each of their keys. This is for a key per prompt (a tracker).
        eps: Added to the denominator of ``normalize``; at least 0. With 0 nothing damps rounding where the exact
            advantages are 0 without the rewards being equal.
        ddof: 0 or 1; the variances ``sigma2="total"`` and ``tau2="raw"`` divide by ``count - ddof``.
        norm_ddof: 0 or 1; the std of ``normalize="batch"`` divides by ``rows - norm_ddof`` (1 as ``torch.std``).
        kappa: Groups that a key's parent is worth when the two are blended; at least 0. With 0 a key stands alone
            from its first group on.
        max_keys: Most priors kept beside the root's, parents included. An update that would need more raises.

    An object may be shared by threads and is intact in a forked child. Arrays must not change during a call.
    """

    __slots__ = ("_checked", "_last", "_options", "_state", "_watch_prompts")

    def __init__(
        self,
        *,
        normalize: Literal["batch", "scale", "none"] = "batch",
        sigma2: Literal["total", "within"] = "total",
        tau2: Literal["raw", "debiased"] = "raw",
        score: Literal["after", "before"] = "after",
        leave_one_out: bool | Literal["group", "row"] = False,
        shrinkage: float | None = None,
        decay: float = 1.0,
        decay_by: Literal["update", "visit"] = "update",
        eps: float = 1e-6,
        ddof: int = 0,
        norm_ddof: int = 1,
        kappa: float = 10.0,
        max_keys: int = 1024,
    ) -> None:
        self._options = Options(
            normalize=text("normalize", normalize),
            sigma2=text("sigma2", sigma2),
            tau2=text("tau2", tau2),
            score=text("score", score),
            leave_one_out=left_out("leave_one_out", leave_one_out),  # type: ignore[typeddict-item]
            shrinkage=None if shrinkage is None else real("shrinkage", shrinkage),
            decay=real("decay", decay),
            decay_by=text("decay_by", decay_by),
            eps=real("eps", eps),
            ddof=zero_or_one("ddof", ddof),
            norm_ddof=zero_or_one("norm_ddof", norm_ddof),
            kappa=real("kappa", kappa),
            max_keys=count("max_keys", max_keys),
        )
        self._checked = _core.Options(**self._options)
        self._state = _core.State()
        # The last call, its keys, and with process_group where this rank's groups are.
        self._last: tuple[_core.Call, Keys | tuple[Key, ...] | None, Any] | None = None
        self._watch_prompts = normalize == "batch"  # until a batch has several prompts, as the next ones will

    def __call__(
        self,
        rewards: Rewards,
        groups: Any = None,
        *,
        mask: Any = None,
        update: bool = True,
        step: int | None = None,
        keys: Any = None,
        trajectories: Any = None,
        turns: Any = None,
        gamma: float = 1.0,
        process_group: Any = None,
    ) -> Rewards:
        """Score a batch and take it into the prior.

        Args:
            rewards: As in :func:`ebpo_core.advantages`.
            groups: As in :func:`ebpo_core.advantages`.
            mask: As in :func:`ebpo_core.advantages`.
            update: False scores against the stored prior alone and leaves it unchanged (evaluation); an empty prior
                gives S = 0.
            step: Id of this update, growing through training. An update whose id is not newer than the last one
                applied scores like ``update=False``, so a retried or replayed batch is counted once. (Its advantages
                are those of the first time only with ``score="after"`` and without ``leave_one_out``.)
            keys: One key per reward, or one per group where ``rewards`` is ``(M, G)``: a string, an int, a bool, a
                tuple of them whose prefixes are its parents, or None for the root. The rows of a group have one key.
                Each group enters the priors of its key, of the key's parents, and the root's, and is shrunk with the
                blend of them (see the module). Without ``keys`` there is only the root's.
            trajectories: ``(N,)`` id of each row's trajectory, of any hashable kind, where a completion makes several
                rows (sub-agents, compaction); it names a trajectory of its group. Such rows share one outcome, count
                once in every statistic, and each gets the trajectory's advantage. The rewards that ``mask`` keeps must
                be equal within a trajectory; all NaN is an unknown outcome.
            turns: ``(N,)`` ints, with ``trajectories``: row (i, k) is turn k of trajectory i, of which there may be any
                number, and its reward is that turn's. The advantage is ``R_ik - V`` of the return-to-go
                ``R_ik = sum over l >= k of gamma ** (l - k) * r_il``, V from the cell (prompt, k): the trajectories of
                the prompt that reached turn k, shrunk toward the prior of key k, a child of the root (or of the row's
                key, with ``keys``). Diagnostics are by cell; what ``leave_one_out`` leaves out is the whole prompt. A
                NaN reward makes the returns of its turn and of those before it unknown: they do not count. A row that
                ``mask`` leaves out is still in the returns of the turns before it. Needs ``normalize="scale"`` or
                ``"none"``: centring over all turns of a batch would reward the policy for their number.
            gamma: Discount of ``turns``, in [0, 1].
            process_group: A torch.distributed process group. This batch is then one rank's shard, and every rank must
                make the call: the shards are scored and taken in as one process would that sees all of them, in the
                order of the ranks. A group must be whole on one rank; its id need not differ from other ranks'. The
                ranks' options and priors must be equal, and after the call their priors are, to the bit.

        Returns:
            Advantages in the container, shape, device and float dtype of ``rewards``.

        Raises:
            ValueError, TypeError: as in :func:`ebpo_core.advantages`; keys that are too many, or differ within a group.
                The priors are then untouched.
            RuntimeError: another rank could not score its shard; no rank's prior changed.
        """
        if process_group is not None:
            rows = rewards, groups, mask, keys, trajectories, turns, gamma
            together: Rewards = self._together(rows, update, step, process_group)
            return together
        update, step = flag("update", update), step_id(step)
        plain = groups is None and mask is None and trajectories is None and turns is None
        if plain and type(gamma) is float and gamma == 1.0 and (keys is None or type(keys) is list):
            listed = None if keys is None else tuple(keys)
            fast: Any = self._matrix(rewards, listed, update, step)
            if fast is None:
                fast = on_memory(rewards, lambda memory: self._matrix(memory, listed, update, step))
            if fast is not None:
                return fast  # type: ignore[no-any-return]
        batch, read = self._read(rewards, groups, mask, keys, trajectories, turns, gamma)
        flat, call = self._advance((batch.rewards, batch.groups, batch.mask, read), update, step)
        self._last = call, read, None  # one assignment, so that threads never see a mixture of two calls
        if self._watch_prompts and update:
            self._count_prompts(call)
        result: Rewards = batch.restore(flat)
        return result

    def _matrix(self, rewards: Any, keys: tuple[Any, ...] | None, update: bool, step: int | None) -> Any:
        """A call with a plain matrix, and perhaps a string for each row, in one call of the core; else None."""
        done = self._state.advance_matrix(self._checked, rewards, keys, update, step)
        if done is None:
            return None
        flat, call = done
        self._last = call, keys, None
        if self._watch_prompts and update:
            self._count_prompts(call)
        return flat

    def _advance(self, rows: tuple[Any, ...], update: bool, step: int | None) -> tuple[Any, _core.Call]:
        """The core's call with rewards, groups, mask and keys as it reads them.

        A plain matrix goes the way of :meth:`_matrix` here too, whatever it came in: the two ways round differently.
        """
        rewards, groups, mask, keys = rows
        if isinstance(groups, int) and mask is None:
            done = self._state.advance_matrix(self._checked, rewards.reshape(-1, groups), keys, update, step)
            if done is not None:
                return done[0].reshape(-1), done[1]
        return self._state.advance(self._checked, rewards, groups, mask, update, step, keys, False)

    def group(
        self, rewards: Rewards, key: Any = None, *, mask: Any = None, update: bool = True, step: int | None = None
    ) -> Rewards:
        """Score one group as it comes, without a batch: read the prior, score, then take the group into the prior.

        ``A = (r - V) / (sqrt(sigma2) + eps)``, with V and ``sigma2`` of the key's blended prior as it was before this
        group; ``normalize="none"`` gives ``r - V``, and neither ``score`` nor ``leave_one_out=True`` matters
        (``"row"`` leaves each reward out of the group's mean here too). An empty prior gives S = 0, so V is the group's
        own mean. While ``sigma2`` is 0 (an empty prior, or one that knows a
        single value) S is 0 too, and the group's own standard deviation with ``norm_ddof`` stands in for
        ``sqrt(sigma2)``; a group of equal rewards then gets 0, as S = 0 leaves nothing of it. ``decay`` counts groups
        here, not batches.

        Args:
            rewards: ``(n,)``, the group's rewards, in any container that :func:`ebpo_core.advantages` takes.
            key: The group's key, as in a call with ``keys``.
            mask: ``(n,)``; True where a reward counts.
            update: False leaves the prior unchanged.
            step: As in a call: an id that is not newer than the last one is scored and not counted.

        Returns:
            Advantages ``(n,)`` in the container and float dtype of ``rewards``.
        """
        batch = read_group(rewards, mask)
        keys = Keys([path_of(key)], np.zeros(1, dtype=np.uint32))
        flat, call = self._state.advance(
            self._checked, batch.rewards, batch.groups, batch.mask, flag("update", update), step_id(step), keys, True
        )
        self._last = call, keys, None
        result: Rewards = batch.restore(flat)
        return result

    def _read(self, *rows: Any) -> tuple[Batch, Keys | None]:
        """:func:`ebpo_core.trajectories.read_rows`, and what the options do not allow."""
        if rows[5] is not None and self._options["normalize"] == "batch":
            raise ValueError(
                'turns was given with normalize="batch", which subtracts one mean from every turn: as a trajectory has '
                "as many turns as the policy chooses, that rewards it for their number. Build the estimator with "
                'normalize="scale" or "none"'
            )
        return read_rows(*rows)

    def _together(self, rows: tuple[Any, ...], update: bool, step: int | None, process_group: Any) -> Any:
        """A call with ``process_group``: as one process would that passes the shards of all ranks."""
        from ebpo_core.shards import Shard, gather

        # This rank's rows, scored by an empty estimator first: what cannot be scored must be told to the other ranks.
        shard: Shard | Exception
        try:
            update, step = flag("update", update), step_id(step)
            batch, own = self._read(*rows)
            shard = Shard(batch.rewards, batch.groups, batch.mask, own)
            _core.State().advance(self._checked, *shard[:3], False, None, own, False)
        except (TypeError, ValueError) as error:
            shard = error
        common = {
            "arguments update= and step=": ((update, step), "pass the same ones on every rank"),
            "argument turns=": ("None" if rows[5] is None else "ints", "pass it on every rank, or on none"),
            "argument gamma=": (rows[6], "pass the same one on every rank"),
            "options": (dict(self._options), "build the estimator alike on every rank"),
            "priors": (
                self._state.digest(),
                "load one state on every rank, and pass process_group= in every call that updates",
            ),
        }
        try:
            whole, of_rank, mine = gather(shard, common, process_group)
        finally:
            del shard  # an error must not hold this frame, which holds the process group, while the frame holds it

        # The batch of all ranks, and this rank's slice of what came out.
        flat, call = self._advance(whole, update, step)
        if self._watch_prompts and update:
            self._count_prompts(call)
        self._last = call, own, mine
        return batch.restore(round_to(flat[of_rank], batch.rewards.dtype))  # float64 where another rank's rewards are

    def _count_prompts(self, call: _core.Call) -> None:
        prompts = call.prompts()  # of the groups, those that are not all padding
        self._watch_prompts = prompts < 2
        if prompts == 1:
            warn_of_one_prompt()

    @property
    def diagnostics(self) -> Diagnostics | None:
        """Shrinkage, baselines and the prior of the last call, computed when asked for; None before the first."""
        last = self._last
        if last is None:
            return None
        call, keys, mine = last
        (shrinkage, baseline, counts, blended), scalars = call.diagnostics()
        if mine is not None:
            shrinkage, baseline, counts = shrinkage[mine], baseline[mine], counts[mine]
            blended = None if blended is None else (blended[0][mine], blended[1][mine], blended[2][mine])
        listed = keys.of_groups() if isinstance(keys, Keys) else keys
        return Diagnostics(shrinkage, baseline, counts, *scalars, keys=listed, blended=blended)

    @property
    def options(self) -> Options:
        """A copy of the options."""
        return self._options.copy()

    @property
    def prior(self) -> Prior:
        """A copy of the root's prior, which holds everything; changing it changes nothing here (see :meth:`merge`)."""
        return prior_of(self._state.parts()[0])

    @property
    def priors(self) -> dict[Key, Prior]:
        """A copy of every key's own prior, not blended, parents first; the root's is under ``()``."""
        own = {key_of(path): prior_of(parts) for path, parts in self._state.priors()}
        return {(): self.prior, **own}

    @property
    def key_count(self) -> int:
        """Number of keys that have a prior, parents included, without the root."""
        return self._state.key_count()

    def shrunken_prior(self, key: Any = None) -> ShrunkenPrior:
        """Mean, sigma2 and tau2 that a group of this key would be shrunk with now: ``theta~``, by the options."""
        return ShrunkenPrior(*self._state.shrunken(self._checked, path_of(key)))

    @property
    def step(self) -> int | None:
        """Id of the last update applied, or None."""
        return self._state.parts()[1]

    def merge(self, other: EBPO | Prior) -> None:
        """Add everything that ``other`` has seen: an estimator with the same options, or a prior (into the root's)."""
        if not isinstance(other, (EBPO, Prior)):
            raise TypeError(f"other is of type {type(other).__name__}: expected ebpo_core.EBPO or ebpo_core.Prior")
        if isinstance(other, EBPO):
            check_options(self._options, other._options, "other")
        self._state.merge(other._state, self._options["max_keys"])

    def reset(self) -> None:
        """Forget everything seen; the options stay."""
        self._state, self._last = _core.State(), None

    def before_update(self) -> EBPO:
        """A copy as it was before the last update; as it is now, if there was none since it was made, loaded or merged.

        An update keeps what it overwrites, so this needs no copy to be made before each.
        """
        copy = EBPO(**self._options)
        copy._state = self._state.before_update()
        return copy

    def state_dict(self, *, arrays: bool = False) -> dict[str, Any]:
        """Options, priors and step as a dict, exact to the bit (see :mod:`ebpo_core.state`).

        Args:
            arrays: False gives plain JSON. True gives the keys as a dict of NumPy arrays, which for very many keys
                takes a tenth of the time and memory.
        """
        return write_state(self._options, self._state, flag("arrays", arrays))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace priors and step by those of ``state``; the options stay, and one logged line names those that differ.

        What is stored are sums that depend on no option; ``decay`` acts from the next update on. Raises ValueError,
        leaving everything untouched, on a newer version, more keys than ``max_keys``, an option that this release does
        not know, or anything else that :meth:`state_dict` cannot have written.
        """
        read_state(self._options, self._state, state)
        self._last = None

    def __getstate__(self) -> dict[str, Any]:
        return self.state_dict(arrays=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["options"])  # type: ignore[misc]
        self.load_state_dict(state)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EBPO):
            return NotImplemented
        return self._options == other._options and self._state.same(other._state)

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        defaults = EBPO.__init__.__kwdefaults__ or {}
        changed = [f"{name}={value!r}" for name, value in self._options.items() if value != defaults.get(name)]
        keys = self.key_count
        return f"EBPO({', '.join(changed)}) with {self.prior!r}" + (f" and {keys} keys" if keys else "")
