"""prime-rl's algorithms and checkpoints with EBPO. Runs where prime-rl's source is (fetch_sources.py)."""

# ruff: noqa: E402 - what is imported last needs what comes before it
from __future__ import annotations

import asyncio
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import absent
import numpy as np
import pytest

algo = absent.source("prime_rl", "prime_rl.orchestrator.algo")
ckpt = absent.source("prime_rl", "prime_rl.orchestrator.ckpt")
configs = absent.source("prime_rl", "prime_rl.configs.algorithm")
vf = absent.source("prime_rl", "verifiers.v1")

from ebpo_core import reference
from ebpo_core.integrations.contrib import prime_rl


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(algo.ALGORITHM_CLASSES, "grpo", algo.GRPOAlgorithm)
    for name in ("save", "load"):
        monkeypatch.setattr(ckpt.CheckpointManager, name, getattr(ckpt.CheckpointManager, name))
    prime_rl.install()


def episode(reward: float, env: str = "math", group: str = "g", error: bool = False) -> Any:
    node = absent.importlib.import_module("verifiers.v1.graph").MessageNode
    types = absent.importlib.import_module("verifiers.v1.types")
    nodes = [
        node(parent=None, message=types.UserMessage(content="U"), sampled=False, token_ids=[1], mask=[False]),
        node(
            parent=0,
            message=types.AssistantMessage(content="A"),
            sampled=True,
            token_ids=[2, 3],
            mask=[True, True],
            logprobs=[-0.1, -0.2],
        ),
    ]
    trace = vf.Trace(
        task=vf.TraceTask(type="Task", data=vf.TaskData(idx=0, prompt=None)),
        agent=vf.AgentInfo(config=vf.AgentConfig()),
        nodes=[] if error else nodes,
        rewards={"score": {"score": reward}},
        ok=True,
    )
    return vf.Episode(env=vf.EnvInfo(id=env, name=env), task=trace.task, group=vf.GroupInfo(id=group), traces=[trace])


def build() -> Any:
    return algo.build_algorithm(configs.GRPOAlgoConfig(), None)


def test_groups_equal_the_twin_as_they_come_and_environments_have_priors() -> None:
    algorithms = {"math": build(), "code": build()}
    twin, rng = reference.EBPO(), np.random.default_rng(0)
    for number in range(8):
        env = ("math", "code")[number % 2]
        rewards = rng.integers(0, 2, 4).astype(float) if number % 3 else np.zeros(4)
        group = [episode(float(reward), env) for reward in rewards]
        asyncio.run(algorithms[env].finalize_group(group))
        expected = twin.group(rewards, key=env)
        for one, advantage in zip(group, expected, strict=True):
            assert one.traces[0].nodes[0].advantages is None
            np.testing.assert_allclose(one.traces[0].nodes[1].advantages, [advantage] * 2, atol=1e-12)
    assert {"math", "code"} <= set(prime_rl.estimator.get().priors)


def test_traces_without_sampled_tokens_do_not_count() -> None:
    asyncio.run(build().finalize_group([episode(1.0), episode(0.0), episode(1.0, error=True)]))
    assert prime_rl.estimator.get().prior.state_dict()["rewards"]["count"] == 2
    asyncio.run(build().finalize_group([episode(1.0, error=True)]))
    assert prime_rl.estimator.get().prior.state_dict()["rewards"]["count"] == 2


def test_the_prior_is_in_the_orchestrators_checkpoints(tmp_path: Path) -> None:
    asyncio.run(build().finalize_group([episode(1.0), episode(0.0)]))
    saved = prime_rl.estimator.get().state_dict()
    source = SimpleNamespace(state_dict=lambda: {"rng": None, "envs": {}}, load_state_dict=lambda _: None)
    progress = absent.importlib.import_module("prime_rl.orchestrator.types").Progress()
    manager = ckpt.setup_ckpt_manager(tmp_path, None)
    manager.save(progress, source, step=3)
    prime_rl.estimator.reset()
    manager.load(progress, source, step=3)
    assert prime_rl.estimator.get().state_dict() == saved

    prime_rl.estimator.reset()
    manager.load(progress, source, step=0, path=manager.get_ckpt_path(3))
    assert prime_rl.estimator.get().state_dict() == saved

    (manager.get_ckpt_path(3) / "ebpo_prior.json").unlink()
    with pytest.raises(FileNotFoundError, match="allow_missing_prior"):
        manager.load(progress, source, step=3)


def test_a_length_penalty_is_refused() -> None:
    penalised = configs.GRPOAlgoConfig(length_penalty={"num_output_tokens_weight": 0.1})
    with pytest.raises(ValueError, match=r"orchestrator\.algo\.length_penalty"):
        algo.build_algorithm(penalised, None)


def test_infinite_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match="return finite rewards"):
        asyncio.run(build().finalize_group([episode(1.0), episode(np.inf)]))


def test_seams() -> None:
    """What this adapter rests on and prime-rl may move."""
    assert "ALGORITHM_CLASSES[config.type]" in inspect.getsource(algo.build_algorithm)
    assert list(inspect.signature(ckpt.CheckpointManager.save.__wrapped__).parameters) == [
        "self",
        "progress",
        "train_source",
        "step",
    ]
    assert "path" in inspect.signature(ckpt.CheckpointManager.load.__wrapped__).parameters
    root = Path(algo.__file__).parents[1]
    text = (root / "orchestrator.py").read_text()
    assert text.index("self.ckpt_manager.load(") > text.index("TrainSource(self.train_envs)")
    sink = (root / "train_sink.py").read_text()
    assert sink.index("algorithm.finalize_group(group)") < sink.index("self._admit(group)")  # gates come after scoring
    assert "run_orchestrator" in (root.parent / "entrypoints" / "orchestrator.py").read_text()
