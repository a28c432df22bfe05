"""AReaL's ``reward_norm`` by EBPO without AReaL: shares of a batch on several workers, and the checks of settings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from areal_worker import batch

from ebpo_core import EBPO, reference
from ebpo_core.integrations import areal


def workers(world: int, folder: Path) -> list[dict[str, Any]]:
    script = Path(__file__).parents[1] / "support" / "areal_worker.py"
    outs = [folder / f"{world}-{rank}.json" for rank in range(world)]
    started = [
        subprocess.Popen([sys.executable, str(script), str(rank), str(world), str(folder / f"store-{world}"), str(out)])
        for rank, out in enumerate(outs)
    ]
    assert [process.wait(timeout=120) for process in started] == [0] * world
    return [json.loads(out.read_text()) for out in outs]


def test_two_workers_equal_one_and_the_twin(tmp_path: Path) -> None:
    (alone,) = workers(1, tmp_path)
    first, second = workers(2, tmp_path)
    assert first["prior"] == second["prior"] == alone["prior"]
    twin = reference.EBPO()
    for step in range(3):
        scores, sizes = batch(step)
        together = first["advantages"][step] + second["advantages"][step]
        np.testing.assert_allclose(together, alone["advantages"][step], rtol=1e-6)
        expected = twin(scores.astype(np.float64), np.repeat(np.arange(len(sizes)), sizes))
        np.testing.assert_allclose(together, expected, rtol=1e-6, atol=1e-6)
    assert first["refused"] == "ValueError: 5 completions do not make up groups of [4]"
    assert second["refused"].startswith("RuntimeError")


def test_without_sizes_the_configured_group_size_holds() -> None:
    norm = areal.EBPONorm(EBPO(), group_size=3)
    scores = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 1.0])
    advantages = norm(scores)
    assert advantages.dtype == torch.float32
    expected = reference.EBPO()(scores.double().numpy(), np.repeat([0, 1], 3))
    np.testing.assert_allclose(advantages.numpy(), expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"4 completions do not make up groups of 3: set actor\.reward_norm"):
        norm(scores[:4])


def test_masked_completions_do_not_count_and_get_zero() -> None:
    scores, mask = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    norm = areal.EBPONorm(EBPO(), group_size=2)
    advantages = norm(scores, mask)
    assert advantages[2] == 0
    assert norm.ebpo.prior.state_dict()["rewards"]["count"] == 3


def test_infinite_scores_are_refused_and_leave_no_trace() -> None:
    norm = areal.EBPONorm(EBPO(), group_size=2)
    norm(torch.tensor([1.0, 0.0]))
    seen = norm.ebpo.state_dict()
    with pytest.raises(ValueError, match="inf"):
        norm(torch.tensor([1.0, torch.inf]))
    assert norm.ebpo.state_dict() == seen


def actor(**changed: Any) -> Any:
    values: dict[str, Any] = {"reward_norm": None, "adv_norm": None, "discount": 1.0, "gae_lambda": 1.0, "engine": None}
    values["config"] = SimpleNamespace(reward_norm=SimpleNamespace(group_size=4))
    return SimpleNamespace(**{**values, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"adv_norm": object()}, r"actor\.adv_norm is set"),
        ({"discount": 0.99}, r"actor\.discount=0\.99"),
        ({"gae_lambda": 0.95}, r"actor\.gae_lambda=0\.95"),
        ({"config": SimpleNamespace(reward_norm=None)}, r"actor\.reward_norm\.group_size"),
    ],
)
def test_settings_under_which_it_would_not_be_ebpo_are_refused(changed: dict[str, Any], message: str) -> None:
    refused = actor(**changed)
    with pytest.raises(ValueError, match=message):
        areal.install(refused, EBPO())
    assert not isinstance(refused.reward_norm, areal.EBPONorm)


def test_install_takes_the_place_of_reward_norm() -> None:
    accepted, ebpo = actor(), EBPO()
    norm = areal.install(accepted, ebpo)
    assert accepted.reward_norm is norm
    assert (norm.ebpo, norm.group_size) == (ebpo, 4)
    with pytest.raises(TypeError, match="PPOActor"):
        areal.install(SimpleNamespace(), ebpo)


class Engine:
    """What :class:`areal.PriorCheckpoints` expects below it, of AReaL's engines."""

    def __init__(self, config: Any) -> None:
        self.actor = actor()

    def save(self, meta: Any) -> None:
        Path(meta.path).mkdir(exist_ok=True)

    def load(self, meta: Any) -> None:
        assert Path(meta.path).is_dir()


class EBPOEngine(areal.PriorCheckpoints, Engine):
    pass


def test_checkpoints_with_the_optimizer_hold_the_prior(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EBPO_OPTIONS", raising=False)
    recover = SimpleNamespace(path=str(tmp_path / "recover"), with_optim=True)
    weights = SimpleNamespace(path=str(tmp_path / "weights"), with_optim=False)
    first, second = EBPOEngine(None), EBPOEngine(None)
    first.actor.reward_norm(torch.tensor([1.0, 0.0, 0.0, 1.0]))
    first.save(recover)
    first.save(weights)
    assert not list((tmp_path / "weights").iterdir())
    second.load(weights)
    second.load(recover)
    assert second.actor.reward_norm.ebpo == first.actor.reward_norm.ebpo
    (tmp_path / "recover" / "ebpo_prior.json").unlink()
    with pytest.raises(FileNotFoundError, match="allow_missing_prior"):
        second.load(recover)
