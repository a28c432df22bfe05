"""The one estimator of a process, and its options from the environment."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ebpo_core import EBPO, diagnostics
from ebpo_core.checkpoint import PRIOR_NAME, write_prior
from ebpo_core.cli.prior import summarize
from ebpo_core.integrations import process

REWARDS = np.array([[1.0, 0.0, 0.5], [0.0, 0.0, 0.0]])


def test_options_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(process.VARIABLE, json.dumps({"normalize": "scale", "decay": 0.5}))
    options = process.ProcessEstimator().get().options
    assert (options["normalize"], options["decay"]) == ("scale", 0.5)


@pytest.mark.parametrize("text", [None, "", "  "])
def test_without_the_variable_the_defaults_hold(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    monkeypatch.delenv(process.VARIABLE, raising=False)
    if text is not None:
        monkeypatch.setenv(process.VARIABLE, text)
    assert process.ProcessEstimator().get().options == EBPO().options


@pytest.mark.parametrize("text", ["{normalize: scale}", "[1]", '"scale"'])
def test_what_is_not_a_json_object_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(process.VARIABLE, text)
    with pytest.raises(ValueError, match=process.VARIABLE):
        process.ProcessEstimator().get()


def test_options_of_the_framework_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(process.VARIABLE, '{"normalize": "scale"}')
    assert process.ProcessEstimator().get({"normalize": "none"}, "x").options["normalize"] == "none"
    assert process.ProcessEstimator().get({}, "x").options["normalize"] == "batch"


def test_a_framework_that_does_not_scale_gives_way_to_options() -> None:
    assert process.ProcessEstimator().get({}, "x", scaled=False).options["normalize"] == "none"
    assert process.ProcessEstimator().get({"normalize": "batch"}, "x", scaled=False).options["normalize"] == "batch"
    assert process.ProcessEstimator().get({}, "x").options["normalize"] == "batch"


def test_a_misspelt_option_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"place has the unknown option 'normalise': did you mean 'normalize'"):
        process.ProcessEstimator().get({"normalise": "scale"}, "place")


def test_a_process_has_one_estimator_and_one_setting() -> None:
    held = process.ProcessEstimator(keyed=True)
    first = held.get({"eps": 1e-4, "keys": "topic"}, "x")
    assert held.get({"eps": 1e-4, "keys": "topic"}, "x") is first
    assert held.columns == ("topic",)
    for other in ({"eps": 1e-5, "keys": "topic"}, {"eps": 1e-4}):
        with pytest.raises(ValueError, match="one setting a process"):
            held.get(other, "x")
    held.reset()
    assert held.get({}, "x") is not first
    assert held.columns == ()
    with pytest.raises(ValueError, match="unknown option 'keys'"):
        process.ProcessEstimator().get({"keys": "topic"}, "x")
    for keys in (3, {"topic": 1}, ["topic", ""], b"topic"):
        with pytest.raises(TypeError, match=r"x\.keys=.*name of a column"):
            process.ProcessEstimator(keyed=True).get({"keys": keys}, "x")


def test_threads_get_the_same_estimator() -> None:
    held, found = process.ProcessEstimator(), []
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        found.append(held.get({}, "x"))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(ebpo) for ebpo in found}) == 1


def test_allow_missing_prior_must_be_a_bool() -> None:
    with pytest.raises(TypeError, match="allow_missing_prior='yes'"):
        process.ProcessEstimator().get({"allow_missing_prior": "yes"}, "x")


@pytest.mark.parametrize("name", ["", "folder", "here.json"])
def test_the_prior_survives_its_file_to_the_bit(tmp_path: Path, name: str) -> None:
    written, held = EBPO(decay=0.9), process.ProcessEstimator()
    written(REWARDS / 3)
    file = write_prior(tmp_path / name, written.state_dict(), global_step=7)
    assert file == (tmp_path / name if name.endswith(".json") else tmp_path / name / PRIOR_NAME)
    read = held.get({"decay": 0.9}, "x")
    held.restore(tmp_path / name)
    assert read == written
    assert json.loads(file.read_text())["global_step"] == 7
    assert summarize(str(file))["rewards_seen"] == read.prior.count


@pytest.mark.parametrize("allow", [False, True])
def test_a_missing_prior_is_an_error_unless_allowed(tmp_path: Path, allow: bool) -> None:
    held = process.ProcessEstimator()
    ebpo = held.get({"allow_missing_prior": allow}, "x")
    ebpo(REWARDS)
    seen = ebpo.state_dict()
    if allow:
        held.restore(tmp_path)
        assert ebpo.state_dict() == EBPO().state_dict()
        return
    with pytest.raises(FileNotFoundError, match=r"ebpo_prior\.json.*resume from another one.*allow_missing_prior"):
        held.restore(tmp_path)
    assert ebpo.state_dict() == seen


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": "other"}'])
@pytest.mark.parametrize("allow", [False, True])
def test_a_damaged_prior_raises_and_leaves_the_estimator(tmp_path: Path, damage: str, allow: bool) -> None:
    held = process.ProcessEstimator()
    ebpo = held.get({"allow_missing_prior": allow}, "x")
    ebpo(REWARDS)
    before = ebpo.state_dict()
    (tmp_path / PRIOR_NAME).write_text(damage)
    with pytest.raises(ValueError, match=r"cannot resume from.*ebpo_prior\.json"):
        held.restore(tmp_path)
    assert ebpo.state_dict() == before


def test_a_run_goes_on_under_other_options(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = EBPO(normalize="scale")
    written(REWARDS)
    write_prior(tmp_path, written.state_dict())
    held = process.ProcessEstimator()
    ebpo = held.get({"decay": 0.9}, "x")
    held.restore(tmp_path)
    assert ebpo.prior == written.prior
    assert [line.split(": ", 1)[1] for line in caplog.messages] == [
        "normalize='batch' (saved: 'scale'), decay=0.9 (saved: 1.0)"
    ]


@pytest.mark.parametrize("adapter", ["slime", "areal"])
def test_one_prompt_in_a_batch_is_said_in_the_estimator_that_all_adapters_call(
    adapter: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(process.VARIABLE, raising=False)
    monkeypatch.setattr(diagnostics, "_warned_of_one_prompt", False)
    rewards = [1.0, 0.0, 0.0, 1.0]
    for _ in range(2):
        if adapter == "slime":
            from ebpo_core.integrations import slime

            slime.estimator.reset()
            samples = [
                SimpleNamespace(group_index=7, rollout_id=None, metadata={}, get_reward_value=lambda _, r=r: r)
                for r in rewards
            ]
            slime.reward_post_process(SimpleNamespace(advantage_estimator="grpo"), samples)
        else:
            torch = pytest.importorskip("torch")
            from ebpo_core.integrations import areal

            areal.EBPONorm(process.ProcessEstimator().get(), group_size=4)(torch.tensor(rewards))
    (line,) = caplog.messages
    assert "exactly GRPO" in line


def test_priors_of_single_reward_functions_are_refused(tmp_path: Path) -> None:
    write_prior(tmp_path, [{"reward": "accuracy", "ebpo": EBPO().state_dict()}])
    held = process.ProcessEstimator()
    held.get({}, "x")
    with pytest.raises(ValueError, match=r"cannot resume from.*one prior per reward function"):
        held.restore(tmp_path)


def test_restoring_before_the_options_are_known_is_a_bug_of_the_adapter(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"restore\(\) before get\(\)"):
        process.ProcessEstimator().restore(tmp_path)
