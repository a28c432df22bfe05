"""Rollouts read from what each writer leaves on the disk, and refusals that say what to do."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rollout_files import healthy, rows_of, write_lines

from ebpo_core.data import Problem
from ebpo_core.data.rows import write_rows
from ebpo_core.evaluation.journal import Journal
from ebpo_core.evaluation.sampling import (
    KEY,
    KIND,
    Batch,
    Completion,
    Request,
    SamplingOptions,
    collect,
    missing_requests,
)
from ebpo_core.evaluation.scoring import Scored
from ebpo_core.signal import read_rollouts
from ebpo_core.signal.rollouts import find_files


def sizes(groups: np.ndarray) -> list[int]:
    return np.bincount(groups).tolist()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_plain_columns(tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    rows = rows_of([[0, 1, 1], [0, 0]])
    read = read_rollouts(write_rows(tmp_path / f"rollouts{suffix}", [*rows[:4], {**rows[4], "reward": None}]))
    assert read.form == "plain"
    assert read.group_column == "group"
    assert read.groups.tolist() == read.prompts.tolist() == [0, 0, 0, 1, 1]  # type: ignore[union-attr]
    np.testing.assert_array_equal(read.rewards, [0, 1, 1, 0, np.nan])
    assert not read.has_steps
    assert read.sources is None


def test_named_columns_weights_steps_and_booleans(tmp_path: Path) -> None:
    rows = [
        {"who": who, "at": at, "right": who == "a", "form": 0.5, "text": f"{who}?", "from": "here"}
        for at in (7, 3)
        for who in "aabb"
    ]
    path = write_lines(tmp_path / "x.jsonl", rows)
    names: dict[str, Any] = {
        "group": "who",
        "reward": ["right", "form"],
        "prompt": "text",
        "step": "at",
        "source": "from",
    }
    read = read_rollouts(path, weights=[2, -1], **names)
    assert read.rewards.tolist() == [1.5, 1.5, -0.5, -0.5] * 2
    assert read.columns["right"].tolist() == [2.0, 2, 0, 0] * 2
    assert read.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]  # of another step, another group
    assert read.prompts.tolist() == [0, 0, 1, 1] * 2  # type: ignore[union-attr]
    assert read.steps.tolist() == [1] * 4 + [0] * 4
    assert read.sources == ["here"] * 8
    last = read.last_steps(1)
    assert last.groups.tolist() == [0, 0, 1, 1]
    assert last.steps.tolist() == [0] * 4
    assert last.sources == ["here"] * 4


def test_a_group_column_that_repeats_is_preferred(tmp_path: Path) -> None:
    rows = [{**row, "uid": number} for number, row in enumerate(rows_of([[0, 1], [1, 1]]))]
    for row in rows:
        del row["group"]
    assert read_rollouts(write_lines(tmp_path / "x.jsonl", rows)).group_column == "prompt"
    rows = [{"uid": number, "reward": 1} for number in range(3)]
    assert read_rollouts(write_lines(tmp_path / "x.jsonl", rows)).group_column == "uid"


class Answers:
    """A back end that says what number a sample has."""

    def settings(self) -> dict[str, Any]:
        return {}

    def generate(self, requests: Sequence[Request]) -> Generator[Batch, None, None]:
        yield [(request, Completion(str(request.sample), "stop")) for request in requests]


class Even:
    name, merge_correct = "even", False

    def score(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Scored]:
        del problems
        return [Scored(float(int(text) % 2 == 0), text) for text in texts]


def test_samples_of_an_evaluation_or_a_curriculum(tmp_path: Path) -> None:
    problems = [Problem(id=name, prompt=name, row={}) for name in "xyz"]
    path = tmp_path / "samples.jsonl"
    with Journal(path, KIND, {}, KEY) as journal:
        requests = missing_requests(problems, 3, journal, SamplingOptions(), lambda prompt: prompt)
        collect(requests, Answers(), Even(), journal)  # type: ignore[arg-type]
    with path.open("a") as file:
        file.write('{"problem": "x", "sam')  # a run that is being written
    for place in (path, tmp_path):
        read = read_rollouts(place)
        assert read.form == "samples"
        assert sizes(read.groups) == [3, 3, 3]
        assert read.rewards.tolist() == [1, 0, 1] * 3
        assert read.prompts is None
    with pytest.raises(ValueError, match="^reward='right': .* has no such column; it has problem, sample"):
        read_rollouts(path, reward=["right"])


def verl_rows(step: int, *, uid: bool) -> list[dict[str, Any]]:
    """Rows of ``_write_generations``: verl 0.9's trainer adds each output's key, as ``<uid>_<session>_<output>``."""
    rows = []
    for prompt in range(2):
        for session in range(3):
            outputs = 2 if uid and session == 1 else 1
            for output in range(outputs):
                # The reward of a session is that of its last output.
                score = float(session > prompt) if output == outputs - 1 else -1.0
                row = {"input": f"user\n{prompt}", "output": "text", "gts": "4", "score": score, "step": step}
                rows.append(row | ({"uid": f"b7_{prompt}_{session}_{output}"} if uid else {"acc": True}))
    return rows


@pytest.mark.parametrize("uid", [False, True])
def test_verl_rollout_dump(tmp_path: Path, uid: bool) -> None:
    for step in (1, 2, 10):
        write_lines(tmp_path / f"{step}.jsonl", verl_rows(step, uid=uid))
    assert [file.name for file in find_files(tmp_path)] == ["1.jsonl", "2.jsonl", "10.jsonl"]
    read = read_rollouts(tmp_path)
    assert read.form == "verl"
    assert read.group_column == ("uid" if uid else "input")
    assert sizes(read.groups) == [3] * 6  # a session counts once, whatever the number of its outputs
    assert read.rewards.tolist() == [0, 1, 1, 0, 0, 1] * 3
    assert read.steps.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert read.prompts.tolist() == [0, 0, 0, 1, 1, 1] * 3  # type: ignore[union-attr]


def test_verl_ids_of_another_form_are_groups(tmp_path: Path) -> None:
    rows = [{**row, "uid": f"id-{row['input'][-1]}"} for row in verl_rows(1, uid=False)]
    assert sizes(read_rollouts(write_lines(tmp_path / "1.jsonl", rows)).groups) == [3, 3]


def test_skyrl_evaluation_dump(tmp_path: Path) -> None:
    def row(prompt: str, score: Any, source: str) -> dict[str, Any]:
        about = {"stop_reason": "stop", "env_class": "gsm8k", "env_extras": {"index": 1}, "data_source": source}
        return {"input_prompt": prompt, "output_response": "text", "score": score, **about}

    write_lines(tmp_path / "gsm8k.jsonl", [row("a", 1.0, "gsm8k"), row("a", 0.0, "gsm8k")])
    write_lines(tmp_path / "math.jsonl", [row("b", [0.0, 0.0, 0.5], "math"), row("b", [0.0, 1.0], "math")])
    write_lines(tmp_path / "aggregated_results.jsonl", [{"eval/all/avg_score": 0.6}])
    read = read_rollouts(tmp_path)
    assert read.form == "skyrl"
    assert read.rewards.tolist() == [1, 0, 0.5, 1]  # rewards of tokens are added up
    assert read.groups.tolist() == [0, 0, 1, 1]
    assert read.sources == ["gsm8k", "gsm8k", "math", "math"]


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_trl_completions_by_trl(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    import trainer_worker as tiny

    from ebpo_core.trainer import EBPOConfig

    # Two steps on each generation batch: TRL writes its table twice.
    args = tiny.config(EBPOConfig, tmp_path, max_steps=4, log_completions=True, num_iterations=2)

    def partly(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [None if ids[0] % 3 == 0 else 0.25 for ids in completion_ids]

    trainer = tiny.build(tiny.RecordingEBPO, args, [tiny.third, partly])
    trainer.train()
    read = read_rollouts(tmp_path)
    assert read.form == "trl"
    assert list(read.columns) == ["third", "partly"]
    expected = np.concatenate([rewards.double().numpy() for rewards in trainer.rewards])
    assert len(trainer.rewards) == 2
    np.testing.assert_allclose(read.rewards, np.nansum(expected, axis=1), rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(read.columns["partly"]), np.isnan(expected[:, 1]))
    assert sizes(read.groups) == [tiny.GROUP] * 4
    assert read.has_steps
    assert read.steps.max() == 1
    assert "2 tables repeat" in read.notes[0]
    alone = read_rollouts(tmp_path / "completions" / "completions_00004.parquet", reward=["third"])
    assert alone.rewards.tolist() == expected[8:, 0].tolist()


@pytest.mark.parametrize(
    ("rows", "named", "message"),
    [
        (
            [{"reward": 1, "other": 2}],
            {},
            "no column tells which completions belong to one prompt; name one with group=",
        ),
        ([{"group": 1, "other": 2}], {}, r"no column of rewards was recognised; name one with reward=: group, other"),
        (rows_of([[0, 1]]), {"group": "nope"}, "group='nope': .* has no such column; it has group, prompt, reward"),
        (rows_of([[0, 1]]), {"reward": ["reward", "nope"]}, "^reward='nope'"),
        (rows_of([[0, 1]]), {"weights": [1.0]}, r"weights=\[1.0\]: give one for each of reward="),
        ([{"group": 1, "reward": "good"}], {}, "row 1, reward='good': expected a number"),
        ([{"group": 1, "reward": float("inf")}], {}, "row 1, reward=inf: rewards are finite"),
        ([{"group": None, "reward": 1}], {}, "row 1, group=None"),
        ([{"group": 1, "reward": 1, "step": "a"}], {}, "column 'step': steps are whole numbers"),
    ],
)
def test_wrong_content_is_refused_by_name(tmp_path: Path, rows: Any, named: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_rollouts(write_lines(tmp_path / "x.jsonl", rows), **named)


def test_wrong_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_rollouts(tmp_path / "nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match="holds no .jsonl or .parquet file"):
        read_rollouts(tmp_path)
    with pytest.raises(ValueError, match="give at least one file"):
        read_rollouts([])
    (tmp_path / "x.pkl").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ValueError, match="pickle.*dump_eval_results"):
        read_rollouts(tmp_path / "x.pkl")
    plain = write_lines(tmp_path / "a.jsonl", healthy())
    other = write_lines(tmp_path / "1.jsonl", verl_rows(1, uid=False))
    with pytest.raises(ValueError, match="give files of one form"):
        read_rollouts([plain, other])
    with pytest.raises(ValueError, match=r"a\.jsonl' is given twice"):
        read_rollouts([plain, tmp_path / "." / "a.jsonl"])
    header = {"format": "ebpo-core/samples", "version": 1, "settings": {}}
    with pytest.raises(ValueError, match="holds no sample yet"):
        read_rollouts(write_lines(tmp_path / "samples.jsonl", [header]))
    with pytest.raises(ValueError, match="'ebpo-core/samples'"):
        read_rollouts(write_lines(tmp_path / "labels.jsonl", [header | {"format": "ebpo-core/labels"}]))


def test_steps_are_refused_where_they_make_no_sense(tmp_path: Path) -> None:
    without = read_rollouts(write_lines(tmp_path / "a.jsonl", healthy(groups_per_step=None)))
    with_steps = read_rollouts(write_lines(tmp_path / "b.jsonl", healthy()))
    for call, message in (
        (lambda: without.last_steps(2), "have no steps"),
        (lambda: with_steps.last_steps(0), "last=0"),
        (lambda: with_steps.in_steps_of(4), "have steps of their own"),
        (lambda: without.in_steps_of(0), "groups_per_step=0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert without.in_steps_of(8).steps.tolist() == with_steps.steps.tolist()
