"""The `ebpo` command itself: help without torch, one-line errors, `prior show`, parsing of YAML and flags."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

import ebpo_core
from ebpo_core.checkpoint import PRIOR_NAME, write_prior
from ebpo_core.cli import COMMANDS, main
from ebpo_core.cli.dispatch import Command, Program, extras_of

if TYPE_CHECKING:
    from pathlib import Path

HEAVY = ("torch", "transformers", "trl", "datasets", "matplotlib", "rich")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["prior", "show", "nowhere"], ["plot", "nowhere"]])
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys; from ebpo_core.cli import main; main({arguments}); "
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert python(code).stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", ["curriculum", "demo", "eval", "plot", "prior"])
def test_help_of_a_command_needs_no_torch(command: str) -> None:
    code = (
        "import sys\nfrom ebpo_core.cli import main\n"
        f"try:\n    main(['{command}', '--help'])\n"
        "except SystemExit as stop:\n    print(stop.code, 'torch' in sys.modules)"
    )
    assert python(code).stdout.splitlines()[-1] == "0 False"


def test_module_and_entry_point_are_the_same_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)
    done = subprocess.run(
        [sys.executable, "-m", "ebpo_core.cli", "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.split() == ["ebpo-core", ebpo_core.__version__]


def test_wrong_usage_has_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["trian"]) == 2
    assert "'trian'" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "module"), [("train", "trl"), ("plot", "matplotlib"), ("train", "rich")])
def test_a_missing_extra_is_named(command: str, module: str, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    arguments = [command, str(tmp_path)] if command == "plot" else [command, "--output_dir", str(tmp_path)]
    # None in sys.modules is how Python marks a module as not importable.
    code = (
        f"import sys; sys.modules['{module}'] = None\n"
        f"from ebpo_core.cli import main; print('status', main({arguments}))"
    )
    done = python(code)
    assert done.stdout.splitlines()[-1] == "status 1", done.stderr
    assert f"'{module}'" in done.stderr
    assert 'pip install "ebpo-core[train]"' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ModuleNotFoundError("No module named 'yaml'", name="yaml"), 'pip install "ebpo-core[train]" '),
        (ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn"), "'torch' is not installed; pip install"),
        (ModuleNotFoundError(name="math_verify"), 'pip install "ebpo-core[train,math]" '),
        (ModuleNotFoundError(name="lm_eval"), 'pip install "ebpo-core[train,eval]" '),
        (ModuleNotFoundError(name="no_such"), "'no_such' is not installed, and no extra of ebpo-core brings it"),
        (ModuleNotFoundError("reading needs x:\n  pip install x", name="x"), "run: reading needs x: pip install x\n"),
        (ImportError("a\nbroken library"), "program run: a broken library\n"),
        (ConnectionError("no\n\nserver"), "program run: no server\n"),
    ],
)
def test_every_error_is_one_line_with_the_remedy(
    error: Exception, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing:
        @staticmethod
        def main(_: list[str]) -> int:
            raise error

    monkeypatch.setitem(sys.modules, "failing", Failing)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    program = Program("program", "", "train", {"run": Command("", "failing")})
    assert program.run(["run"]) == 1
    written = capsys.readouterr().err
    assert shown in written
    assert written.count("\n") == 1
    monkeypatch.setenv("EBPO_TRACEBACK", "1")
    with pytest.raises(type(error)):
        program.run(["run"])


def test_extras_are_those_of_the_distribution() -> None:
    assert {"train", "fusionroute"} <= set(extras_of("yaml"))
    assert extras_of("lm_eval") == ["eval"]
    assert extras_of("peft") == ["fusionroute"], "not the one for developers"
    assert extras_of("numpy") == extras_of("no_such") == []


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    ebpo = ebpo_core.EBPO(tau2="debiased", decay=0.5)
    ebpo(np.array([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]))
    folder = tmp_path / "checkpoint-7"
    write_prior(folder, ebpo.state_dict(), global_step=7)
    return folder


def test_prior_show_json_equals_the_prior(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for path in (checkpoint, checkpoint / PRIOR_NAME):
        assert main(["prior", "show", str(path), "--json"]) == 0
        shown.append(json.loads(capsys.readouterr().out))
        assert shown[-1].pop("path") == str(path)
    assert shown[0] == shown[1]
    summary = shown[0]
    ebpo = ebpo_core.EBPO(tau2="debiased", decay=0.5)
    ebpo(np.array([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]))
    assert summary["mean"] == ebpo.prior.mean == 0.5
    assert summary["sigma2"] == ebpo.prior.sigma2()
    assert summary["tau2"] == ebpo.prior.tau2("debiased")
    assert summary["rewards_seen"] == 6
    assert summary["groups_seen"] == 3
    assert summary["global_step"] == 7
    assert summary["options"] == ebpo.options
    tau2, sigma2 = summary["tau2"], summary["sigma2"]
    assert summary["shrinkage"]["4"] == pytest.approx((sigma2 / 4) / (sigma2 / 4 + tau2))


def test_prior_show_takes_the_newest_checkpoint_of_a_run(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "trainer_state.json").write_text('{"global_step": 7}')
    write_prior(checkpoint.with_name("checkpoint-9"), ebpo_core.EBPO().state_dict(), global_step=9)  # cut short
    assert main(["prior", "show", str(checkpoint.parent), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["global_step"], shown["file"]) == (7, str(checkpoint / PRIOR_NAME))


def test_prior_show_table(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    assert main(["prior", "show", str(checkpoint)]) == 0
    shown = capsys.readouterr().out
    assert "tau2 (debiased)" in shown
    assert "mean reward" in shown


def test_prior_show_of_a_fixed_shrinkage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ebpo = ebpo_core.EBPO(shrinkage=0.25)
    for rewards, wanted in (([[1.0, 1.0]], 0.0), ([[0.0, 1.0]], 0.25)):  # 0 until rewards that differ have been seen
        ebpo(rewards)
        file = write_prior(tmp_path / "prior.json", ebpo.state_dict())
        assert main(["prior", "show", str(file), "--json"]) == 0
        assert set(json.loads(capsys.readouterr().out)["shrinkage"].values()) == {wanted}


def test_prior_show_of_an_empty_prior(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_prior(tmp_path / "empty.json", ebpo_core.EBPO().state_dict())
    assert main(["prior", "show", str(file), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["mean"] is None
    assert summary["shrinkage"] == {}
    pytest.importorskip("rich")
    assert main(["prior", "show", str(file)]) == 0


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"format": "ebpo-core/prior", "version": 1, "ebpo": {}}',
        '{"format": "ebpo-core/prior", "version": 99}',
    ],
)
def test_prior_show_of_garbage_is_one_line(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / PRIOR_NAME
    file.write_text(content)
    assert main(["prior", "show", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("ebpo prior: ")
    assert error.count("\n") == 1
    assert main(["prior", "show", str(tmp_path / "nowhere")]) == 1


def test_prior_show_lists_keys_and_reward_functions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    ebpo = ebpo_core.EBPO(kappa=3.0)
    ebpo([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]], keys=["[a]", ("[a]", 2), None])
    file = write_prior(tmp_path / "keys.json", ebpo.state_dict())
    assert main(["prior", "show", str(file), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert [entry["key"] for entry in summary["keys"]] == [["[a]"], ["[a]", 2]]
    first, second = summary["keys"]
    assert (first["rewards_seen"], first["mean"], first["weight_of_parent"]) == (4.0, 0.75, 3 / 5)
    assert first["blended"]["mean"] == pytest.approx(0.4 * 0.75 + 0.6 * 0.5)
    assert second["blended"] == ebpo.shrunken_prior(("[a]", 2))._asdict()
    assert main(["prior", "show", str(file)]) == 0
    assert "[a] / 2" in capsys.readouterr().out

    states = [{"reward": name, "ebpo": ebpo.state_dict()} for name in ("accuracy", "format")]
    file = write_prior(tmp_path / "rewards.json", states, global_step=3)
    assert main(["prior", "show", str(file), "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert [one["reward"] for one in both["per_reward"]] == ["accuracy", "format"]
    assert both["per_reward"][1]["keys"] == summary["keys"]
    assert main(["prior", "show", str(file)]) == 0
    assert "reward function format" in capsys.readouterr().out.replace("\n", " ")
