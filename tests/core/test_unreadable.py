"""What no argument can be is refused by a TypeError or ValueError that names it, whatever torch or NumPy raise.

A RuntimeError of torch would say nothing of the argument, and a rank that meets one would leave the others waiting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import ebpo_core
from ebpo_core import EBPO

torch = pytest.importorskip("torch")

REWARDS = [1.0, 0.0, 0.0, 1.0]
ABSENT: dict[str, Callable[[], Any]] = {
    "meta": lambda: torch.zeros(4, dtype=torch.int64, device="meta"),
    "sparse": lambda: torch.ones(4).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(2)]),
    "meta in a list": lambda: [torch.zeros((), dtype=torch.int64, device="meta")] * 4,
}


@pytest.mark.parametrize("kind", ABSENT)
@pytest.mark.parametrize("name", ["rewards", "groups", "mask", "keys", "trajectories", "turns", "weights"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_without_data_are_refused_by_name(name: str, kind: str) -> None:
    value = ABSENT[kind]()
    ebpo = EBPO(normalize="none")
    ebpo([[1, 0], [0, 0]])
    before = ebpo.state_dict()
    call: dict[str, Any] = {"rewards": REWARDS, "groups": [1, 1, 2, 2], "keys": None}
    if name == "turns":
        call["trajectories"] = [1, 1, 2, 2]
    call[name] = value
    score = ebpo_core.advantages if name == "weights" else ebpo
    if name == "weights":
        call["rewards"] = np.ones((4, 4))
    with pytest.raises((TypeError, ValueError), match=f"^{name}"):
        score(call.pop("rewards"), call.pop("groups"), **call)
    assert ebpo.state_dict() == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"rewards": [torch.ones(2, requires_grad=True)] * 2}, "^rewards cannot be read"),
        ({"groups": [torch.ones(2)] * 4}, "^groups holds a tensor that is no single number"),
        ({"trajectories": [torch.ones(2)] * 4}, "^trajectories holds a tensor that is no single number"),
    ],
)
def test_tensors_in_lists_are_refused_by_name(call: dict[str, Any], message: str) -> None:
    full = {"rewards": REWARDS, "groups": None if "rewards" in call else [1, 1, 2, 2]} | call
    with pytest.raises(TypeError, match=message):
        EBPO()(full.pop("rewards"), full.pop("groups"), **full)


def test_ragged_weights_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="^weights is not rectangular"):
        ebpo_core.advantages(np.ones((4, 2)), [1, 1, 2, 2], weights=[[1], [2, 3]])


def test_ids_in_bfloat16_are_ids() -> None:
    groups = torch.tensor([1, 1, 2, 2], dtype=torch.bfloat16)
    assert EBPO()(REWARDS, groups, trajectories=torch.arange(4).bfloat16()) == EBPO()(REWARDS, [1, 1, 2, 2])


def test_a_column_of_arrow_holds_keys() -> None:
    pyarrow = pytest.importorskip("pyarrow")
    for column in (pyarrow.array(["a", "a", None, None]), pyarrow.chunked_array([["a", "a"], [None, None]])):
        ebpo = EBPO()
        ebpo(REWARDS, [1, 1, 2, 2], keys=column)
        assert list(ebpo.priors) == [(), "a"]
