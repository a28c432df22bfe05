"""Shadow mode: TRL's training bit for bit, EBPO's advantages logged beside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("trl")

import pandas as pd
import torch
import trainer_worker as tiny

from ebpo_core import reference
from ebpo_core.trainer import EBPOConfig
from ebpo_core.trainer.metrics import shadow_metrics

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.mark.parametrize("scale", [{}, {"scale_rewards": "batch"}], ids=["default", "batch"])
def test_shadow_trains_as_grpo_and_logs_ebpo(tmp_path: Path, scale: dict[str, Any]) -> None:
    settings = {"max_steps": 4, "log_completions": True, **scale}
    grpo = tiny.build(tiny.RecordingGRPO, tiny.config(tiny.GRPOConfig, tmp_path / "grpo", **settings))
    grpo.train()
    shadow_args = tiny.config(EBPOConfig, tmp_path / "shadow", ebpo_shadow=True, **settings)
    shadow = tiny.build(tiny.RecordingEBPO, shadow_args)
    shadow.train()

    for (name, ours), theirs in zip(shadow.model.named_parameters(), grpo.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert list(shadow._logs["advantages"]) == list(grpo._logs["advantages"])

    twin = reference.EBPO()
    logs = [entry for entry in shadow.state.log_history if "loss" in entry]
    for step, (rewards, output, log) in enumerate(zip(shadow.rewards, shadow.outputs, logs, strict=True), start=1):
        groups = rewards.double().numpy().reshape(-1, tiny.GROUP)
        expected = twin(groups).reshape(-1)
        table = pd.read_parquet(tmp_path / "shadow" / "completions" / f"completions_{step:05d}.parquet")
        np.testing.assert_allclose(table["ebpo_advantage"], expected, rtol=1e-6, atol=1e-7)
        trl = output["advantages"].double().numpy()
        assert table["advantage"].tolist() == trl.tolist()
        assert log["ebpo/prior_mean"] == pytest.approx(twin.prior.rewards.mean)
        assert log["ebpo/shadow_sign_disagreement"] == np.mean(trl * expected < 0)
        if trl.std() > 0:
            assert log["ebpo/shadow_advantage_correlation"] == pytest.approx(np.corrcoef(trl, expected)[0, 1])
            assert log["ebpo/shadow_scale_ratio"] == pytest.approx(np.linalg.norm(expected) / np.linalg.norm(trl))


def test_shadow_metrics_by_hand() -> None:
    rewards = np.array([[1.0, 1.0], [0.0, 1.0], [np.nan, 0.5], [np.nan, np.nan]])
    trl = np.array([0.0, 0.0, -1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    ebpo = np.array([0.5, 0.5, -2.0, -1.0, 0.0, -0.2, 0.0, 0.0])
    metrics = shadow_metrics(trl, ebpo, rewards)
    assert metrics["ebpo/shadow_sign_disagreement"] == pytest.approx(1 / 5)  # of the five scored completions
    assert metrics["ebpo/shadow_saturated_advantage"] == pytest.approx((0.5 + 0.5 + 0.2) / 3)
    assert metrics["ebpo/shadow_scale_ratio"] == pytest.approx(np.sqrt((0.25 + 0.25 + 4 + 1 + 0.04) / 2))
    scored = [0, 1, 2, 3, 5]
    assert metrics["ebpo/shadow_advantage_correlation"] == pytest.approx(np.corrcoef(trl[scored], ebpo[scored])[0, 1])


def test_shadow_metrics_leave_out_what_is_undefined() -> None:
    saturated = shadow_metrics(np.zeros(4), np.zeros(4), np.ones((2, 2)))
    assert saturated == {"ebpo/shadow_sign_disagreement": 0.0, "ebpo/shadow_saturated_advantage": 0.0}
    assert shadow_metrics(np.zeros(2), np.zeros(2), np.full((1, 2), np.nan)) == {}


def test_shadow_in_evaluation_compares_the_tail_that_trl_keeps(tmp_path: Path) -> None:
    args = tiny.config(
        EBPOConfig, tmp_path, max_steps=1, ebpo_shadow=True, per_device_eval_batch_size=16, log_completions=True
    )
    trainer = tiny.build(tiny.RecordingEBPO, args, eval_dataset=tiny.prompts(4))
    trainer.train()
    before = trainer.ebpo.state_dict()
    trainer.evaluate()
    assert trainer.ebpo.state_dict() == before
    log = trainer.state.log_history[-1]
    twin = reference.EBPO()
    twin(trainer.rewards[0].double().numpy().reshape(-1, tiny.GROUP))
    expected = twin(trainer.rewards[-1].double().numpy().reshape(-1, tiny.GROUP), update=False).reshape(-1)[-8:]
    trl = trainer.outputs[-1]["advantages"].double().numpy()[-8:]
    assert log["eval_ebpo/shadow_advantage_correlation"] == pytest.approx(np.corrcoef(trl, expected)[0, 1])
    assert len(trainer._logs["extra"]["ebpo_advantage"]) == 8
