"""AReaL's ``PPOActor`` with EBPO in the place of its ``reward_norm``, against the NumPy twin."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from areal.api.cli_args import NormConfig, PPOActorConfig
from areal.engine import fsdp_engine
from areal.trainer.ppo.actor import PPOActor

from ebpo_core import EBPO, reference
from ebpo_core.integrations import areal

PROMPT, LONGEST, GROUP = 2, 4, 3


def actor(**changed: Any) -> PPOActor:
    settings = {"reward_norm": NormConfig(group_size=GROUP), "adv_norm": None, "kl_ctl": 0.0, **changed}
    config = PPOActorConfig(experiment_name="x", trial_name="x", path="", **settings)
    return PPOActor(config, SimpleNamespace(data_parallel_group=None))


def trajectories(seed: int, prompts: int = 4) -> list[dict[str, torch.Tensor]]:
    """One dict a prompt, as AReaL's workflows return: its completions padded on the right; the first group failed."""
    rng = np.random.default_rng(seed)
    made = []
    for prompt in range(prompts):
        lengths = torch.from_numpy(rng.integers(1, LONGEST, GROUP))
        places = torch.arange(PROMPT + LONGEST)
        attention = places < PROMPT + lengths[:, None]
        made.append(
            {
                "input_ids": torch.ones(GROUP, PROMPT + LONGEST, dtype=torch.long),
                "attention_mask": attention,
                "loss_mask": (attention & (places >= PROMPT)).long(),
                "logprobs": torch.from_numpy(rng.normal(size=(GROUP, PROMPT + LONGEST))).float(),
                "rewards": torch.zeros(GROUP)
                if prompt == 0
                else torch.from_numpy(rng.choice([0.0, 1.0], GROUP)).float(),
            }
        )
    return made


def test_every_response_token_gets_the_twins_advantage_over_steps() -> None:
    ppo, twin = actor(), reference.EBPO()
    areal.install(ppo, EBPO())
    for step in range(3):
        data = trajectories(step)
        rewards = np.stack([group["rewards"].double().numpy() for group in data])
        expected = twin(rewards)
        done = ppo.compute_advantages(data)
        for group, advantages in zip(done, expected, strict=True):
            wanted = torch.from_numpy(advantages).float()[:, None] * group["loss_mask"]
            torch.testing.assert_close(group["advantages"] * group["loss_mask"], wanted, rtol=1e-5, atol=1e-6)
            assert group["loss_mask"].any(-1).all()


def test_areals_kl_stays_in_the_reward() -> None:
    plain, penalised = actor(), actor(kl_ctl=0.5)
    areal.install(plain, EBPO())
    areal.install(penalised, EBPO())
    a, b = (ppo.compute_advantages(trajectories(0)) for ppo in (plain, penalised))
    assert any(not torch.equal(x["advantages"], y["advantages"]) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"adv_norm": NormConfig()}, r"actor\.adv_norm"),
        ({"discount": 0.9}, r"actor\.discount"),
        ({"gae_lambda": 0.9}, r"actor\.gae_lambda"),
        ({"reward_norm": None}, r"actor\.reward_norm"),
    ],
)
def test_areals_settings_are_checked(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        areal.install(actor(**changed), EBPO())


def test_seams() -> None:
    """What this adapter rests on and AReaL may move."""
    computed = inspect.getsource(PPOActor._compute_advantages)
    assert "self.reward_norm(reward_score" in computed
    assert computed.index("self.reward_norm(") < computed.index("rewards[batch_indices, indices]")
    engine = fsdp_engine.FSDPPPOActor
    assert list(inspect.signature(engine.__init__).parameters) == ["self", "config"]
    assert "self.actor = PPOActor(config, self)" in inspect.getsource(engine.__init__)
    assert list(inspect.signature(engine.save).parameters) == ["self", "meta"]
    assert list(inspect.signature(engine.load).parameters) == ["self", "meta"]
    assert isinstance(inspect.getattr_static(engine, "data_parallel_group"), property)

    class EBPOActor(areal.PriorCheckpoints, engine):
        pass

    assert EBPOActor.save is areal.PriorCheckpoints.save
