"""Keys and priors of single reward functions in the trainer: real TRL training against the NumPy twin."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("trl")

import pandas as pd
import trainer_worker as tiny

import ebpo_core
from ebpo_core import reference
from ebpo_core.checkpoint import prior_files
from ebpo_core.trainer import EBPOConfig, read_prior, write_prior
from ebpo_core.trainer.keys import hash_of_prompt, key_of_example

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


@pytest.mark.parametrize("columns", [None, ["topic"]])
def test_a_prior_for_each_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: list[str] | None) -> None:
    """Discounted at its own visits, as the twin's; with its keys in a file of their own, and after a resume."""
    monkeypatch.setattr("ebpo_core.checkpoint.MANY_KEYS", 2)
    settings: dict[str, Any] = {
        "ebpo_keys": columns,
        "ebpo_track_prompts": True,
        "ebpo_decay": 0.5,
        "ebpo_decay_by": "visit",
        "ebpo_normalize": "scale",
        "max_steps": 6,
    }
    trainer = build(tmp_path, **settings, save_strategy="steps", save_steps=3)
    trainer.train()
    twin = reference.EBPO(**trainer.args.ebpo_options())

    def key_of(prompt: str) -> tuple[Any, ...]:
        return (*([tiny.key(prompt)[0]] if columns else []), hash_of_prompt(prompt))

    for prompts, rewards, output in zip(trainer.prompts, trainer.rewards, trainer.outputs, strict=True):
        keys = [key_of(prompt) for prompt in prompts[:: tiny.GROUP]]
        expected = twin(rewards.double().numpy().reshape(-1, tiny.GROUP), keys=keys).reshape(-1)
        np.testing.assert_allclose(output["advantages"].numpy(), expected, rtol=1e-6, atol=1e-7)
    counts = {key if isinstance(key, tuple) else (key,): prior.count for key, prior in trainer.ebpo.priors.items()}
    assert counts.pop(()) == pytest.approx(twin.prior.rewards.count)
    assert counts == pytest.approx({key: prior.rewards.count for key, prior in twin.keys.items()})
    assert len({len(key) for key in counts}) == (2 if columns else 1)

    assert len(prior_files(tmp_path / "checkpoint-3")) == 2
    resumed = build(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.ebpo == trainer.ebpo
    with pytest.raises(ValueError, match=r"ebpo_track_prompts=True: the dataset has [68] keys.*ebpo_max_keys=5"):
        build(tmp_path, **settings, ebpo_max_keys=5)


def test_a_prompt_is_hashed_by_its_content(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "1 + 1?"}]
    assert hash_of_prompt(messages) == hash_of_prompt([{"content": "1 + 1?", "role": "user"}])
    assert len({hash_of_prompt(prompt) for prompt in ("a", "b", messages, [*messages, *messages], "ö\ud800")}) == 5
    with pytest.raises(TypeError, match="ebpo_track_prompts=True: a prompt is no text.*name it in ebpo_keys"):
        hash_of_prompt([{"role": "user", "content": object()}])
    with pytest.raises(ValueError, match="a row has no 'prompt', only"):
        key_of_example([], True, {"question": "?"})
    assert key_of_example(["a"], True, {"a": None, "prompt": "x"}) == (hash_of_prompt("x"),)
    assert key_of_example(["a"], False, {"a": 1, "prompt": "x"}) == 1


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
    with pytest.raises(TypeError, match=r"ebpo_keys=\['score'\]: the key of row 0 is 0.5, which holds a float"):
        build(tmp_path, ebpo_keys=["score"], trainer={"train_dataset": floats})
    whole = tiny.prompts().add_column("score", [1] * 6)
    evaluated = {"train_dataset": whole, "eval_dataset": {"whole": whole, "floats": floats}}
    with pytest.raises(TypeError, match=r"the key of row 0 is 0.5, which holds a float"):
        build(tmp_path, ebpo_keys=["score"], trainer=evaluated)


def test_the_last_row_is_checked_before_training_too(tmp_path: Path) -> None:
    """Keys of the dataset, of its parents, and of the prior that training starts from, up to ``ebpo_max_keys``."""
    dataset = tiny.prompts(6).add_column("topic", list("aabbcc")).add_column("level", [1, 2, 1, 1, None, 3])
    settings: dict[str, Any] = {"ebpo_keys": ["topic", "level"], "max_steps": 1, "trainer": {"train_dataset": dataset}}
    with pytest.raises(ValueError, match=r"the dataset has 7 keys, parents included, more than ebpo_max_keys=6: raise"):
        build(tmp_path, ebpo_max_keys=6, **settings)
    build(tmp_path, ebpo_max_keys=7, **settings)
    earlier = ebpo_core.EBPO()
    earlier([[1.0, 0.0], [0.0, 0.0]], keys=[("a", 1), ("d", 1)])
    prior = str(write_prior(tmp_path / "earlier", earlier.state_dict()))
    with pytest.raises(ValueError, match=r"the dataset and the prior together have 9 keys"):
        build(tmp_path, ebpo_max_keys=8, ebpo_prior=prior, **settings)
    assert build(tmp_path, ebpo_max_keys=9, ebpo_prior=prior, **settings).ebpo.prior.group_count == 2

    # A resumed run starts from the checkpoint's prior.
    build(tmp_path, ebpo_max_keys=9, ebpo_prior=prior, save_strategy="steps", save_steps=1, **settings).train()
    resumed = build(tmp_path, ebpo_max_keys=8, **settings | {"max_steps": 2})
    with pytest.raises(ValueError, match=r"together have 9 keys|more than max_keys=8"):
        resumed.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("form", ["stream", "transform"])
