"""The file that keeps finished work: killed writers, cut lines, other settings, foreign files, two writers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpo_core.evaluation.journal import Journal, read_journal

SETTINGS = {"model": "m", "sampling": {"temperature": 0.7, "sizes": (1, 2)}}


def journal(path: Path, **settings: object) -> Journal:
    return Journal(path, "things", {**SETTINGS, **settings}, ("name", "number"))


def record(name: str, number: int) -> dict[str, object]:
    return {"name": name, "number": number, "text": "héllo\n\u2028 “x”"}


def test_records_come_back_in_order_and_the_file_is_plain_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.jsonl"
    with journal(path) as first:
        first.append([record("b", 1), record("a", 1)])
        first.append([])
        first.append([record("b", 2)])
    with journal(path) as again:
        assert list(again.records) == [("b", 1), ("a", 1), ("b", 2)]
        assert again.records["a", 1] == record("a", 1)
        assert ("b", 2) in again
        assert ("b", 3) not in again
    header, *rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    assert header["format"] == "ebpo-core/things"
    assert rows[0] == record("b", 1)
    assert read_journal(path, "things") == (header["settings"], rows)


@given(cut=st.integers(0, 400))
def test_any_cut_leaves_the_whole_records_before_it(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    with journal(path) as first:
        first.append([record("a", number) for number in range(3)])
    content = path.read_bytes()
    cut = min(cut, len(content))
    path.write_bytes(content[:cut])
    whole = max(0, content[:cut].count(b"\n") - 1)
    with journal(path) as again:
        assert list(again.records) == [("a", number) for number in range(whole)]
        again.append([record("a", number) for number in range(whole, 3)])
    assert path.read_bytes() == content


WRITER = """
import sys
from ebpo_core.evaluation.journal import Journal
with Journal(sys.argv[1], "things", {}, ("number",)) as journal:
    print(len(journal.records), flush=True)
    number = len(journal.records)
    while True:
        journal.append([{"number": number, "text": "x" * 5000}])
        number += 1
        if number % 20 == 0:
            print("more", flush=True)
"""


def test_sigkill_loses_nothing_that_was_appended(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        assert writer.stdout.readline()
        assert writer.stdout.readline() == "more\n"
        os.kill(writer.pid, signal.SIGKILL)
        writer.stdout.read()
        writer.stdout.close()
        writer.wait()
        with Journal(path, "things", {}, ("number",)) as found:
            assert list(found.records) == [(number,) for number in range(len(found.records))]
    assert len(found.records) >= 20


def test_other_settings_are_named_with_both_values(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    journal(path).close()
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"model is 'm' in the file and 'other' now.*another file"):
        journal(path, model="other")
    with pytest.raises(ValueError, match="seed is None in the file and 3 now"):
        journal(path, seed=3)
    assert path.read_bytes() == before
    journal(path).close()


def test_a_damaged_line_in_the_middle_is_not_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with journal(path) as first:
        first.append([record("a", 1), record("a", 2)])
    lines = path.read_text().split("\n")
    for line, message in ((lines[1][:-4], "line 2 is not JSON"), ("[]", "line 2 is not an object")):
        path.write_text("\n".join([lines[0], line, *lines[2:]]))
        with pytest.raises(ValueError, match=message):
            journal(path)
    path.write_text("\n".join([lines[0], lines[1], lines[1], ""]))
    with pytest.raises(ValueError, match="line 3.*was there before"):
        journal(path)
    path.write_text("\n".join([lines[0], '{"name": "a"}', ""]))
    with pytest.raises(ValueError, match="line 2.*number"):
        journal(path)


@pytest.mark.parametrize("content", ["hello", "hello\n", "[]\n", '{"step": 1}\n', '{"format": "ebpo-core/others"}\n'])
def test_a_foreign_file_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"a\.jsonl"):
        journal(path)
    assert path.read_text() == content


def test_a_newer_version_is_not_guessed_at(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    journal(path).close()
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match="version 2"):
        journal(path)


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with journal(path):
        code = f"from ebpo_core.evaluation.journal import Journal; Journal({str(path)!r}, 'things', {{}}, ('number',))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "being written by another process" in done.stderr
    journal(path).close()


def test_a_record_is_appended_once(tmp_path: Path) -> None:
    with journal(tmp_path / "a.jsonl") as first:
        first.append([record("a", 1)])
        with pytest.raises(ValueError, match="append it once"):
            first.append([record("a", 2), record("a", 1)])
        with pytest.raises(ValueError, match="the same record twice"):
            first.append([record("a", 2), record("a", 2)])
        with pytest.raises(ValueError, match="JSON"):
            first.append([{"name": "a", "number": 2, "score": float("nan")}])
        assert list(first.records) == [("a", 1)]
    assert (tmp_path / "a.jsonl").read_text().count("\n") == 2


def test_reading_a_running_file_does_not_repair_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with journal(path) as first:
        first.append([record("a", 1)])
    path.write_text(path.read_text() + '{"name": "a", "nu')
    before = path.read_bytes()
    assert [row["number"] for row in read_journal(path, "things")[1]] == [1]
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="does not hold"):
        read_journal(path, "others")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_journal(tmp_path / "none.jsonl", "things")
