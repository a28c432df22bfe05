"""What the framework adapters share: options out of a mapping, the prior's file, the warning about filters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from types import MappingProxyType

import numpy as np
import pytest

from ebpo_core import EBPO
from ebpo_core.cli.prior import summarize
from ebpo_core.integrations import saturation, settings, sidecar
from ebpo_core.trainer import write_prior

REWARDS = np.array([[1.0, 0.0, 0.1], [0.0, 0.0, 0.0]])


def test_options_pass_through_and_build_the_estimator() -> None:
    given = {"normalize": "scale", "eps": 1e-4, "leave_one_out": True, "ddof": 1}
    options = settings.estimator_options(MappingProxyType(given), "algorithm.ebpo")
    assert options == given
    assert {name: EBPO(**options).options[name] for name in given} == given


@pytest.mark.parametrize("nothing", [None, {}])
def test_no_options_are_the_defaults(nothing: dict[str, object] | None) -> None:
    assert settings.estimator_options(nothing, "x") == {}


def test_every_option_of_the_estimator_is_known() -> None:
    options = dict(EBPO().options)
    assert settings.estimator_options(options, "x") == options


@pytest.mark.parametrize(
    ("mapping", "error", "words"),
    [
        ({"normalise": "none"}, ValueError, ["algorithm.ebpo", "'normalise'", "did you mean 'normalize'"]),
        ({"zzz": 1}, ValueError, ["algorithm.ebpo", "'zzz'", "expected one of", "leave_one_out"]),
        ({"decay": 2.0}, ValueError, ["algorithm.ebpo", "decay=2"]),
        ({"eps": "1e-4"}, TypeError, ["algorithm.ebpo", "eps='1e-4'", "number"]),
        ({"leave_one_out": 1}, TypeError, ["algorithm.ebpo", "leave_one_out=1"]),
        ({3: 1}, TypeError, ["algorithm.ebpo", "3", "string"]),
        ("eps=1", TypeError, ["algorithm.ebpo='eps=1'", "str", "mapping"]),
        (["eps"], TypeError, ["algorithm.ebpo", "list"]),
    ],
)
def test_wrong_options_name_the_place_and_the_remedy(mapping: object, error: type, words: list[str]) -> None:
    with pytest.raises(error) as caught:
        settings.estimator_options(mapping, "algorithm.ebpo")  # type: ignore[arg-type]
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["", "folder", "here.json"])
def test_the_prior_survives_its_file_to_the_bit(tmp_path, name: str) -> None:
    ebpo = EBPO(decay=0.9)
    ebpo(REWARDS / 3)
    sidecar.save(tmp_path / name, ebpo, global_step=7)
    other = EBPO(decay=0.9)
    sidecar.load(tmp_path / name, other)
    assert other == ebpo
    file = tmp_path / name if name.endswith(".json") else tmp_path / name / sidecar.NAME
    assert json.loads(file.read_text())["global_step"] == 7
    assert summarize(str(file))["rewards_seen"] == ebpo.prior.count


def test_a_missing_prior_raises_and_leaves_the_estimator(tmp_path) -> None:
    ebpo = EBPO()
    ebpo(REWARDS)
    before = ebpo.state_dict()
    with pytest.raises(FileNotFoundError, match=r"ebpo_state\.json.*Resume from another checkpoint"):
        sidecar.load(tmp_path, ebpo)
    assert ebpo.state_dict() == before


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": "other"}'])
def test_a_damaged_prior_raises_and_leaves_the_estimator(tmp_path, damage: str) -> None:
    ebpo = EBPO()
    ebpo(REWARDS)
    before = ebpo.state_dict()
    (tmp_path / sidecar.NAME).write_text(damage)
    with pytest.raises(ValueError, match=r"ebpo_state\.json"):
        sidecar.load(tmp_path, ebpo)
    assert ebpo.state_dict() == before


def test_a_prior_of_other_options_is_refused(tmp_path) -> None:
    sidecar.save(tmp_path, EBPO(normalize="scale"))
    with pytest.raises(ValueError, match=r"ebpo_state\.json.*normalize"):
        sidecar.load(tmp_path, EBPO())


def test_priors_of_single_reward_functions_are_refused(tmp_path) -> None:
    write_prior(tmp_path / sidecar.NAME, [{"reward": "accuracy", "ebpo": EBPO().state_dict()}])
    with pytest.raises(ValueError, match=r"ebpo_state\.json.*one prior per reward function"):
        sidecar.load(tmp_path, EBPO())


WRITER = """
import sys
from ebpo_core import EBPO
from ebpo_core.integrations import sidecar
ebpo = EBPO()
print("ready", flush=True)
while True:
    ebpo([[1.0, 0.0], [0.25, 0.0]])
    sidecar.save(sys.argv[1], ebpo)
"""


def test_a_writer_that_is_killed_leaves_a_whole_file(tmp_path) -> None:
    seen = set()
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            while not (tmp_path / sidecar.NAME).exists() or len(seen) == 0:
                if (tmp_path / sidecar.NAME).exists():
                    ebpo = EBPO()
                    sidecar.load(tmp_path, ebpo)
                    seen.add(ebpo.prior.count)
            os.kill(process.pid, signal.SIGKILL)
        ebpo = EBPO()
        sidecar.load(tmp_path, ebpo)
        assert ebpo.prior.count % 4 == 0
        assert ebpo.prior.count > 0


def test_the_warning_comes_once_for_each_option(monkeypatch) -> None:
    monkeypatch.setattr(saturation, "_warned", set())
    with pytest.warns(UserWarning, match=r"verl filters saturated groups.*algorithm\.filter_groups\.enable"):
        saturation.warn_once("verl", "algorithm.filter_groups.enable")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saturation.warn_once("verl", "algorithm.filter_groups.enable")
    with pytest.warns(UserWarning, match="dynamic_sampling"):
        saturation.warn_once("SkyRL", "dynamic_sampling.type")


def test_importing_the_shared_modules_brings_numpy_only() -> None:
    code = (
        "import sys; from ebpo_core.integrations import saturation, settings, sidecar; "
        "print(*[n for n in ('torch', 'trl', 'verl', 'ray', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
