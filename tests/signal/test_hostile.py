"""Files that no reader should meet: each is answered by a status and one line, never by a traceback, NaN or a guess."""

from __future__ import annotations

import gzip
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rollout_files import healthy, rows_of, write_lines

from ebpo_core.cli import main
from ebpo_core.signal import diagnose, read_rollouts
from ebpo_core.signal.cells import read_rewards

BIG = "9" * 400
TOO_DEEP = "[" * 100_000
HEADER = '{"format": "ebpo-core/samples", "version": 1, "settings": {}}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", gzip.compress(b"{}", mtime=0), "x.jsonl: it is compressed by gzip: unpack it first"),
        ("x.jsonl", '{"group": 1}'.encode("utf-16"), "x.jsonl: expected text in UTF-8"),
        ("x.jsonl", '{"group": "é"}'.encode("latin-1"), "x.jsonl: expected text in UTF-8"),
        ("x.json", '[{"group": "é"}]'.encode("latin-1"), "x.json: expected text in UTF-8"),
        ("x.csv", '"é",reward'.encode("latin-1"), "x.csv: expected text in UTF-8"),
        ("x.jsonl", f'{{"group": {TOO_DEEP}', "x.jsonl, line 1: not JSON Lines (maximum recursion depth"),
        ("x.json", f'{{"group": {TOO_DEEP}', "x.json: nested too deeply"),
        ("x.jsonl", f'{{"group": 1, "reward": {BIG}}}', "rewards are finite"),
        ("x.jsonl", '{"group": 1, "reward": [1.7e308, 1.7e308]}', "rewards are finite"),
        ("x.jsonl", '{"group": 1, "reward": 1e141}', "row 1, reward=1e+141: its magnitude must be at most 1e+140"),
        ("x.jsonl", '{"group": NaN, "reward": 1}', "row 1, group=nan: each row needs its group"),
        ("x.jsonl", '{"group": 1, "reward": 1, "step": 1.5}', "whole numbers of at most 64 bits, and row 1 has 1.5"),
        ("x.jsonl", '{"group": 1, "reward": 1, "step": Infinity}', "row 1 has inf"),
        ("x.jsonl", f'{{"group": 1, "reward": 1, "step": {2**63}}}', f"row 1 has {2**63}"),
        ("x.csv", "group,reward\n1,1,1\n", "x.csv, line 2: more fields than the header has names"),
        ("x.csv", "group,reward\n1," + "1" * 200_000, "not CSV (field larger than field limit"),
        ("x.parquet", b"", "x.parquet: pyarrow cannot read it as Parquet"),
        ("x.parquet", b"PAR1 and more PAR1", "x.parquet: pyarrow cannot read it as Parquet"),
        (
            "samples.jsonl",
            HEADER.replace('"settings": {}', '"by": 1') + "{}\n",
            "is damaged: its lines are not all rec",
        ),
        ("samples.jsonl", HEADER + "1\n", "is damaged: its lines are not all records"),
        ("samples.jsonl", HEADER + '{"problem": 1, "score": 1}\nnull\n', "is damaged: its lines are not all records"),
        ("samples.jsonl", HEADER + TOO_DEEP + "\n", "is damaged or empty (maximum recursion depth"),
        ("samples.jsonl", HEADER.replace("1", "9") + "{}\n", "has version 9, this ebpo_core reads 1"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: str | bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["signal", str(path), "--json"]) == 1
    assert message in capsys.readouterr().err


def test_a_list_within_lists_without_end_is_no_reward() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(ValueError, match=r"^row 1, reward=\[+\.\.\.\]+: expected a number"):
        read_rewards([{"reward": nested}], "reward")


