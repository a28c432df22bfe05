"""Turns of TRL's agent loop: a reward for each, and the tokens that each is made of.

A completion of ``GRPOTrainer(tools=...)`` (or of ``environment_factory=``) is one row: the policy's tokens and, between
them, those of the tools' answers, which ``tool_mask`` leaves out. A turn is a run of the policy's tokens. TRL's loss
takes advantages ``(B, T)``, so each turn can have its own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ebpo_core.inputs import tensor_of

from .metrics import weighted_sum

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


class TurnRewards:
    """What reward functions answered, a number for a completion or a list with one for each of its turns.

    TRL takes numbers alone, so a function that is :meth:`recorded` gives it the sum of such a list.
    """

    def __init__(self) -> None:
        self.answers: dict[int, list[Any]] = {}

    def recorded(self, index: int, function: Any) -> Any:
        """The function, whose answers are kept as those of function ``index``; a reward model as it is."""
        if isinstance(function, torch.nn.Module) or not callable(function):
            return function
        if _is_async(function):

            @functools.wraps(function)
            async def scored(*args: Any, **kwargs: Any) -> list[Any]:
                return self._keep(index, await function(*args, **kwargs))

        else:

            @functools.wraps(function)
            def scored(*args: Any, **kwargs: Any) -> list[Any]:
                return self._keep(index, function(*args, **kwargs))

        return scored

    def _keep(self, index: int, answers: Any) -> list[Any]:
        self.answers[index] = listed = list(answers)
        return [_total(answer) for answer in listed]

    def take(self, rewards: torch.Tensor, turns: Sequence[int], names: Sequence[str]) -> list[Array]:
        """The rewards of each completion's turns, ``(n_funcs, K)``, NaN where there is none.

        Args:
            rewards: ``(N, n_funcs)`` of this process's completions, as TRL has them: of reward models too.
            turns: Number of turns of each completion.
            names: Names of the functions, for the errors.

        Raises:
            ValueError: a list with another number of rewards than there are turns.
        """
        numbers = rewards.detach().cpu().double().numpy()
        answers, self.answers = self.answers, {}
        by_function = [answers.get(index, numbers[:, index]) for index in range(len(names))]
        return [
            np.array([_by_turn(own[row], count, row, name) for own, name in zip(by_function, names, strict=True)])
            for row, count in enumerate(turns)
        ]


def _is_async(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _is_list(answer: Any) -> bool:
    return isinstance(answer, (list, tuple)) or (isinstance(answer, (np.ndarray, torch.Tensor)) and answer.ndim == 1)


def _total(answer: Any) -> Any:
    if not _is_list(answer):
        return answer
    known = [float(reward) for reward in answer if reward is not None]
    return float(np.nansum(known)) if known else None


def _by_turn(answer: Any, turns: int, row: int, name: str) -> list[float]:
    """One reward a turn; a number is the outcome, which comes with the last."""
    if not _is_list(answer):
        return [0.0] * (turns - 1) + [float(answer)] if answer is not None else [np.nan] * turns
    if len(answer) != turns:
        raise ValueError(
            f"the reward function {name!r} returned {len(answer)} rewards for completion {row}, which has {turns} "
            "turns (assistant messages): return one reward a turn, or one number for the outcome"
        )
    return [np.nan if reward is None else float(reward) for reward in answer]


class Rows(NamedTuple):
    """The turns of M * G completions as rows of the estimator."""

    rewards: Array
    """``(n_funcs, N)``."""
    groups: NDArray[np.int64]
    trajectories: NDArray[np.int64]
    turns: NDArray[np.int64]

    def weighted(self, weights: Array) -> Array:
        """One reward a row, ``(N,)``, as TRL adds those of several functions."""
        return weighted_sum(self.rewards.T, weights)

    def of_completions(self, advantages: Array) -> list[Array]:
        """The advantages ``(N,)`` of each completion's turns, in order."""
        return np.split(advantages, np.flatnonzero(np.diff(self.trajectories)) + 1)


def rows_of(rewards: Sequence[Array], group_size: int) -> Rows:
    """Rows of completions, those of a group beside each other, given the rewards of each one's turns."""
    counts = [of_one.shape[1] for of_one in rewards]
    trajectories = np.repeat(np.arange(len(counts)), counts)
    turns = np.concatenate([np.arange(1, count + 1) for count in counts])
    return Rows(np.concatenate(rewards, axis=1), trajectories // group_size, trajectories, turns)


def policy_mask(output: dict[str, Any]) -> torch.Tensor:
    """``(B, T)``, True at the policy's own tokens."""
    mask: torch.Tensor = output["completion_mask"].bool()
    return mask & output["tool_mask"].bool() if "tool_mask" in output else mask


def turn_of_token(mask: torch.Tensor) -> torch.Tensor:
    """``(B, T)`` int64: the number of the run of True that a token is in or that came before it, from 0; else -1."""
    before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    return (mask & ~before).long().cumsum(1) - 1


def turn_counts(mask: torch.Tensor, completions: Sequence[Any]) -> list[int]:
    """Turns of each completion; of one that is masked as a whole (truncated), its assistant messages."""
    runs = (turn_of_token(mask).amax(1) + 1).tolist()
    return [run or _messages(completion) for run, completion in zip(runs, completions, strict=True)]


def _messages(completion: Any) -> int:
    if isinstance(completion, str):
        return 1
    return max(1, sum(1 for message in completion if message.get("role") == "assistant"))


def by_token(advantages: Sequence[Array], mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``(B, T)``: at each of the policy's tokens the advantage of its turn, elsewhere 0."""
    longest = max(len(of_one) for of_one in advantages)
    table = np.zeros((len(advantages), longest))
    for row, of_one in enumerate(advantages):
        table[row, : len(of_one)] = of_one
    chosen = tensor_of(table, dtype).gather(1, turn_of_token(mask).clamp(min=0).cpu())
    return torch.where(mask, chosen.to(mask.device), 0)
