"""``ebpo signal`` as a command: exit statuses, tables, JSON, pictures, and what it imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rollout_files import healthy, write_lines

from ebpo_core.cli import main
from ebpo_core.signal import diagnose, read_rollouts


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ebpo_core.cli", "signal", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "good.jsonl", healthy())


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "bad.jsonl", [{**row, "reward": 0} for row in healthy()])


def test_the_exit_status_is_for_scripts(good: Path, bad: Path, tmp_path: Path) -> None:
    pytest.importorskip("rich")
    fine, warned, unreadable, wrong = (
        run(good),
        run(bad, "--json"),
        run(tmp_path / "nowhere.jsonl"),
        run(good, "--max-daed", "1"),
    )
    assert (fine.returncode, warned.returncode, unreadable.returncode, wrong.returncode) == (0, 3, 1, 2)
    assert "No warnings." in fine.stdout
    assert fine.stderr == warned.stderr == ""
    assert [one["kind"] for one in json.loads(warned.stdout)["warnings"]] == ["constant_verifier"]
    assert "no such file or folder" in unreadable.stderr
    assert "Traceback" not in unreadable.stderr + wrong.stderr


def test_json_is_the_librarys_report(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["signal", str(good), "--json", "--resamples", "20", "--seed", "3", "--last", "2"]) == 0
    shown = json.loads(capsys.readouterr().out)
    report = diagnose(read_rollouts(good).last_steps(2), resamples=20, seed=3)
    assert shown == json.loads(json.dumps(report.to_dict()))
    assert [one["size"] for one in shown["expected"]] == [2, 4, 8, 16, 32, 64]
    assert shown["steps"] == 2
    assert shown["groups"] == 16
    assert shown["expected"][0]["dead"]["low"] < shown["expected"][0]["dead"]["value"]


def test_tables_fit_a_terminal_and_name_every_part(bad: Path, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    assert main(["signal", str(good), "--resamples", "20"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for part in ("Dead groups now", "signal/rollout", "measured", "fitted", "1/4 to 3/4", "james_stein", "No warnings"):
        assert part in shown
    assert main(["signal", str(bad), "--resamples", "20"]) == 3
    assert "Warning, constant_verifier: every reward is 0" in capsys.readouterr().out.replace("\n", " ")


def test_single_completions_are_answered_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    path = write_lines(tmp_path / "single.jsonl", [{"group": n, "reward": n % 2} for n in range(6)])
    assert main(["signal", str(path), "--picture", str(tmp_path / "x.png")]) == 1
    said = capsys.readouterr()
    assert "No group has two scored completions" in said.out
    assert "nothing to draw" in said.err
    assert main(["signal", str(path), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["expected"] is None


def test_picture(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    picture = tmp_path / "new" / "signal.png"
    assert main(["signal", str(good), "--resamples", "20", "--json", "--picture", str(picture)]) == 0
    assert json.loads(capsys.readouterr().out)["form"] == "plain"
    assert imread(picture).shape[1] > 1000
    assert main(["signal", str(good), "--picture", "signal.txt"]) == 1
    assert "--picture signal.txt: must end in one of .png" in capsys.readouterr().err


def test_flags_name_columns_and_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"q": row["group"], "a": row["reward"], "b": 1 - row["reward"], "from": "x"} for row in healthy()]
    path = write_lines(tmp_path / "named.jsonl", rows)
    flags = ["--group", "q", "--reward", "a", "--weight", "2", "--reward", "b", "--weight", "1", "--source", "from"]
    assert main(["signal", str(path), "--json", "--resamples", "5", "--groups-per-step", "6", *flags]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["reward"]["columns"] == ["a", "b"]
    assert (shown["reward"]["lowest"], shown["reward"]["highest"]) == (1, 2)
    assert shown["per_step"]["groups"] == 6


def test_json_needs_numpy_alone(good: Path) -> None:
    heavy = ("torch", "transformers", "trl", "datasets", "matplotlib", "rich", "pandas", "pyarrow", "scipy")
    code = (
        f"import sys; from ebpo_core.cli import main; main(['signal', {str(good)!r}, '--json', '--resamples', '5']); "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
