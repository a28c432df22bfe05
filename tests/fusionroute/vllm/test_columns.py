"""The wire format of the routing, through an engine's float32 and an API's JSON; and other values, which are none."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ebpo_core.fusionroute.vllm.columns import DIGIT, decode, encode, extra_columns, routing_ids

CUT = -9999.0
LOGITS = st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=12)
WEIGHTS = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=126)
OWN = st.integers(0, 2_000_000)


def sent(logits: list[float], weights: list[float], own: int, *, cut: float = CUT) -> list[float]:
    """What a client gets for one token: the columns, behind the logits, under a log-softmax of float32, as JSON."""
    one = torch.tensor([logits])
    routing = torch.tensor([weights])
    columns = encode(routing.argmax(-1), routing, torch.tensor([own]))
    assert columns.shape == (1, extra_columns(len(weights)))
    fused = torch.cat([one, one.logsumexp(-1, keepdim=True) + columns], dim=-1)
    assert torch.equal(fused.softmax(-1)[:, len(logits) :], torch.zeros(columns.shape)), "no share in the probabilities"
    logprobs = fused.log_softmax(-1, dtype=torch.float32)[0]
    # With and without the columns, tokens have the same log-probabilities to the bit or to a rounding.
    torch.testing.assert_close(logprobs[: len(logits)], one.log_softmax(-1)[0], rtol=1e-6, atol=1e-6)
    ids = routing_ids(len(logits), len(weights))
    values: list[float] = json.loads(json.dumps([max(value, cut) for value in logprobs[ids].tolist()]))
    return values


@given(LOGITS, WEIGHTS, OWN)
@example([0.0], [0.0] * 126, 0)
@example([1000.0], [50.0, -50.0], DIGIT * DIGIT - 1)
@example([-1000.0, -1000.0], [0.0, 0.0], DIGIT - 1)
@example([3.0], [1.0], DIGIT)
def test_what_is_encoded_comes_back(logits: list[float], weights: list[float], own: int) -> None:
    column = decode(sent(logits, weights, own))
    exact = torch.tensor(weights, dtype=torch.float64)
    assert column.expert == torch.tensor(weights).argmax()
    assert column.own == own
    assert abs(column.weight - exact.softmax(-1)[column.expert].item()) < 1e-6
    assert 0 <= column.weight <= 1


@given(LOGITS, st.lists(WEIGHTS.map(lambda weights: weights[:2]), min_size=2, max_size=4), st.data())
def test_rows_do_not_mix(logits: list[float], rows: list[list[float]], data: Any) -> None:
    weights = torch.tensor([row + [0.5] * (2 - len(row)) for row in rows])
    own = torch.tensor(data.draw(st.lists(OWN, min_size=len(rows), max_size=len(rows))))
    for row, values in enumerate(encode(weights.argmax(-1), weights, own).tolist()):
        assert decode(values)[::2] == (int(weights[row].argmax()), int(own[row]))


@example([1.0], [1.0], 5, 0.5)
@given(LOGITS, WEIGHTS, OWN, st.sampled_from([-700.3, -3.0, -2.25, 0.5, 8.0, 99.7]))
def test_raw_logits_are_no_routing(logits: list[float], weights: list[float], own: int, size: float) -> None:
    """A server with logprobs_mode raw_logits sends the columns, moved by the log of the sum."""
    with pytest.raises(ValueError, match="raw_logprobs"):
        decode([value + size for value in sent(logits, weights, own)])


@given(st.lists(st.floats(-300, 0, width=32), max_size=8))
def test_tokens_are_no_routing(values: list[float]) -> None:
    with pytest.raises(ValueError, match="no routing"):
        decode(values)


@pytest.mark.parametrize("wrong", [CUT, -math.inf, math.inf, math.nan])
@pytest.mark.parametrize("place", range(5))
def test_masked_columns_are_no_routing(wrong: float, place: int) -> None:
    values = sent([1.0, 2.0], [0.1, 0.7, 0.2], 5)
    assert decode(values).own == 5
    values[place] = wrong
    with pytest.raises(ValueError, match="grammar"):
        decode(values)


@pytest.mark.parametrize("wanted", [1, 2, 4, 5])
def test_another_number_of_experts_is_noticed(wanted: int) -> None:
    weights = torch.tensor([[0.1, 1.7, 0.2]])
    columns = encode(torch.tensor([1]), weights, torch.tensor([9]))[0].tolist()
    ahead = [-3.0, -0.5]  # tokens before the columns
    values = (ahead + columns)[-extra_columns(wanted) :] if wanted > 3 else columns[: extra_columns(wanted)]
    with pytest.raises(ValueError, match="no routing"):
        decode(values)