def test_a_dataset_that_cannot_be_looked_through_is_checked_at_its_first_batch(tmp_path: Path, form: str) -> None:
    generated: list[int] = []

    def count(completion_ids: list[list[int]], **_: Any) -> list[float]:
        generated.append(len(completion_ids))
        return [0.0] * len(completion_ids)

    for columns, error, message in (
        (["score"], TypeError, r"ebpo_keys=\['score'\]: the key of completion 0 is 0.5, which holds a float"),
        (["grade"], ValueError, r"ebpo_keys.*'grade'"),
    ):
        dataset: Any = tiny.prompts().add_column("score", [0.5] * 6)
        if form == "stream":
            dataset = dataset.to_iterable_dataset()
            dataset.info.features = None
        else:
            dataset.set_transform(lambda rows: {"prompt": rows["prompt"], "score": [0.5] * len(rows["prompt"])})
        with pytest.raises(error, match=message):
            build(tmp_path, count, ebpo_keys=columns, max_steps=1, trainer={"train_dataset": dataset}).train()
    assert not generated


def test_a_dot_reaches_into_a_column_of_mappings(tmp_path: Path) -> None:
    dataset = tiny.prompts().add_column("extra", [{"level": level} for level in (1, 1, 2, 2, 3, 3)])
    trainer = build(tmp_path, ebpo_keys=["extra.level"], max_steps=1, trainer={"train_dataset": dataset})
    trainer.train()
    assert trainer.ebpo.priors.keys() - {()} <= {1, 2, 3}
    with pytest.raises(ValueError, match=r"a row has no 'grade'"):
        build(tmp_path, ebpo_keys=["extra.grade"], trainer={"train_dataset": dataset})


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


@pytest.mark.parametrize("per_reward", [False, True])
def test_functions_of_one_name_are_told_apart(tmp_path: Path, per_reward: bool) -> None:
    """Lambdas, partials of one function and a function's namesake, beside one that has such a name already."""

    def scaled(completion_ids: list[list[int]], factor: float, **_: Any) -> list[float]:
        return [factor] * len(completion_ids)

    def third_2(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [7.0] * len(completion_ids)

    functions = [
        lambda completion_ids, **_: [1.0] * len(completion_ids),
        functools.partial(scaled, factor=2.0),
        lambda completion_ids, **_: [3.0] * len(completion_ids),
        functools.partial(scaled, factor=4.0),
        tiny.third,
        third_2,
        functools.partial(tiny.third),
    ]
    settings: dict[str, Any] = {"ebpo_per_reward": per_reward, "save_strategy": "steps", "save_steps": 1}
    trainer = build(tmp_path, list(functions), max_steps=1, log_completions=True, **settings)
    names = ["<lambda>_1", "scaled_1", "<lambda>_2", "scaled_2", "third_1", "third_2", "third_3"]
    assert trainer.reward_func_names == names
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    values = [1.0, 2.0, 3.0, 4.0, None, 7.0, None]
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    for name, value in zip(names, values, strict=True):
        assert (f"ebpo/{name}/prior_mean" in log) == per_reward
        if value is not None:
            assert log[f"rewards/{name}/mean"] == value
            assert (table[name] == value).all()
    resumed = build(tmp_path, list(functions), max_steps=2, **settings)
    resumed.train(resume_from_checkpoint=True)  # the checkpoint holds these names
    assert resumed.ebpos[0].prior.group_count == 4


def test_names_that_differ_stay(tmp_path: Path) -> None:
    assert build(tmp_path, [tiny.third, sometimes]).reward_func_names == ["third", "sometimes"]


def test_one_bad_function_leaves_every_prior(tmp_path: Path) -> None:
    def bad(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float("inf")] * len(completion_ids)

    trainer = build(tmp_path, [tiny.third, bad], ebpo_per_reward=True, max_steps=1)
    with pytest.raises(ValueError, match=r"rewards\[0\].*inf") as caught:
        trainer.train()
    assert "came from ['bad']" in "".join(caught.value.__notes__)
    assert [ebpo.prior.count for ebpo in trainer.ebpos] == [0, 0]


def test_decoupled_normalisation_is_trls(tmp_path: Path) -> None:
    """What TRL trains with under ``normalize_then_sum``, ``method="gdpo"`` gives for the same rewards."""
    weights = [1.0, -0.5, 2.0]
    args = tiny.config(
        tiny.GRPOConfig,
        tmp_path,
        max_steps=4,
        multi_objective_aggregation="normalize_then_sum",
        reward_weights=weights,
    )
    trainer = tiny.build(tiny.RecordingGRPO, args, [tiny.third, sometimes, tiny.size])
    trainer.train()
    for rewards, output in zip(trainer.rewards, trainer.outputs, strict=True):
        grouped = rewards.double().numpy().reshape(-1, tiny.GROUP, 3)
        assert np.isnan(grouped).any()
        ours = ebpo_core.advantages(grouped, method="gdpo", weights=weights, eps=1e-4)  # TRL's eps
        np.testing.assert_allclose(output["advantages"].numpy(), ours.reshape(-1), rtol=1e-4, atol=1e-5)
    assert any(output["advantages"].any() for output in trainer.outputs)
