"""The one estimator of a process, and its options from the environment."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ebpo_core import EBPO
from ebpo_core.integrations import process, sidecar

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


def test_defaults_give_way_to_options() -> None:
    soft = {"normalize": "none"}
    assert process.ProcessEstimator().get({}, "x", defaults=soft).options["normalize"] == "none"
    assert process.ProcessEstimator().get({"normalize": "batch"}, "x", defaults=soft).options["normalize"] == "batch"


def test_a_misspelt_option_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"place has the unknown option 'normalise': did you mean 'normalize'"):
        process.ProcessEstimator().get({"normalise": "scale"}, "place")


def test_a_process_has_one_estimator_and_one_setting() -> None:
    held = process.ProcessEstimator("keys")
    first = held.get({"eps": 1e-4, "keys": "topic"}, "x")
    assert held.get({"eps": 1e-4, "keys": "topic"}, "x") is first
    assert held.option("keys") == "topic"
    for other in ({"eps": 1e-5, "keys": "topic"}, {"eps": 1e-4}):
        with pytest.raises(ValueError, match="one setting a process"):
            held.get(other, "x")
    held.reset()
    assert held.get({}, "x") is not first
    assert held.option("keys", "none") == "none"


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


def test_restore_reads_what_the_sidecar_wrote(tmp_path: Path) -> None:
    written, read = EBPO(), EBPO()
    written(REWARDS)
    sidecar.save(tmp_path, written)
    process.restore(tmp_path, read, allow_missing=False)
    assert read == written


@pytest.mark.parametrize("allow", [False, True])
def test_a_missing_prior_is_an_error_unless_allowed(tmp_path: Path, allow: bool) -> None:
    ebpo: Any = EBPO()
    ebpo(REWARDS)
    seen = ebpo.state_dict()
    if allow:
        process.restore(tmp_path, ebpo, allow_missing=True)
        assert ebpo.state_dict() == EBPO().state_dict()
        return
    with pytest.raises(FileNotFoundError, match="allow_missing_prior"):
        process.restore(tmp_path, ebpo, allow_missing=False)
    assert ebpo.state_dict() == seen
