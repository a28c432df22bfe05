"""What saturated groups get, and the batch of one prompt, in which the paper's form gives them nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given

import ebpo_core
from ebpo_core import diagnostics, reference
from oracle import Case, cases, options


@given(case=cases(), options=options())
def test_dead_advantage_is_the_mean_size_of_what_saturated_groups_got(case: Case, options: dict[str, Any]) -> None:
    ebpo = ebpo_core.EBPO(**options)
    advantages = ebpo(case.rewards, case.groups, mask=case.mask).reshape(-1)
    rewards, index, valid = reference.arrange(case.rewards, case.groups, case.mask)
    dead = [rows for m in range(index.max() + 1) if (rows := valid & (index == m)).any() and np.ptp(rewards[rows]) == 0]
    d = ebpo.diagnostics
    assert d is not None
    if not dead:
        assert np.isnan(d.dead_advantage)
        assert "ebpo/dead_advantage" not in d.metrics()
        return
    expected = np.abs(advantages[np.logical_or.reduce(dead)]).mean()
    np.testing.assert_allclose(d.dead_advantage, expected, rtol=1e-9, atol=1e-300)
    assert d.metrics()["ebpo/dead_advantage"] == d.dead_advantage


def test_dead_advantage_of_streams_and_evaluation() -> None:
    ebpo = ebpo_core.EBPO()
    ebpo([[1.0, 0.0], [0.0, 0.0]])
    calls = (lambda: ebpo([[0.0, 0.0], [1.0, 0.0]], update=False)[0], lambda: ebpo.group([0.0, 0.0]))
    for call in calls:
        failed = call()
        assert failed[0] < 0
        assert ebpo.diagnostics is not None
        assert ebpo.diagnostics.dead_advantage == pytest.approx(-failed[0], rel=1e-15)


class TestOnePromptInABatch:
    @pytest.fixture(autouse=True)
    def untold(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(diagnostics, "_warned_of_one_prompt", False)

    @pytest.mark.parametrize("options", [{}, {"leave_one_out": True}, {"score": "before"}, {"sigma2": "within"}])
    def test_it_is_exactly_grpo_and_said_once(self, options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
        ebpo = ebpo_core.EBPO(**options)
        for rewards in ([[1.0, 0.0, 0.0, 1.0]], [[0.0] * 4], [[1.0] * 4], [[1.0, 0.2, 0.0, 0.3]]):
            grpo = ebpo_core.advantages(rewards, method="grpo")
            np.testing.assert_allclose(ebpo(rewards, keys=["a"]), grpo, atol=1e-12)
            assert ebpo.diagnostics is not None
            assert ebpo.diagnostics.saturated in (0, 1)
            assert ebpo.diagnostics.saturated == 0 or ebpo.diagnostics.dead_advantage == 0
        ebpo_core.EBPO(**options)([[1.0, 0.0]])
        (line,) = caplog.messages
        assert "exactly GRPO" in line
        assert "normalize='scale'" in line

    def test_scaling_without_centring_does_not_have_it(self, caplog: pytest.LogCaptureFixture) -> None:
        ebpo = ebpo_core.EBPO(normalize="scale")
        ebpo([[1.0, 0.0], [0.0, 0.0]])
        ebpo([[0.0, 0.0]])
        assert ebpo.diagnostics is not None
        assert ebpo.diagnostics.dead_advantage > 0
        assert not caplog.messages

    def test_padding_is_no_prompt_and_evaluation_no_update(self, caplog: pytest.LogCaptureFixture) -> None:
        ebpo = ebpo_core.EBPO()
        ebpo([[1.0, 0.0]], update=False)
        ebpo([[1.0, 0.0], [np.nan, np.nan]], mask=[[False, False], [True, True]])  # a batch of nothing
        ebpo.group([1.0, 0.0])
        ebpo_core.advantages([[1.0, 0.0]], eps=0.1)
        assert not caplog.messages
        ebpo([1.0, 0.0, 1.0, 1.0], ["a", "a", "pad0", "pad0"], mask=[True, True, False, False])
        assert len(caplog.messages) == 1

    def test_a_last_batch_of_one_prompt_is_no_habit(self, caplog: pytest.LogCaptureFixture) -> None:
        ebpo = ebpo_core.EBPO()
        ebpo([[1.0, 0.0], [0.0, 0.0]])
        ebpo([[1.0, 0.0]])
        assert not caplog.messages
