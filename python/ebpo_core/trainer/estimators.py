"""The trainer's estimators: one for the weighted sum of the rewards, or one for each reward function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ebpo_core import EBPO

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Estimators:
    """Estimators with the same options, and their state as one.

    Args:
        options: the keyword arguments of :class:`ebpo_core.EBPO`.
        functions: names of the reward functions, each of which gets an estimator; None for one estimator in all.
    """

    def __init__(self, options: dict[str, Any], functions: Sequence[str] | None) -> None:
        self.functions = None if functions is None else list(functions)
        self.all = [EBPO(**options) for _ in (self.functions or [""])]

    def weighted(
        self,
        rewards: NDArray[np.float64],
        weights: NDArray[np.float64],
        *,
        update: bool,
        keys: list[Any] | None,
        **rows: Any,
    ) -> NDArray[np.float64]:
        """The weighted sum of every function's advantages; where one fails, no estimator has changed.

        Args:
            rewards: ``(n_funcs, M, G)``, or ``(n_funcs, N)`` with ``rows``; NaN where a function returned None: it
                then adds nothing to that completion.
            weights: ``(n_funcs,)``.
            update: whether the rewards enter the priors.
            keys: one per group, or with ``rows`` one per row; or None.
            rows: further arguments of :meth:`ebpo_core.EBPO.__call__`.

        Returns:
            ``(M, G)`` or ``(N,)``.
        """
        total = np.zeros(rewards.shape[1:])
        done: list[EBPO] = []
        try:
            for ebpo, own, weight in zip(self.all, rewards, weights, strict=True):
                total += weight * ebpo(own, update=update, keys=keys, **rows)
                done.append(ebpo)
        except (TypeError, ValueError):
            for ebpo in done if update else []:
                ebpo.load_state_dict(ebpo.before_update().state_dict(arrays=True))
            raise
        return total

    def metrics(self) -> dict[str, float]:
        """The ``ebpo/`` metrics of the last batch, with the function's name in each where there is one."""
        metrics: dict[str, float] = {}
        for ebpo, name in zip(self.all, self.functions or [""], strict=True):
            diagnostics = ebpo.diagnostics  # computed at each access
            if diagnostics is not None:
                metrics |= diagnostics.metrics(f"ebpo/{name}/" if name else "ebpo/")
        return metrics

    def state(self, *, before_update: bool = False) -> EBPO | list[dict[str, Any]]:
        """The estimators, or copies from before their last update, for :func:`ebpo_core.trainer.write_prior`."""
        all_of_them = [ebpo.before_update() for ebpo in self.all] if before_update else self.all
        if self.functions is None:
            return all_of_them[0]
        return [{"reward": name, "ebpo": ebpo} for name, ebpo in zip(self.functions, all_of_them, strict=True)]

    def load(self, content: dict[str, Any]) -> None:
        """Take over the states of a prior's file (:func:`ebpo_core.trainer.read_prior`); all of them, or none."""
        entries = content.get("ebpo_per_reward")
        names = None if entries is None else [entry.get("reward") for entry in entries]
        if names != self.functions:
            raise ValueError(
                f"the prior is of {_described(names)}, this trainer has {_described(self.functions)}: set "
                f"ebpo_per_reward={names is not None} and pass the same reward functions in the same order, or start "
                "without that prior"
            )
        states = [content["ebpo"]] if entries is None else [entry["ebpo"] for entry in entries]
        checked = [EBPO(**ebpo.options) for ebpo in self.all]  # all are checked before any is replaced
        for fresh, state in zip(checked, states, strict=True):
            # Options that differ are logged by the first; a trainer saves all functions' states under the same ones.
            again = fresh is not checked[0] and state.get("options") == states[0].get("options")
            fresh.load_state_dict({**state, "options": fresh.options} if again else state)
        for ebpo, fresh in zip(self.all, checked, strict=True):
            ebpo.load_state_dict(fresh.state_dict(arrays=True))


def _described(names: list[Any] | None) -> str:
    return "the weighted sum of the rewards" if names is None else f"one prior for each of the reward functions {names}"
