"""`ebpo curriculum` with a real tiny model: pass rates, files, labels from a real server, resume, wrong input."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("rich")

from evaluation_model import partly_trained
from openai_server import serving

from ebpo_core.cli import main
from ebpo_core.curriculum.posterior import posterior
from ebpo_core.curriculum.topics import PAPER_TOPICS
from ebpo_core.data.rows import read_rows, write_rows
from ebpo_core.evaluation.journal import read_journal
from ebpo_core.evaluation.problems import load_problems


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return partly_trained(tmp_path_factory.mktemp("model"), "train", 30)


def flags(model: str, output: Path, *more: str) -> list[str]:
    size = ("--size=30", "--rollouts=8", "--max-new-tokens=8")
    return ["curriculum", "--model", model, "--output", str(output), *size, *more]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_are_kept_and_sorted_by_what_the_model_can_do(
    model: str, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / f"train{suffix}"
    assert main(flags(model, output)) == 0
    shown = capsys.readouterr().out
    rows = list(read_rows(output))
    problems = {problem.id: problem for problem in load_problems("countdown", size=30, split="train")}
    assert {row["id"] for row in rows} == set(problems)
    assert all(problems[row["id"]].row.items() <= row.items() for row in rows)
    rates = [row["pass_rate"] for row in rows]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) > 3
    _, samples = read_journal(tmp_path / f"train{suffix}.samples.jsonl", "samples")
    passes = Counter(sample["problem"] for sample in samples if sample["score"] == 1)
    for row in rows:
        assert (row["passes"], row["rollouts"]) == (passes[row["id"]], 8)
        assert row["pass_rate"] == row["passes"] / 8
        assert (row["pass_rate_mean"], row["pass_rate_low"], row["pass_rate_high"]) == posterior(row["passes"], 8)
        assert row["difficulty"] == sum(row["pass_rate"] < edge for edge in (0.2, 0.4, 0.6, 0.8))
    assert f"30 problems, mean pass rate {sum(rates) / 30:.3f}" in shown
    # Another order of the same rollouts costs none.
    assert (
        main(flags(model, output, "--order=topic_blocks", "--order-batch=4", "--prior=empirical", "--edges", "0.5"))
        == 0
    )
    assert "240 of 240 samples were there already" in capsys.readouterr().out
    again = list(read_rows(output))
    topics = [row["topic"] for row in again]
    assert topics[:12] == [topics[0]] * 12
    assert {row["difficulty"] for row in again} <= {0, 1}


def test_the_file_trains_with_the_train_command(model: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    output = tmp_path / "train.jsonl"
    assert main(flags(model, output, "--rollouts=2")) == 0
    small = ["--max_steps=1", "--per_device_train_batch_size=4", "--num_generations=2", "--max_completion_length=6"]
    small += [
        "--use_cpu=true",
        "--bf16=false",
        "--gradient_checkpointing=false",
        "--report_to=none",
        "--save_strategy=no",
    ]
    run = ["--task", str(output), "--reward=ebpo_core.tasks.countdown:reward", "--shuffle_dataset=false"]
    assert main(["train", "--model_name_or_path", model, "--output_dir", str(tmp_path / "run"), *small, *run]) == 0


def by_target(row: dict[str, Any]) -> str:
    return "odd" if row["target"] % 2 else "even"


def test_labels_from_a_column_and_from_a_function(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [
        {key: value for key, value in problem.row.items() if key != "topic"} | {"subject": problem.topic}
        for problem in load_problems("countdown", size=12)
    ]
    data[3]["subject"] = None
    task = ("--task", str(write_rows(tmp_path / "data.jsonl", data)), "--scorer=ebpo_core.tasks.countdown:reward")
    output = tmp_path / "out.jsonl"
    assert main([*flags(model, output, *task, "--rollouts=1", "--order=topic")]) == 1
    assert "12 rows have no 'topic'" in capsys.readouterr().err
    assert main(flags(model, output, *task, "--rollouts=1", "--order=topic", "--label-column=subject")) == 0
    assert "1 problems are 'unlabelled'" in capsys.readouterr().out
    assert Counter(row["topic"] for row in read_rows(output))["unlabelled"] == 1
    assert main(flags(model, output, *task, "--rollouts=1", "--label-function", f"{__name__}:by_target")) == 0
    assert all(row["topic"] == by_target(row) for row in read_rows(output))


def test_labels_from_a_server_are_strict_and_asked_for_once(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    with serving(model, reply="linear algebra.") as server:
        label = ("--rollouts=1", "--label-server", server.url, "--order=topic")
        server.failures = [None] * 6 + [(400, {})]
        assert main(flags(model, output, *label, "--concurrency=1")) == 1
        assert "status 400" in capsys.readouterr().err
        assert main(flags(model, output, *label)) == 0
        assert len(server.requests) == 31
        body = server.requests[0]
        assert body["temperature"] == 0
        assert all(topic in body["messages"][0]["content"] for topic in PAPER_TOPICS)
        assert load_problems("countdown", size=1, split="train")[0].text in body["messages"][1]["content"]
    assert {row["topic"] for row in read_rows(output)} == {"Linear Algebra"}
    _, replies = read_journal(tmp_path / "out.jsonl.topics.jsonl", "topics")
    assert {(row["reply"], row["label"]) for row in replies} == {("linear algebra.", "Linear Algebra")}


def test_what_a_real_model_says_is_never_guessed_at(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny model answers with numbers: no label, counted, and its words are kept."""
    output = tmp_path / "out.jsonl"
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "1", "answer": "1"}, {"prompt": "2", "answer": "2"}])
    with serving(model) as server:
        label = ("--label-server", server.url, "--label-model=tiny", "--rollouts=1", "--scorer=exact")
        assert main(flags(model, output, "--task", str(data), *label)) == 0
    assert "2 problems are 'unlabelled'" in capsys.readouterr().out
    assert {row["topic"] for row in read_rows(output)} == {"unlabelled"}
    replies = [json.loads(line) for line in (tmp_path / "out.jsonl.topics.jsonl").read_text().splitlines()[1:]]
    assert [row["label"] for row in replies] == [None, None]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--edges", "0.5", "0.2"], "edges"),
        (["--rollouts=0"], "samples=0"),
        (["--order-batch=0"], "--order-batch 0"),
        (["--label-column=none"], "column 'none'"),
        (["--label-function=nowhere:nothing"], "no such function"),
        (["--label-server=localhost"], "expected a URL"),
    ],
)
def test_wrong_input_is_one_line(
    model: str, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(model, tmp_path / "out.jsonl", *more)) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()
    assert main(flags(model, tmp_path / "out.txt")) == 1
