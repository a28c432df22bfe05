"""Advantages of one batch without state: EBPO with the batch as its own prior, and the methods to compare it with."""

from __future__ import annotations

from typing import Any, Literal, TypeVar, get_args

from ebpo_core import _core
from ebpo_core.arguments import count, real, text
from ebpo_core.decoupled import decoupled
from ebpo_core.estimator import EBPO
from ebpo_core.inputs import on_memory
from ebpo_core.trajectories import read_rows

Rewards = TypeVar("Rewards")
Method = Literal[
    "ebpo",
    "grpo",
    "dr_grpo",
    "rloo",
    "reinforce_pp",
    "james_stein",
    "constant",
    "batch_mean",
    "maxrl",
    "pass_at_k",
    "gdpo",
]

_PARAMETERS = {"grpo": "eps", "reinforce_pp": "eps", "maxrl": "eps", "gdpo": "eps", "constant": "c", "pass_at_k": "k"}
_OF_THE_WHOLE_BATCH = ("reinforce_pp", "batch_mean", "james_stein", "gdpo")
_DEFAULTS = {"eps": 1e-6, "c": 0.5}


def advantages(
    rewards: Rewards,
    groups: Any = None,
    *,
    mask: Any = None,
    method: Method = "ebpo",
    keys: Any = None,
    trajectories: Any = None,
    turns: Any = None,
    gamma: float = 1.0,
    weights: Any = None,
    **options: Any,
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
            James-Stein baseline (arXiv 2511.03710); ``"constant"``: ``r - c``, c = 1/2 unless given (with 0/1 rewards
            half the sign advantage of arXiv 2605.07689); ``"batch_mean"``: ``r - mean`` over the batch, not scaled;
            ``"maxrl"``: ``(r - mu) / (mu + eps)`` for rewards of at least 0, 0 where mu = 0 or ``1 / (mu + eps)`` is
            infinite (arXiv 2602.02710);
            ``"pass_at_k"``: the unbiased weights of the gradient of pass@k (0/1 rewards) or max@k (graded) with their
            leave-one-out baseline (arXiv 2505.15201): ``k E max(r_i, J) - k E max(L)``, J any k - 1 and L any k of the
            group's other rewards (its k - 1 others where n = k). ``k=`` is needed; ``k=1`` is ``"rloo"``;
            ``"gdpo"``, with ``weights``: ``(x - mean) / (std + eps)`` over the batch, x the weighted sum of the "grpo"
            advantages of each reward (arXiv 2601.05242).
        keys: As in a call of :class:`EBPO`; only with ``method="ebpo"``.
        trajectories: As in a call of :class:`EBPO`, with every method.
        turns: As in a call of :class:`EBPO`, with the methods that look at one group alone; "reinforce_pp",
            "batch_mean", "james_stein" and "gdpo" look at the whole batch, and raise.
        gamma: As in a call of :class:`EBPO`.
        weights: ``(K,)``, for K rewards of each completion with a scale each. ``rewards`` is then ``(N, K)`` with
            ``groups``, or ``(M, G, K)``; NaN where a completion was not given that reward. Each reward is scored by
            itself, over the completions that have it (with "ebpo" it has a prior of its own), and the result is the
            sum over k of ``w_k`` times the advantages of reward k, 0 for a reward that is NaN.
        **options: Those of :class:`EBPO`. ``eps`` of "grpo", "reinforce_pp", "maxrl" and "gdpo", at least 0; ``c`` of
            "constant", finite; ``k`` of "pass_at_k", at least 1 and at most the counted rewards of the smallest group.
            The others take none.

    Returns:
        Advantages in the container, shape, device and float dtype of ``rewards``, computed in float64 and rounded once;
        ints and bools give the default float. Rows that do not count get 0. A value beyond the range of a narrow dtype
        saturates at its largest finite value.

    Raises:
        ValueError: infinite or too large rewards, wrong shapes or lengths, empty input, an option out of its domain.
        TypeError: complex or object rewards, a mask that is not boolean, unhashable group ids.
    """
    if method == "gdpo" and weights is None:
        raise ValueError('method="gdpo" needs weights, one for each reward of a completion: pass weights=')
    parameter = 0.0
    if method != "ebpo":
        parameter = _parameter(text("method", method), options if keys is None else {"keys": keys, **options})
        if turns is not None and method in _OF_THE_WHOLE_BATCH:
            raise ValueError(
                f"turns was given with method={method!r}, whose baseline holds every turn of the batch, as many as the "
                'policy chooses: take method="rloo" or "ebpo"'
            )
    if weights is not None:
        if method == "ebpo":
            EBPO(**options)  # refuses a wrong option before any reward is looked at
        rows = {"mask": mask, "keys": keys, "trajectories": trajectories, "turns": turns, "gamma": gamma}
        return decoupled(advantages, rewards, groups, weights, method, rows, options)  # type: ignore[no-any-return]
    if method == "ebpo":
        alone = groups is None and mask is None and keys is None and trajectories is None and turns is None
        if alone and not options and type(gamma) is float and gamma == 1.0:
            fast: Any = _core.equal_advantages(rewards)
            if fast is None:
                fast = on_memory(rewards, _core.equal_advantages)
            if fast is not None:
                return fast  # type: ignore[no-any-return]
        once = EBPO(**options)
        once._watch_prompts = False  # the warning of batches with one prompt is for those who train with a prior
        rows = {"mask": mask, "keys": keys, "trajectories": trajectories, "turns": turns, "gamma": gamma}
        return once(rewards, groups, **rows)
    batch, _ = read_rows(rewards, groups, mask, None, trajectories, turns, gamma)
    flat = _core.baseline_advantages(method, parameter, batch.rewards, batch.groups, batch.mask)
    result: Rewards = batch.restore(flat)
    return result


def _parameter(method: str, options: dict[str, Any]) -> float:
    """The method's one parameter, 0 for those that have none."""
    takes = _PARAMETERS.get(method)
    for name in options if method in get_args(Method) else ():  # an unknown method is named by the core
        if name != takes:
            what = "no options" if takes is None else f"only {takes}"
            raise ValueError(f"{name}={options[name]!r} was passed with method={method!r}, which takes {what}")
    if takes is None:
        return 0.0
    if takes == "k":
        if "k" not in options:
            raise ValueError('method="pass_at_k" needs k, the number of draws of which the best counts: pass k=')
        return float(count("k", options["k"]))
    return real(takes, options.get(takes, _DEFAULTS[takes]))
