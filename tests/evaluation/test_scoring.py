"""Problems, extracted answers, scorers and summaries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ebpo_core.data import Problem
from ebpo_core.data.rows import check_writable, read_rows, write_rows
from ebpo_core.evaluation.estimators import bootstrap
from ebpo_core.evaluation.problems import PromptFormat, fingerprint, from_rows, load_problems
from ebpo_core.evaluation.scoring import (
    RewardScorer,
    Scored,
    boxed,
    last_integer,
    load_extractor,
    load_scorer,
    whole_text,
)
from ebpo_core.evaluation.summary import default_ks, paired_differences, summarize, write_results
from ebpo_core.tasks import arithmetic, countdown

ROWS = [
    {"prompt": "one", "answer": "1", "topic": "a", "level": 1, "list": [1, 2]},
    {"prompt": "two", "answer": "2", "topic": "b", "level": None, "list": [3]},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_survive_a_file(tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    path = write_rows(tmp_path / "sub" / f"rows{suffix}", ROWS)
    assert list(read_rows(path)) == ROWS
    write_rows(path, ROWS[:1])
    assert list(read_rows(path)) == ROWS[:1]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1))
    assert list(read_rows(tmp_path / "rows.json")) == ROWS
    (tmp_path / "rows.csv").write_text('prompt,answer\n"a, b",2\n')
    assert list(read_rows(tmp_path / "rows.csv")) == [{"prompt": "a, b", "answer": "2"}]
    for name, content, message in (
        ("rows.txt", "x", "must end in"),
        ("empty.jsonl", "\n", "no rows"),
        ("list.jsonl", "[1]\n", "line 1: expected an object, found a list"),
        ("bad.jsonl", "{", "not JSON Lines"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            read_rows(tmp_path / name)
    with pytest.raises(ValueError, match="no such file"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="must end in"):
        check_writable(tmp_path / "rows.csv")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(TypeError):
        write_rows(path, [*ROWS, {"prompt": object()}])
    assert list(read_rows(path)) == ROWS
    assert len(list(tmp_path.iterdir())) == 1


def test_problems_have_unique_and_stable_names() -> None:
    problems = from_rows([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}, {"prompt": "c", "id": 7}])
    names = [problem.id for problem in problems]
    assert len(set(names)) == 4
    assert names[2] == f"{names[0]}-2"
    assert names[3] == "7"
    assert [problem.id for problem in from_rows([{"prompt": "b"}, {"prompt": "a"}])] == [names[1], names[0]]
    assert (problems[0].topic, problems[0].level) == ("", "")
    assert fingerprint(problems) == fingerprint(problems[::-1]) != fingerprint(problems[:3])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a"}], "no column 'prompt'"),
        ([{"prompt": ""}], "row 1"),
        ([{"prompt": "a"}, {"prompt": 3}], "row 2"),
        ([{"prompt": ["a"]}], "row 1"),
        ([{"prompt": "a", "id": 1}, {"prompt": "b", "id": "1"}], "row 2: id='1'"),
    ],
)
def test_rows_that_are_no_problems(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_rows(rows)


def test_built_in_problems_are_the_tasks_own() -> None:
    datasets = pytest.importorskip("datasets")
    assert datasets
    for name, task in (("countdown", countdown), ("arithmetic", arithmetic)):
        rows = [problem.row for problem in load_problems(name, size=30, seed=4)]
        assert rows == task.dataset(30, seed=4, split="test").to_list()
        assert len(load_problems(name)) == 600
    kept = load_problems("countdown", size=5, split="train", topics=["add"], levels=[2])
    assert {(problem.topic, problem.level) for problem in kept} == {("add", "2")}


def test_files_and_benchmarks(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "own.jsonl", ROWS)
    assert [problem.row for problem in load_problems(str(path))] == ROWS
    assert len(load_problems(str(path), size=1)) == 1
    math500 = tmp_path / "math500.jsonl"
    row = {
        "problem": "What is 1+1?",
        "solution": "2",
        "answer": "2",
        "subject": "Algebra",
        "level": 3,
        "unique_id": "u",
    }
    math500.write_text(json.dumps(row) + "\n")
    (problem,) = load_problems(str(math500))
    assert (problem.id, problem.topic, problem.level, problem.row["answer"]) == ("u", "Algebra", "3", "2")
    assert "boxed" in problem.text
    (bare,) = load_problems(str(math500), instruction=False)
    assert bare.prompt == "What is 1+1?"
    for options, message in (
        ({"size": 0}, "size=0"),
        ({"format": "auto"}, "has none"),
    ):
        with pytest.raises(ValueError, match=message):
            load_problems("countdown", **options)
    with pytest.raises(ValueError, match="topics and levels"):
        load_problems(str(path), topics=["a"])


def test_prompt_formats() -> None:
    assert PromptFormat()("x {y}") == "x {y}"
    assert PromptFormat("Q: {prompt}\nA: {")("x") == "Q: x\nA: {"
    assert PromptFormat(chat=True)("x") == [{"role": "user", "content": "x"}]
    assert [part["role"] for part in PromptFormat(system="s")("x")] == ["system", "user"]  # type: ignore[index]
    chat = [{"role": "user", "content": "x"}]
    assert PromptFormat("{prompt}!", system="s")(chat) == chat
    with pytest.raises(ValueError, match="template"):
        PromptFormat("Q")


@pytest.mark.parametrize(
    ("extract", "text", "answer"),
    [
        (whole_text, "  1 +  2\n", "1 + 2"),
        (whole_text, " \n", None),
        (last_integer, "so 3, then 1,200.", "1200"),
        (last_integer, "no number", None),
        (boxed, r"a \boxed{1} b \boxed{\frac{1}{2} } c", r"\frac{1}{2}"),
        (boxed, r"\boxed{1} then \boxed{2", None),
        (boxed, r"\boxed{}", None),
        (boxed, "none", None),
    ],
)
def test_extracted_answers(extract: Any, text: str, answer: str | None) -> None:
    assert extract(text) == answer


def test_scorers_of_the_tasks_are_their_rewards() -> None:
    problems = load_problems("countdown", size=12)
    texts = [problem.row["answer"] if place % 2 else "1 + 1" for place, problem in enumerate(problems)]
    with load_scorer(None, "countdown") as scorer:
        assert scorer.score(problems, texts) == [Scored(float(place % 2), text) for place, text in enumerate(texts)]
        assert scorer.preset is None
        assert scorer.score([], []) == []
    problems = load_problems("arithmetic", size=3)
    with load_scorer(None, "arithmetic") as scorer:
        answer = problems[0].row["answer"]
        assert scorer.score(problems[:1], [f"It is {answer}."]) == [Scored(1.0, str(answer))]


def half(prompts: Any, completions: Any, *, answer: list[str], **columns: Any) -> list[float]:
    assert isinstance(completions[0], str) == isinstance(prompts[0], str)
    return [0.5 for _ in answer]


def test_a_reward_function_by_its_path() -> None:
    problems = from_rows([*ROWS, {"prompt": [{"role": "user", "content": "three"}], "answer": "3"}])
    with load_scorer(f"{__name__}:half", "rows", "integer") as scorer:
        assert scorer.score(problems[:2], ["1", "x"]) == [Scored(0.5, "1"), Scored(0.5, None)]
        assert scorer.score(problems[2:], ["1"]) == [Scored(0.5, "1")]
    assert load_scorer("exact", "rows").score(problems[:2], ["1", "x"]) == [Scored(1.0, "1"), Scored(0.0, "x")]
    assert load_extractor("ebpo_core.evaluation.scoring:boxed") is boxed
    with pytest.raises(ValueError, match="extract='last'"):
        load_extractor("last")
    with pytest.raises(ValueError, match="no such function"):
        load_scorer("nowhere:nothing", "rows")


@pytest.mark.parametrize("returned", [[1.0], [None, 1.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_a_reward_that_does_not_score_everything_is_refused(returned: list[Any]) -> None:
    scorer = RewardScorer(lambda **_: returned, whole_text, "mine")
    with pytest.raises(ValueError, match="mine returned"):
        scorer.score(from_rows(ROWS), ["a", "b"])


def test_the_math_scorer_reads_answers() -> None:
    pytest.importorskip("math_verify")
    problems = from_rows([{"prompt": "half?", "answer": "0.5", "id": name} for name in "abc"])
    texts = [r"\boxed{\frac12}", r"So it is \boxed{0.6}.", "no answer at all"]
    with load_scorer(None, "file.jsonl") as scorer:
        assert scorer.unscorable(problems) == []
        assert scorer.score(problems, texts) == [
            Scored(1.0, r"\frac12"),
            Scored(0.0, "0.6"),
            Scored(0.0, None),
        ]
        assert scorer.preset == "strict"
        rows = [{"answer": ""}, {"answer": {"a": 1}}, {}, {"answer": "see solution 3 above"}]
        bad = [Problem(name, "p", row=row) for name, row in zip("wxyz", rows, strict=True)]
        assert scorer.unscorable([*problems, *bad]) == ["w", "x", "y", "z"]
        with pytest.raises(ValueError, match="1 problems have no 'answer'.*x"):
            scorer.score([Problem("x", "p")], [r"\boxed{1}"])
    with load_scorer("math", "file.jsonl", "integer") as scorer:
        assert scorer.score(problems[:1], [r"3 \boxed{0.5} 4"]) == [Scored(1.0, "4")]
    with load_scorer("math", "countdown", None, "lenient") as scorer:
        assert scorer.preset == "lenient"
        assert scorer.score([Problem("p", "p", row={"answer": "20\\%"})], ["\\boxed{20}"]) == [Scored(1.0, "20")]
    with pytest.raises(ValueError, match="only the math scorer has presets"):
        load_scorer("exact", "file.jsonl", None, "lenient")


def test_answers_of_one_meaning_vote_together_right_or_wrong() -> None:
    pytest.importorskip("math_verify")
    spelled = [(1, "0.5"), (0, "x+1"), (0, "1+x"), (1, "\\frac12"), (0, None), (0, "1 + x")]
    records = [sample("p", n, *pair) for n, pair in enumerate(spelled)]
    others = [sample("q", 0, 0, "1/2")]
    with load_scorer("math", "file.jsonl") as scorer:
        grouped = scorer.grouped([*records, *others])
    assert [record["answer"] for record in grouped] == ["0.5", "x+1", "x+1", "0.5", None, "x+1", "1/2"]
    problems = [Problem("p", "p")]
    assert summarize(problems, records, samples=6, ks=[6]).overall.metrics["maj@6"].value == pytest.approx(2 / 5)
    assert summarize(problems, grouped, samples=6, ks=[6]).overall.metrics["maj@6"].value == 0.0
    with load_scorer("exact", "file.jsonl") as plain:
        assert plain.grouped(records) == records


def sample(problem: str, number: int, score: float, answer: str | None) -> dict[str, Any]:
    return {"problem": problem, "sample": number, "score": score, "answer": answer, "finish_reason": "stop"}


PROBLEMS = [
    Problem(name, name, topic=topic, level=level)
    for name, topic, level in (("p", "a", "1"), ("q", "a", "2"), ("r", "b", "1"))
]
RECORDS = [
    *(sample("p", n, *pair) for n, pair in enumerate([(1, "x"), (0, "y"), (1, "z"), (0.5, "y")])),
    *(sample("q", n, *pair) for n, pair in enumerate([(0, None), (0, "y"), (0, "y"), (0, "z")])),
    *(sample("r", n, *pair) for n, pair in enumerate([(1, "x"), (1, "x"), (1, "x"), (0, None)])),
]


def test_a_summary_by_hand(tmp_path: Path) -> None:
    summary = summarize(PROBLEMS, reversed(RECORDS), samples=4, ks=[4, 1])
    values = {name: interval.value for name, interval in summary.overall.metrics.items()}
    assert values == pytest.approx(
        {
            "avg@4": (0.5 + 0 + 0.75) / 3,
            "score": (2.5 / 4 + 0 + 0.75) / 3,
            "pass@1": (0.5 + 0 + 0.75) / 3,
            "pass@4": 2 / 3,
            "maj@1": (0.5 + 0 + 0.75) / 3,
            "maj@4": 1 / 3,  # p: y has two votes, x and z one each
        }
    )
    merged = [{**record, "answer": "x" if record["score"] == 1 else record["answer"]} for record in RECORDS]
    merged_maj = summarize(PROBLEMS, merged, samples=4, ks=[4]).overall.metrics["maj@4"].value
    assert merged_maj == pytest.approx((0.5 + 0 + 1) / 3)  # p: right and y tie
    assert summary.topics["a"].problems == 2
    assert summary.topics["a"].metrics["avg@4"].value == 0.25
    assert summary.levels["1"].metrics["avg@4"].value == 0.625
    assert list(summary.clusters) == [("a", "1"), ("a", "2"), ("b", "1")]
    assert summary.clusters["b", "1"].metrics["avg@4"] == (0.75, None, None)
    assert summary.finish == {"stop": 12}
    assert summary.without_answer == 2
    low, high = summary.overall.metrics["avg@4"][1:]
    assert (low, high) == bootstrap(np.array([[0.5], [0.0], [0.75]]))[0][1:]
    written = write_results(tmp_path / "results.json", summary, {"seed": 1}, task="t")
    assert json.loads((tmp_path / "results.json").read_text()) == written
    assert written["clusters"]["a/2"]["metrics"]["pass@4"] == {"value": 0.0, "low": None, "high": None}
    assert written["task"] == "t"


def test_fewer_samples_than_drawn_count_in_order() -> None:
    summary = summarize(PROBLEMS, RECORDS, samples=2)
    assert list(summary.overall.metrics) == ["avg@2", "score", "pass@1", "pass@2", "maj@1", "maj@2"]
    assert summary.overall.metrics["avg@2"].value == pytest.approx((0.5 + 0 + 1) / 3)
    assert default_ks(12) == [1, 2, 4, 8, 12]
    assert default_ks(1) == [1]


def test_a_paired_difference_is_narrower_than_two_intervals() -> None:
    rng = np.random.default_rng(0)
    problems = [Problem(str(i), "p") for i in range(80)]
    hardness = rng.random(80)
    mine, theirs = (
        [sample(str(i), n, float(rng.random() < p), "x") for i, p in enumerate(hardness - shift) for n in range(16)]
        for shift in (0.0, 0.05)
    )
    difference = paired_differences(problems, mine, theirs, samples=16, ks=[1])["avg@16"]
    parts = [summarize(problems, records, samples=16, ks=[1]).overall.metrics["avg@16"] for records in (mine, theirs)]
    assert difference.value == pytest.approx(parts[0].value - parts[1].value)
    assert difference.low is not None
    assert difference.high is not None
    assert difference.high - difference.low < 0.6 * (parts[0].high - parts[0].low)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 5}, "3 of 3 problems have fewer than 5 samples, 'p'"),
        ({"samples": 4, "ks": [5]}, r"ks=\[5\]"),
        ({"samples": 4, "ks": [0, 1]}, r"ks=\[0, 1\]"),
        ({"samples": 4, "ks": []}, r"ks=\[\]"),
    ],
)
def test_summaries_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        summarize(PROBLEMS, RECORDS, **options)
    with pytest.raises(ValueError, match="empty"):
        summarize([], [], samples=1)
