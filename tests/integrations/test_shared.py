"""Parts that framework adapters share: options out of a mapping, the prior's file, checks of rewards and filters."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from types import MappingProxyType

import numpy as np
import pytest

from ebpo_core import EBPO
from ebpo_core.checkpoint import PRIOR_NAME, read_prior
from ebpo_core.integrations import checks
from ebpo_core.integrations.process import estimator_options


def test_options_pass_through_and_build_the_estimator() -> None:
    given = {"normalize": "scale", "eps": 1e-4, "leave_one_out": True, "ddof": 1}
    options = estimator_options(MappingProxyType(given), "algorithm.ebpo")
    assert options == given
    assert {name: EBPO(**options).options[name] for name in given} == given


@pytest.mark.parametrize("nothing", [None, {}])
def test_no_options_are_the_defaults(nothing: dict[str, object] | None) -> None:
    assert estimator_options(nothing, "x") == {}


def test_every_option_of_the_estimator_is_known() -> None:
    options = dict(EBPO().options)
    assert estimator_options(options, "x") == options


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
        estimator_options(mapping, "algorithm.ebpo")  # type: ignore[arg-type]
    for word in words:
        assert word in str(caught.value)


WRITER = """
import sys
from ebpo_core import EBPO
from ebpo_core.checkpoint import write_prior
ebpo = EBPO()
print("ready", flush=True)
while True:
    ebpo([[1.0, 0.0], [0.25, 0.0]])
    write_prior(sys.argv[1], ebpo.state_dict())
"""


def test_a_writer_that_is_killed_leaves_a_whole_file(tmp_path) -> None:
    seen = set()
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            while not (tmp_path / PRIOR_NAME).exists() or len(seen) == 0:
                if (tmp_path / PRIOR_NAME).exists():
                    ebpo = EBPO()
                    ebpo.load_state_dict(read_prior(tmp_path)["ebpo"])
                    seen.add(ebpo.prior.count)
            os.kill(process.pid, signal.SIGKILL)
        ebpo = EBPO()
        ebpo.load_state_dict(read_prior(tmp_path)["ebpo"])
        assert ebpo.prior.count % 4 == 0
        assert ebpo.prior.count > 0


def test_the_warning_comes_once_for_each_option(monkeypatch) -> None:
    monkeypatch.setattr(checks, "_warned", set())
    with pytest.warns(UserWarning, match=r"verl filters saturated groups.*algorithm\.filter_groups\.enable"):
        checks.warn_once("verl", "algorithm.filter_groups.enable")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checks.warn_once("verl", "algorithm.filter_groups.enable")
    with pytest.warns(UserWarning, match="dynamic_sampling"):
        checks.warn_once("SkyRL", "dynamic_sampling.type")


def test_rewards_that_are_not_finite_are_refused_by_row() -> None:
    checks.check_finite(np.array([0.0, -1.0]))
    with pytest.raises(ValueError, match=r"reward of row 1 is nan, and 2 of 3 rows are not finite: return finite"):
        checks.check_finite(np.array([0.0, np.nan, np.inf]))
    with pytest.raises(ValueError, match=r"reward of row 0 \(uid 'p'\) is -inf"):
        checks.check_finite(np.array([-np.inf]), ["p"])


def test_importing_the_shared_modules_brings_numpy_only() -> None:
    code = (
        "import sys; import ebpo_core.checkpoint; from ebpo_core.integrations import checks, process; "
        "print(*[n for n in ('torch', 'trl', 'verl', 'ray', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
