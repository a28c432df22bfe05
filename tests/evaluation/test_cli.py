"""`ebpo eval` with a real tiny model: tables, results, pictures, a kill by SIGKILL, a server, wrong input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from evaluation_model import partly_trained
from matplotlib.image import imread
from openai_server import serving

from ebpo_core.cli import main
from ebpo_core.data.rows import write_rows
from ebpo_core.evaluation.estimators import pass_at_k
from ebpo_core.evaluation.journal import read_journal
from ebpo_core.evaluation.report import plot_summaries
from ebpo_core.evaluation.summary import summarize
from ebpo_core.models import load_model
from ebpo_core.tasks.countdown import is_solution


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return partly_trained(tmp_path_factory.mktemp("model"), "test", 24)


def flags(model: str, output: Path, *more: str) -> list[str]:
    return ["eval", "--model", model, "--output", str(output), "--size=24", "--samples=4", "--max-new-tokens=8", *more]


def test_the_numbers_are_those_of_the_samples(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(model, tmp_path)) == 0
    shown = capsys.readouterr().out
    settings, samples = read_journal(tmp_path / "samples.jsonl", "samples")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"] == settings
    assert len(samples) == 96
    assert [set(row) for row in samples] == [
        {"problem", "sample", "seed", "text", "answer", "score", "finish_reason", "tokens"}
    ] * 96
    # Scores and metrics once more, from the texts alone.
    from ebpo_core.evaluation.problems import load_problems

    problems = {problem.id: problem for problem in load_problems("countdown", size=24)}
    right = dict.fromkeys(problems, 0)
    for sample in samples:
        row = problems[sample["problem"]].row
        correct = is_solution(sample["text"], row["numbers"], row["target"], row["operators"])
        assert sample["score"] == float(correct)
        right[sample["problem"]] += correct
    assert 0 < sum(right.values()) < 96
    for k in (1, 2, 4):
        mean = sum(pass_at_k(4, count, k) for count in right.values()) / 24
        assert results["overall"]["metrics"][f"pass@{k}"]["value"] == pytest.approx(mean)
    cluster = [problem.id for problem in problems.values() if (problem.topic, problem.level) == ("add", "2")]
    share = sum(right[name] for name in cluster) / 4 / len(cluster)
    assert results["clusters"]["add/2"]["metrics"]["avg@4"]["value"] == pytest.approx(share)
    value = results["overall"]["metrics"]["avg@4"]
    assert f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"[:5] in shown
    assert "Sampling 96/96" in shown
    assert len(set(imread(tmp_path / "plot.png")[..., :3].reshape(-1, 3).sum(1).tolist())) > 50


def test_a_finished_run_is_not_done_again_and_can_be_extended(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(model, tmp_path, "--no-plot")) == 0
    first = (tmp_path / "samples.jsonl").read_bytes()
    results = (tmp_path / "results.json").read_text()
    capsys.readouterr()
    assert main(flags(model, tmp_path, "--no-plot")) == 0
    assert "96 of 96 samples were there already" in capsys.readouterr().out
    assert (tmp_path / "results.json").read_text() == results
    assert main(flags(model, tmp_path, "--no-plot", "--samples=6")) == 0
    longer = (tmp_path / "samples.jsonl").read_bytes()
    assert longer.startswith(first)
    assert longer.count(b"\n") == 1 + 24 * 6
    assert not (tmp_path / "plot.png").exists()
    # Fewer again: the first four of the six.
    assert main(flags(model, tmp_path, "--no-plot")) == 0
    assert (tmp_path / "results.json").read_text() == results


def test_a_killed_run_goes_on_and_ends_as_an_unbroken_one(model: str, tmp_path: Path) -> None:
    more = ("--batch-size=1", "--no-plot")
    file = tmp_path / "killed" / "samples.jsonl"
    command = [sys.executable, "-m", "ebpo_core.cli", *flags(model, file.parent, *more)]
    # The thread that polls must not be the one that is killed, so this is a process of its own.
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    while not file.exists() or file.read_bytes().count(b"\n") < 10:
        assert process.poll() is None, "it ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = file.read_bytes()
    assert 10 <= kept.count(b"\n") < 97
    file.write_bytes(kept + b'{"problem": "x", "sam')  # as a kill within a write would leave it
    assert main(flags(model, file.parent, *more)) == 0
    assert file.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert main(flags(model, tmp_path / "whole", "--no-plot")) == 0
    rows = [
        {(row["problem"], row["sample"]): row for row in read_journal(tmp_path / name / "samples.jsonl", "samples")[1]}
        for name in ("killed", "whole")
    ]
    assert rows[0] == rows[1]
    whole, killed = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "killed"))
    assert whole == killed


def test_other_settings_and_another_model_are_refused(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert main(flags(model, output, "--no-plot")) == 0
    for more in (
        ("--temperature=0.5",),
        ("--seed=1",),
        ("--size=23",),
        ("--extract=integer",),
        ("--template=x{prompt}",),
    ):
        capsys.readouterr()
        assert main(flags(model, output, "--no-plot", *more)) == 1
        error = capsys.readouterr().err
        assert "was written with other settings" in error
        assert error.count("\n") == 1
    # The same name, but trained on.
    network, tokenizer = load_model(model)
    other = tmp_path / Path(model).name
    with_changes = network.model.layers[0].mlp.up_proj.weight
    with_changes.data += 0.01
    network.save_pretrained(other)
    tokenizer.save_pretrained(other)
    assert main(flags(str(other), output, "--no-plot")) == 1
    assert "weights" in capsys.readouterr().err


def test_a_baseline_is_compared_with_problem_by_problem(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(model, tmp_path / "hot", "--no-plot", "--temperature=2")) == 0
    baseline = ("--baseline", str(tmp_path / "hot"))
    assert main(flags(model, tmp_path / "cold", "--no-plot", "--temperature=0.3", *baseline)) == 0
    assert "paired by problem" in capsys.readouterr().out
    hot, cold = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("hot", "cold"))
    difference = cold["difference_to_baseline"]["avg@4"]
    values = [part["overall"]["metrics"]["avg@4"]["value"] for part in (cold, hot)]
    assert difference["value"] == pytest.approx(values[0] - values[1])
    assert difference["low"] <= difference["value"] <= difference["high"]
    assert difference["value"] > 0
    assert main(flags(model, tmp_path / "other", "--no-plot", "--size=12", *baseline)) == 1
    assert "other problems" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_server_is_evaluated_without_torch(model: str, tmp_path: Path) -> None:
    with serving(model) as server:
        command = flags("tiny", tmp_path / "run", "--server", server.url, "--no-plot", "--concurrency=4")
        code = (
            "import sys\nfrom ebpo_core.cli import main\n"
            f"print(main({command}), [name for name in ('torch', 'transformers') if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
    assert main(flags(model, tmp_path / "here", "--no-plot", "--dtype=float32")) == 0
    texts = [
        {
            (row["problem"], row["sample"]): row["text"]
            for row in read_journal(tmp_path / name / "samples.jsonl", "samples")[1]
        }
        for name in ("run", "here")
    ]
    assert texts[0] == texts[1]


def test_rows_of_ones_own_with_the_math_verifier(model: str, tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    data = write_rows(
        tmp_path / "own.jsonl", [{"prompt": f"{n} =", "answer": str(n), "topic": "same"} for n in range(4)]
    )
    output = tmp_path / "run"
    command = ["eval", "--model", model, "--task", str(data), "--output", str(output), "--samples=2", "--no-plot"]
    assert main([*command, "--max-new-tokens=4", "--template={prompt} :"]) == 0
    results = json.loads((output / "results.json").read_text())
    assert list(results["clusters"]) == ["same/"]
    assert results["settings"]["scorer"] == "math"
    assert results["preset"] == results["settings"]["preset"] == "strict"
    assert results["skipped"] == {"problems": 0, "ids": []}


def test_rows_that_cannot_be_scored_are_skipped_or_an_error(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("math_verify")
    answers = ["1", "@@@", "", "x+1"]
    data = write_rows(
        tmp_path / "own.jsonl", [{"prompt": f"{n} =", "answer": a, "id": f"row-{n}"} for n, a in enumerate(answers)]
    )
    output = tmp_path / "run"
    command = ["eval", "--model", model, "--task", str(data), "--output", str(output), "--samples=2", "--no-plot"]
    command += ["--max-new-tokens=4", "--preset=lenient"]
    assert main([*command, "--refuse-unscorable"]) == 1
    assert "2 problems have no 'answer' that the math scorer can read: row-1, row-2" in capsys.readouterr().err
    assert main(command) == 0
    assert "2 problems skipped, whose answers cannot be read: row-1, row-2" in capsys.readouterr().out
    results = json.loads((output / "results.json").read_text())
    assert results["preset"] == "lenient"
    assert results["skipped"] == {"problems": 2, "ids": ["row-1", "row-2"]}
    assert results["overall"]["problems"] == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--k", "5"], "--k 5"),
        (["--samples=0"], "samples=0"),
        (["--temperature=-1"], "temperature=-1"),
        (["--task=nowhere.jsonl"], "nowhere.jsonl"),
        (["--model=package:no_such_package"], "pip install"),
        (["--server=http://127.0.0.1:9/v1", "--retries=0"], "Is the server running"),
        (["--baseline=nowhere"], "no such file"),
        (["--confidence=2"], "level=2"),
        (["--scorer=nowhere:nothing"], "no such function"),
    ],
)
def test_wrong_input_is_one_line(
    model: str, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags(model, tmp_path), "--no-plot", *more]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("ebpo eval: ")
    assert message in error


def test_a_model_must_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--output", str(tmp_path)]) == 1
    assert "--model or --server" in capsys.readouterr().err


def test_pictures_of_several_evaluations(tmp_path: Path) -> None:
    from ebpo_core.data import Problem

    problems = [Problem(str(n), "p", topic="t", level=str(n % 2)) for n in range(4)]
    records = [
        {"problem": str(n), "sample": s, "score": float(s < n), "answer": "x", "finish_reason": "stop"}
        for n in range(4)
        for s in range(4)
    ]
    summary = summarize(problems, records, samples=4)
    svg = plot_summaries({"one": summary, "two": summary}, tmp_path / "deep" / "plot.svg").read_text()
    assert svg.count("<path") > 40
    single = summarize(problems[:1], records, samples=4)
    assert plot_summaries({"single": single}, tmp_path / "single.png").stat().st_size > 1000