@pytest.mark.parametrize(
    ("rows", "status", "message"),
    [
        # Rows without the columns by which the file is recognised
        (
            [{"step": 1, "prompt": "p", "completion": "c", "advantage": 0.0, "r": 1}, {"step": 1, "r": 1}],
            1,
            "row 2, prompt=None: each row needs its group",
        ),
        (
            [{"input": "p", "output": "c", "score": 1, "step": 1, "uid": "u_0_0"}, {"input": "p", "uid": "u_0_1"}],
            1,
            "and row 2 has None",
        ),
        # The first row is no better than the others: a reward that it lacks is a missing one
        ([{"group": 0}, *rows_of([[0, 1, 1]] * 40)], 0, ""),
    ],
)
def test_rows_may_lack_columns(
    tmp_path: Path, rows: list[dict[str, Any]], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["signal", str(write_lines(tmp_path / "x.jsonl", rows)), "--json", "--resamples", "5"]) == status
    assert message in capsys.readouterr().err


def test_missing_prompts_are_one_prompt(tmp_path: Path) -> None:
    rows = [{"group": 1, "reward": 1, "prompt": math.nan}, {"group": 1, "reward": 0, "prompt": None}]
    prompts = read_rollouts(write_lines(tmp_path / "x.jsonl", rows)).prompts
    assert prompts is not None
    assert prompts.tolist() == [0, 0]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path, suffix: str) -> None:
    text = {".jsonl": '{"group": 1, "reward": 1}', ".json": '[{"group": 1, "reward": 1}]', ".csv": "group,reward\n1,1"}
    path = tmp_path / f"x{suffix}"
    path.write_text(text[suffix], encoding="utf-8-sig")
    assert read_rollouts(path).group_column == "group"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "-1"], "seed=-1: expected at least 0"),
        (["--resamples", str(10**9)], "expected a number from 1 to 100000"),
        (["--reward", "reward", "--weight", "nan"], "weights=[nan]: expected finite numbers"),
        (["--reward", "reward", "--weight", "1e200"], "weights=[1e+200]: expected finite numbers"),
        (["--reward", "big", "--weight", "1e90"], "row 1: its rewards add up to"),
        (["--reward", "reward", "--reward", "reward"], "a column is named twice"),
        (["--group", ""], "group='': "),
        (["--step", ""], "step='': "),
        (["--step", "reward"], "column 'reward': steps are whole numbers"),
    ],
)
def test_an_option_without_sense_is_named(
    tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"group": n // 2, "reward": n / 4, "big": 1e100} for n in range(9)]
    assert main(["signal", str(write_lines(tmp_path / "x.jsonl", rows)), "--json", *flags]) == 1
    assert message in capsys.readouterr().err


def test_a_number_of_groups_or_steps_may_be_larger_than_an_integer_of_numpy(tmp_path: Path) -> None:
    without = read_rollouts(write_lines(tmp_path / "a.jsonl", healthy(groups_per_step=None)))
    assert without.in_steps_of(10**30).steps.tolist() == [0] * len(without.rewards)
    with_steps = read_rollouts(write_lines(tmp_path / "b.jsonl", healthy()))
    assert with_steps.last_steps(10**30).steps.tolist() == with_steps.steps.tolist()


def test_folders_and_pipes(tmp_path: Path) -> None:
    write_lines(tmp_path / "1².jsonl", rows_of([[0, 1]]))  # the last is a digit to Python, and no number
    write_lines(tmp_path / "1a.jsonl", rows_of([[1, 1]]))
    (tmp_path / "2.jsonl").mkdir()  # as Spark writes its parts into a folder x.parquet
    assert read_rollouts(tmp_path).rewards.tolist() == [1, 1, 0, 1]
    with pytest.raises(ValueError, match="'/dev/null' is a pipe or a device"):
        read_rollouts("/dev/null")


def test_a_source_is_named_as_it_is_written(tmp_path: Path) -> None:
    rows = [{"group": n // 2, "reward": n % 2 * (1 + 99 * (n > 3)), "source": f"s{n > 3}"} for n in range(8)]
    (fault,) = diagnose(read_rollouts(write_lines(tmp_path / "x.jsonl", rows))).warnings
    assert "rewards of source 'sTrue' range over 100, those of source 'sFalse'" in fault.message


@pytest.mark.parametrize("size", [1_200, 5_000])
def test_a_mixed_group_of_thousands_has_an_answer(tmp_path: Path, size: int) -> None:
    # The chance of its very sequence is below the smallest float.
    rows = [{"group": n % 2, "reward": n // 2 % 2} for n in range(2 * size)]
    shown = diagnose(read_rollouts(write_lines(tmp_path / "x.jsonl", rows)), resamples=5).to_dict()
    json.dumps(shown, allow_nan=False)
    (band,) = shown["prompts_by_difficulty"]
    assert band["informative"] > 0.4


@pytest.mark.parametrize("scale", [1e-140, 1e-80, 1.0, 1e80, 1e139])
def test_effective_groups_do_not_depend_on_the_scale(tmp_path: Path, scale: float) -> None:
    rows = rows_of([[0, scale], [scale, scale / 2], [0, 0]])
    assert diagnose(
        read_rollouts(write_lines(tmp_path / "x.jsonl", rows)), resamples=5
    ).step.effective == pytest.approx(1.25**2 / (1 + 1 / 16))


REWARDS = st.one_of(
    st.sampled_from([0, 1, 0.5, True, None, math.nan, 1e140, -1e140, 5e-324, -0.0, "1", [0, 1], [], [None]]),
    st.floats(width=32),
    st.sampled_from(["x", 10**400, [[1], "a"], {"a": 1}]),
)
NAMES = st.sampled_from([0, 1, "a", "é", "\ud800", None, math.nan, True, [1], {"role": "user"}, "", 1.5, 10**30, "1"])
STEPS = st.sampled_from([0, 1, 1.0, "2", None, -1, 2**62, 2**63, 1.5, math.inf])
COLUMNS = {
    **dict.fromkeys(("reward", "score", "advantage", "acc"), REWARDS),
    **dict.fromkeys(("group", "prompt", "uid", "input", "output", "completion", "problem", "data_source"), NAMES),
    **dict.fromkeys(("step", "global_step"), STEPS),
}
FORMS = [
    ("group", "reward"),
    ("group", "reward", "global_step", "prompt", "data_source"),
    ("step", "prompt", "completion", "advantage", "acc", "score"),
    ("input", "output", "score", "step", "uid"),
    ("input_prompt", "output_response", "score", "data_source"),
    ("problem", "score"),
]


@st.composite
def tables(draw: st.DrawFn) -> list[dict[str, Any]]:
    names = draw(st.sampled_from(FORMS))
    # A column holds few values, so that groups are groups and many files are read to the end.
    pools = {name: draw(st.lists(COLUMNS.get(name, NAMES), min_size=1, max_size=3)) for name in names}
    row = st.fixed_dictionaries({name: st.sampled_from(pool) for name, pool in pools.items()})
    rows = draw(st.lists(row, min_size=1, max_size=12))
    if draw(st.integers(0, 5)) == 0:
        rows[-1].pop(draw(st.sampled_from(names)))
    return rows


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=tables(), header=st.booleans(), last=st.booleans())
def test_any_table_is_answered(tmp_path_factory: Any, rows: Any, header: bool, last: bool) -> None:
    path = tmp_path_factory.mktemp("any", numbered=True) / "x.jsonl"
    path.write_text((HEADER if header else "") + "".join(json.dumps(row) + "\n" for row in rows))
    with warnings.catch_warnings(), np.errstate(all="raise", under="ignore"):
        warnings.simplefilter("error")
        try:
            report = diagnose((read_rollouts(path).last_steps(1)) if last else read_rollouts(path), resamples=3)
        except ValueError as error:
            assert str(error)  # noqa: PT017 -- any other error is the failure
        else:
            json.dumps(report.to_dict(), allow_nan=False)
