"""Keys and priors of single reward functions in the trainer: real TRL training against the NumPy twin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("trl")

import trainer_worker as tiny

from ebpo_core import reference
from ebpo_core.trainer import EBPOConfig, read_prior

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


def sometimes(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    return [None if i % 3 == 0 else 2.0 * (len(ids) > 3) for i, ids in enumerate(completion_ids)]


def build(
    tmp_path: Path, reward_funcs: Any = tiny.third, *, trainer: dict[str, Any] | None = None, **settings: Any
) -> Any:
    args = tiny.config(EBPOConfig, tmp_path, **settings)
    defaults = {"train_dataset": tiny.keyed_prompts()}
    return tiny.build(tiny.RecordingEBPO, args, reward_funcs, **(defaults | (trainer or {})))


def parts(prompt: str) -> tuple[Any, ...]:
    return tuple(part for part in tiny.key(prompt) if part is not None)


FORMS: dict[str, tuple[list[str], Any]] = {
    "two columns": (["topic", "level"], parts),
    "one column": (["topic"], lambda prompt: tiny.key(prompt)[0]),
    "a column of lists": (["path"], lambda prompt: tuple(str(part) for part in parts(prompt))),
}


@pytest.mark.parametrize("form", FORMS)
def test_keys_from_columns(tmp_path: Path, form: str) -> None:
    columns, key_of = FORMS[form]
    settings: dict[str, Any] = {"ebpo_keys": columns, "ebpo_kappa": 2.0, "ebpo_normalize": "scale", "max_steps": 4}
    trainer = build(tmp_path, **settings, save_strategy="steps", save_steps=2)
    trainer.train()
    twin = reference.EBPO(**trainer.args.ebpo_options())
    for prompts, rewards, output in zip(trainer.prompts, trainer.rewards, trainer.outputs, strict=True):
        keys = [key_of(prompt) for prompt in prompts[:: tiny.GROUP]]
        expected = twin(rewards.double().numpy().reshape(-1, tiny.GROUP), keys=keys).reshape(-1)
        np.testing.assert_allclose(output["advantages"].numpy(), expected, rtol=1e-6, atol=1e-7)
    assert len(twin.keys) >= 2
    assert trainer.ebpo.priors.keys() == {(), *(key[0] if len(key) == 1 else key for key in twin.keys)}

    resumed = build(tmp_path, **settings | {"max_steps": 5})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.ebpo.prior.group_count == 10
    assert read_prior(tmp_path / "checkpoint-4")["ebpo"] == trainer.ebpo.state_dict()


def test_evaluation_with_and_without_the_columns(tmp_path: Path) -> None:
    trainer = build(tmp_path, ebpo_keys=["topic"], max_steps=1, trainer={"eval_dataset": tiny.keyed_prompts(2)})
    trainer.train()
    before = trainer.ebpo.state_dict()
    trainer.evaluate()
    assert sorted(trainer.ebpo.diagnostics.keys) == ["even", "odd"]
    trainer.evaluate(tiny.prompts(2))
    assert trainer.ebpo.diagnostics.keys is None  # the root alone
    assert trainer.ebpo.state_dict() == before


def test_wrong_columns_and_keys_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"ebpo_keys=\['topic', 'grade'\]: the dataset has no column 'grade'; it has.*'level'"
    ):
        build(tmp_path, ebpo_keys=["topic", "grade"])
    floats = tiny.prompts().add_column("score", [0.5] * 6)
    trainer = build(tmp_path, ebpo_keys=["score"], max_steps=1, trainer={"train_dataset": floats})
    with pytest.raises(TypeError, match=r"keys\[0\] is 0.5, which holds a float"):
        trainer.train()
    many = tiny.prompts().add_column("id", list(range(6)))
    trainer = build(tmp_path, ebpo_keys=["id"], ebpo_max_keys=1, max_steps=1, trainer={"train_dataset": many})
    with pytest.raises(ValueError, match="2 priors.*max_keys=1"):
        trainer.train()
    assert trainer.ebpo.prior.count == 0


def test_a_prior_for_each_reward_function(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "ebpo_per_reward": True,
        "ebpo_decay": 0.9,
        "reward_weights": [0.5, -2.0],
        "save_strategy": "steps",
        "save_steps": 1,
    }
    trainer = build(tmp_path, [tiny.third, sometimes], max_steps=3, **settings)
    trainer.train()
    twins = [reference.EBPO(decay=0.9), reference.EBPO(decay=0.9)]
    for rewards, output in zip(trainer.rewards, trainer.outputs, strict=True):
        per_function = rewards.double().numpy().T.reshape(2, -1, tiny.GROUP)
        assert np.isnan(per_function[1]).any()
        expected = sum(w * twin(r) for w, twin, r in zip((0.5, -2.0), twins, per_function, strict=True))
        np.testing.assert_allclose(output["advantages"].numpy(), expected.reshape(-1), rtol=1e-6, atol=1e-7)
    for ebpo, twin in zip(trainer.ebpos, twins, strict=True):
        assert ebpo.prior.mean == pytest.approx(twin.prior.rewards.mean)
    log = next(entry for entry in reversed(trainer.state.log_history) if "loss" in entry)
    assert log["ebpo/third/prior_mean"] == pytest.approx(twins[0].prior.rewards.mean)
    assert log["ebpo/sometimes/tau2"] == pytest.approx(twins[1].prior.tau2("raw", 0))
    with pytest.raises(ValueError, match=r"use trainer\.ebpos"):
        _ = trainer.ebpo

    resumed = build(tmp_path, [tiny.third, sometimes], max_steps=4, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    saved = read_prior(tmp_path / "checkpoint-3")["ebpo_per_reward"]
    assert [entry["reward"] for entry in saved] == ["third", "sometimes"]
    assert [entry["ebpo"] for entry in saved] == [ebpo.state_dict() for ebpo in trainer.ebpos]
    assert all(len(ebpo.prior.state_dict()) for ebpo in resumed.ebpos)
    assert resumed.ebpos[0].prior.group_count == pytest.approx(2 * (1 + 0.9 + 0.81 + 0.729))

    path = str(tmp_path / "checkpoint-3")
    with pytest.raises(
        ValueError, match=r"reward functions \['third', 'sometimes'\], this trainer has the weighted sum"
    ):
        build(tmp_path, [tiny.third, sometimes], ebpo_prior=path, ebpo_decay=0.9)
    with pytest.raises(ValueError, match=r"functions \['third', 'sometimes'\].*functions \['sometimes', 'third'\]"):
        build(tmp_path, [sometimes, tiny.third], ebpo_prior=path, ebpo_decay=0.9, ebpo_per_reward=True)
    exported = resumed.save_prior(tmp_path / "exported.json")
    warm = build(tmp_path, [tiny.third, sometimes], ebpo_prior=str(exported), ebpo_decay=0.9, ebpo_per_reward=True)
    assert warm.ebpos == resumed.ebpos


def test_one_bad_function_leaves_every_prior(tmp_path: Path) -> None:
    def bad(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float("inf")] * len(completion_ids)

    trainer = build(tmp_path, [tiny.third, bad], ebpo_per_reward=True, max_steps=1)
    with pytest.raises(ValueError, match=r"rewards\[0\].*inf") as caught:
        trainer.train()
    assert "came from ['bad']" in "".join(caught.value.__notes__)
    assert [ebpo.prior.count for ebpo in trainer.ebpos] == [0, 0]
