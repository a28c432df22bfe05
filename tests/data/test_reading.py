"""Files, folders and hub ids; repeated rows; rows for TRL; verl's Parquet."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("datasets")

import datasets
import pyarrow.parquet as pq

from ebpo_core.data import BOXED, Problem, read, to_rows, write_verl_parquet
from ebpo_core.evaluation.problems import from_rows as load

if TYPE_CHECKING:
    from pathlib import Path

MATH = [
    {
        "problem": f"What is ${n} + {n}$?",
        "solution": f"$\\boxed{{{2 * n}}}$",
        "answer": str(2 * n),
        "subject": "Algebra",
        "level": n,
        "unique_id": f"test/{n}",
    }
    for n in (1, 2, 3)
]


def dapo(index: str, answer: str, question: str) -> dict[str, Any]:
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": f'{question}\n\nRemember to put your answer after "Answer:".', "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def test_one_set_in_every_container_gives_the_same_problems(tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text("\n".join(json.dumps(row) for row in MATH) + "\n\n", encoding="utf-8")
    (tmp_path / "set.json").write_text(json.dumps(MATH), encoding="utf-8")
    data = datasets.Dataset.from_list(MATH)
    data.to_parquet(tmp_path / "set.parquet")
    data.save_to_disk(tmp_path / "saved" / "set")
    datasets.DatasetDict({"test": data}).save_to_disk(tmp_path / "splits" / "set")
    (tmp_path / "repository" / "set" / "data").mkdir(parents=True)
    data.to_parquet(tmp_path / "repository" / "set" / "data" / "test-00000-of-00001.parquet")
    expected = [
        Problem(f"test/{n}", f"What is ${n} + {n}$?\n\n{BOXED}", str(2 * n), "Algebra", str(n), "set")
        for n in (1, 2, 3)
    ]
    for name in ("set.jsonl", "set.json", "set.parquet", "saved/set", "splits/set", "repository/set"):
        assert read(tmp_path / name) == expected, name
        assert read(str(tmp_path / name)) == expected, name


def test_one_of_several_splits_has_to_be_named(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(MATH)
    datasets.DatasetDict({"train": data.select([0]), "test": data.select([1, 2])}).save_to_disk(tmp_path / "set")
    for split in (None, "validation"):
        with pytest.raises(ValueError, match=r"name one of \['train', 'test'\]"):
            read(tmp_path / "set", split=split)
    assert [problem.id for problem in read(tmp_path / "set", split="test")] == ["test/2", "test/3"]


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    empty, wrong = tmp_path / "empty.jsonl", tmp_path / "list.jsonl"
    empty.write_text("\n")
    wrong.write_text("[1]\n")
    (tmp_path / "one.json").write_text("{}")
    (tmp_path / "data.csv").write_text("problem,answer\n")
    (tmp_path / "data.txt").write_text("problem,answer\n")
    for name, message in (
        (empty, "no rows"),
        (wrong, "line 1: expected an object, found a list"),
        (tmp_path / "one.json", "holds a list"),
        (tmp_path / "data.csv", "no rows"),
        (tmp_path / "data.txt", r"\.jsonl"),
        (tmp_path / "none", "no such file"),
        ("none.parquet", "no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            read(name)
    with pytest.raises(ValueError, match="has no splits"):
        read(empty, split="train")


def test_a_hub_id_goes_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline in the tests: the real code path, up to the request that the library refuses to make."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="nor a data set that the hub gave us"):
        read("some-owner/some-set-that-is-not-there", split="train")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_repeated_rows_are_read_once_and_contradictions_not_at_all(tmp_path: Path, suffix: str) -> None:
    unique = [dapo(f"id-{n}", str(n), f"Name the number {n}.") for n in range(5)]
    rows = unique * 100 + [dapo("id-9", "7", "Name the number 3.")]
    path = tmp_path / f"dapo.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    contradiction = "1 prompts left out, which occur with different answers.*number 3"
    with (
        pytest.warns(UserWarning, match=contradiction),
        pytest.warns(UserWarning, match=r"dapo: 396 of 400 rows left out.*each of the 4 prompts.*keep_duplicates=True"),
    ):
        problems = read(path)
    whole = [(f"id-{n}", str(n)) for n in (0, 1, 2, 4)]
    assert [(problem.id, problem.answer) for problem in problems] == whole
    with pytest.warns(UserWarning, match=contradiction):  # and no other warning: nothing else is left out
        problems = read(path, keep_duplicates=True)
    assert [(problem.id.partition("#")[0], problem.answer) for problem in problems] == whole * 100
    assert [problem.id for problem in problems[:8]] == [f"id-{n}" for n in (0, 1, 2, 4)] + [
        f"id-{n}#2" for n in (0, 1, 2, 4)
    ]
    assert len(load(to_rows(problems, conversational=False))) == 400  # ids are unique, which everything after asks for


def test_rows_without_ids_that_are_kept_are_numbered(tmp_path: Path) -> None:
    rows = [dapo("", str(n), f"Name the number {n}.") for n in (1, 2, 1)] + [dapo("id", "3", "Name the number 3.")]
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = read(path, keep_duplicates=True)
    assert [(problem.id, problem.answer) for problem in kept] == [
        ("set/0", "1"),
        ("set/1", "2"),
        ("set/2", "1"),
        ("id", "3"),
    ]
    one_id = [dapo("same", str(n), f"Name the number {n}.") for n in (1, 2, 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in one_id))
    assert [problem.id for problem in read(path, keep_duplicates=True)] == ["set/0", "set/1", "set/2"]


def test_what_is_written_for_verl_twice_is_read_back_twice(tmp_path: Path) -> None:
    path = write_verl_parquet([*PROBLEMS, PROBLEMS[0]], tmp_path / "train.parquet")
    assert read(path, keep_duplicates=True) == [*PROBLEMS, replace(PROBLEMS[0], id="a#2")]
    with pytest.warns(UserWarning, match="1 of 3 rows left out"):
        assert read(path) == PROBLEMS


def test_repeated_questions_of_other_sets_are_kept(tmp_path: Path) -> None:
    """A benchmark has as many problems as it has rows; ids that do not tell them apart are replaced."""
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (MATH[0], MATH[0], MATH[1])))
    assert [problem.id for problem in read(path)] == ["set/0", "set/1", "set/2"]


PROBLEMS = [
    Problem("a", "What is 1 + 1?", "2", "add", "1", "mine"),
    Problem("b", "What is $\\frac{1}{2}$ of 1?", "\\frac{1}{2}", None, None, "mine"),
]


def test_rows_for_trl() -> None:
    rows = to_rows(PROBLEMS)
    assert rows[0] == {
        "prompt": [{"role": "user", "content": "What is 1 + 1?"}],
        "answer": "2",
        "topic": "add",
        "level": "1",
        "id": "a",
        "source": "mine",
    }
    assert to_rows(PROBLEMS, conversational=False)[1]["prompt"] == "What is $\\frac{1}{2}$ of 1?"
    assert to_rows(PROBLEMS, system="Be brief.")[0]["prompt"][0] == {"role": "system", "content": "Be brief."}
    with pytest.raises(ValueError, match="system"):
        to_rows(PROBLEMS, conversational=False, system="Be brief.")
    assert datasets.Dataset.from_list(rows).to_list() == rows


def test_verl_parquet_has_its_schema_and_reads_back(tmp_path: Path) -> None:
    path = write_verl_parquet(PROBLEMS, tmp_path / "new" / "train.parquet", split="validation")
    assert list(datasets.load_dataset("parquet", data_files=str(path))["train"])[1] == {
        "data_source": "mine",
        "prompt": [{"role": "user", "content": "What is $\\frac{1}{2}$ of 1?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "\\frac{1}{2}"},
        "extra_info": {"index": 1, "split": "validation", "id": "b", "topic": None, "level": None},
    }
    assert read(path) == PROBLEMS
    # Whatever the labels, files can be given to verl together, which concatenates them.
    other = write_verl_parquet(PROBLEMS[1:], tmp_path / "other.parquet", system="Be brief.")
    assert pq.read_schema(other) == pq.read_schema(path)
    assert pq.read_table(other)["prompt"][0].as_py()[0] == {"role": "system", "content": "Be brief."}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["new", "other.parquet"]


def test_verl_parquet_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.parquet"):
        write_verl_parquet(PROBLEMS, tmp_path / "train.jsonl")
    with pytest.raises(ValueError, match="none to write"):
        write_verl_parquet([], tmp_path / "train.parquet")
    path = write_verl_parquet(PROBLEMS, tmp_path / "train.parquet")
    with pytest.raises(TypeError):
        write_verl_parquet([Problem("c", "What?", object(), None, None, "mine")], path)  # type: ignore[arg-type]
    assert read(path) == PROBLEMS
    assert [file.name for file in tmp_path.iterdir()] == ["train.parquet"]


def test_importing_costs_no_framework() -> None:
    heavy = "torch transformers trl datasets pyarrow pandas sympy math_verify latex2sympy2_extended"
    code = f"import sys, ebpo_core.data, ebpo_core.rewards; print([m for m in {heavy.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
