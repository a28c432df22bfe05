"""The commands of docs/pipeline.md, taken from the page and run in its order, with smaller numbers."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from ebpo_core.cli import main
from ebpo_core.cli.plot import read_log
from ebpo_core.data.rows import read_rows

PAGE = Path(__file__).parents[2] / "docs" / "pipeline.md"

# What stands on the page, and what is run here in its place.
SMALLER = {
    "--size": "24",
    "--rollouts": "4",
    "--samples": "4",
    "--order-batch": "4",
    "--per_device_train_batch_size": "16",
}

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning:transformers")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    found = [shlex.split(line[2:]) for block in blocks("console") for line in block.splitlines()]
    for words in found:
        assert words[0] == "ebpo"
        for place, word in enumerate(words[:-1]):
            if word in SMALLER:
                words[place + 1] = SMALLER[word]
    return [words[1:] for words in found]


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    base, curriculum = blocks("python")
    base = base.replace("hidden_size=128, layers=5", "hidden_size=32, layers=1").replace("steps=120", "steps=5")
    exec(compile(base, str(PAGE), "exec"), {})  # noqa: S102 -- our own page
    exec(compile(curriculum, str(PAGE), "exec"), {})  # noqa: S102
    run = commands()
    assert [words[0] for words in run] == ["curriculum", "curriculum", "train", "eval", "eval"]
    folder = tmp_path / "runs" / "pipeline"

    assert main(run[0]) == 0
    rows = list(read_rows(folder / "train.jsonl"))
    assert len(rows) == 24
    for start in range(0, 24, 4):
        assert len({row["topic"] for row in rows[start : start + 4]}) == 1
    capsys.readouterr()

    assert main(run[1]) == 0
    assert "96 of 96 samples were there already" in capsys.readouterr().out
    again = list(read_rows(folder / "train.jsonl"))
    assert sorted(row["id"] for row in again) == sorted(row["id"] for row in rows)
    rates = [row["pass_rate"] for row in again]
    assert rates == sorted(rates, reverse=True)

    assert main(run[2]) == 0
    log = read_log(folder / "ebpo")
    assert [record["step"] for record in log][-1] >= 1
    assert (folder / "ebpo" / "ebpo_prior.json").is_file()

    assert main(run[3]) == 0
    assert main(run[4]) == 0
    assert "paired by problem" in capsys.readouterr().out
    results = json.loads((folder / "eval-ebpo" / "results.json").read_text())
    assert results["samples"] == 4
    assert set(results["difference_to_baseline"]) == set(results["overall"]["metrics"])
    assert (folder / "eval-ebpo" / "plot.png").stat().st_size > 1000


def test_the_page_names_every_option_it_explains() -> None:
    """An option that the page mentions exists, whether a command uses it or not."""
    from ebpo_core.cli.curriculum import build_parser as curriculum
    from ebpo_core.cli.evaluate import build_parser as evaluation

    known = {name for build in (curriculum, evaluation) for name in build()._option_string_actions}
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*(?![\w])", PAGE.read_text(encoding="utf-8")))
    train = {word for word in commands()[2] if word.startswith("--")}
    assert {name for name in mentioned if not any(option.startswith(name) for option in train)} <= known
