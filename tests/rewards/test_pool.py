"""The worker processes: hostile answers, limits on time and memory, killed workers, threads, forks, broken pools."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("math_verify")

from ebpo_core.rewards import MathVerifier, VerifierPoolError
from ebpo_core.rewards.pool import WorkerPool

if TYPE_CHECKING:
    from collections.abc import Iterator

posix = pytest.mark.skipif(os.name != "posix", reason="signals and forks of POSIX")

# One of these takes minutes inside a single multiplication, where no Python signal handler gets a turn.
SLOW = "9999999!"


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    with MathVerifier(workers=2, timeout=6) as verifier:
        yield verifier


def boxed(*answers: str) -> list[str]:
    return [f"So it is \\boxed{{{answer}}}." for answer in answers]


def counted(verifier: MathVerifier, before: dict[str, float]) -> dict[str, float]:
    after = verifier.metrics
    return {name.removeprefix("verifier/"): after[name] - before[name] for name in after if after[name] != before[name]}


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        (
            "42",
            ["6 \\cdot 7", "\\sqrt{1764}", "x=42", "43-1"],
            ["42 or 41", "41,42", "42+C", "n", "42x", "(42,42)", "?"],
        ),
        ("42", ["21+21=42", "42 apples"], ["42\\text{ million}", "42\\text{ or more}", "\\pm 42", "42!"]),
        ("x^2+1", ["1+x^2", "(x+1)^2-2x"], ["x^2-1", "y^2+1", "x^2+1.1"]),
        ("\\frac43\\pi", ["\\frac{4\\pi}{3}", "\\pi\\cdot\\frac{4}{3}"], ["\\frac{3\\pi}{4}", "4.18"]),
        ("\\sqrt2", ["\\sqrt{2}", "2^{1/2}"], ["2", "1.41"]),
        ("(-\\infty, 3]", ["\\left(-\\infty,3\\right]"], ["(-\\infty,3)", "[3,\\infty)"]),
        ("1,2,3", ["3, 2, 1"], ["1,2", "1,2,4"]),
        ("5\\frac{1}{2}", ["\\frac{11}{2}", "5.5"], ["\\frac{5}{2}"]),
        ("2^{2024}-1", ["-1+2^{2024}"], ["2^{2024}+1", "2^{2023}"]),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", ["\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"], ["(1,2,3)"]),
        ("\\frac{x}{2}\\text{ cm}", ["0.5x", "x/2\\text{ cm}"], ["x/2\\text{ m}"]),
    ],
)
def test_expressions(verifier: MathVerifier, reference: str, right: list[str], wrong: list[str]) -> None:
    answers = right + wrong
    scores = verifier.score(boxed(*answers), [reference] * len(answers))
    assert dict(zip(answers, scores, strict=True)) == {**dict.fromkeys(right, 1.0), **dict.fromkeys(wrong, 0.0)}


def test_hostile_answers_score_nothing_are_counted_and_harm_no_other(verifier: MathVerifier, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    code = f"__import__('os').system('touch {mark}')"
    refused = [
        "9**9**9**9",
        "9^{9^{9^{9}}}",
        code,
        "x" * 1_000_000,
        "9" * 5000,  # beyond Python's limit for integers in text
        "(" * 50_000 + "1" + ")" * 50_000,
        "{" * 200 + "1" + "}" * 200,
        "^{" * 50 + "9" + "}" * 50,
        "4\x002",
        "4\ud8002",
        "1e999999999",
        "2^{-99999999}",
        "\\sqrt" * 400 + "2",
        "4\u202e2",
    ]
    # Read, but not evaluated: neither is there a name that would do anything.
    # Letters of other alphabets that look like ours are other letters; digits of theirs are no digits.
    look_alikes = [
        "4\N{CYRILLIC SMALL LETTER O}2",
        "\N{ARABIC-INDIC DIGIT FOUR}\N{ARABIC-INDIC DIGIT TWO}",
        "x\N{CYRILLIC SMALL LETTER HA}",
    ]
    nested = [
        "\\frac1" * 60 + "2",
        "\\pm" * 40 + "42",
        ",".join("1" * 200),
        "42" + "'" * 200,
        "\\text{" * 12 + "42" + "}" * 12,
    ]
    harmless = [f"touch(\\text{{{mark}}})", "eval(1)", "\\operatorname{exit}(0)", "\\input{/etc/passwd}", "lambda: 42"]
    hostile = [*refused, SLOW, *look_alikes, *nested[:4], *harmless]
    # A right answer between any two, of which every other needs a worker.
    completions = [
        text
        for pair in zip(boxed(*hostile), boxed(*(["42", "6\\cdot 7"] * 20)[: len(hostile)]), strict=True)
        for text in pair
    ]
    before = verifier.metrics
    assert verifier.score(completions, ["42"] * len(completions)) == [0.0, 1.0] * len(hostile)
    counts = counted(verifier, before)
    assert counts["refused"] == len(refused)
    assert counts["timeouts"] == counts["restarts"] == 1
    assert counts["answers"] == len(completions)
    assert not mark.exists()


def test_a_million_characters_around_an_answer_change_nothing(verifier: MathVerifier) -> None:
    noise = ["answer " * 150_000, "\\boxed" * 150_000, "#### 1\n" * 150_000, "{" * 1_000_000, " " * 1_000_000]
    assert verifier.score([text + "\\boxed{42}" for text in noise], ["42"] * 5) == [1.0] * 5


def test_references_that_cannot_be_scored_are_nan_for_every_answer(verifier: MathVerifier) -> None:
    unreadable = ["", "   ", "@@@", "\\frac{", "1/0", "9^{9^{9^{9}}}", "4\x002", None]
    before = verifier.metrics
    for answer in ("@@@", "42", "1/0", SLOW):
        assert all(math.isnan(score) for score in verifier.score(boxed(answer) * 8, unreadable))
    assert all(math.isnan(score) for score in verifier.score(["no answer"] * 8, unreadable))
    assert counted(verifier, before) == {"unscorable": 40, "answers": 40}
    good = ["42", 42, "x+1", "no solution", "\\frac12", "so \\boxed{x}"]
    assert verifier.scorable([*unreadable, *good]) == [False] * 8 + [True] * 6


def test_from_other_threads(verifier: MathVerifier) -> None:
    before = verifier.metrics
    with ThreadPoolExecutor(6) as threads:
        tasks = [threads.submit(verifier.score, boxed(f"{n}+x", f"x+{n + 1}"), [f"x+{n}"] * 2) for n in range(30)]
        assert [task.result() for task in tasks] == [[1.0, 0.0]] * 30
    assert counted(verifier, before) == {"math_verify": 60, "answers": 60}
    assert len(verifier.pool.pids) <= 2


@posix
def test_a_worker_killed_in_mid_work_is_replaced_and_no_score_is_lost(verifier: MathVerifier) -> None:
    assert verifier.score(boxed("3+x", "3+x"), ["x+3", "x+3"]) == [1.0, 1.0]
    before = verifier.metrics
    stopped = verifier.pool.pids
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)  # each takes a job and is then in the middle of it
    results: list[list[float]] = []
    answers = [f"{n}+x" for n in range(6)]
    task = threading.Thread(target=lambda: results.append(verifier.score(boxed(*answers), ["x+3"] * 6)))
    task.start()
    while verifier.pool._idle.qsize():
        time.sleep(0.01)
    for pid in stopped:
        os.kill(pid, signal.SIGKILL)
    task.join()
    assert results == [[0.0, 0.0, 0.0, 1.0, 0.0, 0.0]]
    assert counted(verifier, before) == {"math_verify": 6, "answers": 6, "restarts": len(stopped)}
    assert not set(stopped) & set(verifier.pool.pids)


@posix
def test_workers_killed_while_idle_are_replaced(verifier: MathVerifier) -> None:
    verifier.score(boxed("1+x"), ["x+1"])
    before = verifier.metrics
    for pid in verifier.pool.pids:
        os.kill(pid, signal.SIGKILL)
    assert verifier.score(boxed("1+x", "2+x"), ["x+1", "x+1"]) == [1.0, 0.0]
    assert counted(verifier, before)["math_verify"] == 2


@posix
def test_an_answer_that_two_workers_die_of_is_an_error() -> None:
    pool = WorkerPool(workers=1, timeout=60, memory_mb=512)
    # Workers believe in a limit after which their caller must have vanished, and end themselves.
    pool.options = {**pool.options, "timeout": -4.0}
    try:
        slow, quick = pool.run([{"reference": "x+42", "answer": SLOW}, {"reference": "x+1", "answer": "1+x"}])
    finally:
        pool.close()
    assert slow.equal is None
    assert slow.failure == "error"
    assert "died" in slow.reason
    assert quick.equal is True
    assert pool.restarts == 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_memory_is_limited(verifier: MathVerifier) -> None:
    verifier.score(boxed("1+x"), ["x+1"])
    for pid in verifier.pool.pids:
        (line,) = [line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if "address space" in line]
        assert 2**30 < int(line.split()[3]) < 2**36
    code = "from ebpo_core.rewards.worker import _limit_memory; _limit_memory(64); bytearray(2**20); bytearray(2**28)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "MemoryError" in done.stderr


def test_a_pool_whose_workers_do_not_start_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text("raise RuntimeError('this library is broken')")
    with MathVerifier(workers=2) as verifier:
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        with pytest.raises(VerifierPoolError, match="this library is broken"):
            verifier.score(boxed("42", "1+x"), ["42", "x+1"])
        monkeypatch.undo()
        monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
        with pytest.raises(VerifierPoolError, match="no-python"):
            verifier.score(boxed("1+x"), ["x+1"])
        assert verifier.metrics["verifier/answers"] == 0
        assert verifier.score(boxed("42"), ["42"]) == [1.0], "numbers need no worker"
        monkeypatch.undo()
        assert verifier.score(boxed("1+x"), ["x+1"]) == [1.0], "it works as soon as it can"


def test_a_closed_verifier_raises() -> None:
    verifier = MathVerifier(workers=1)
    verifier.close()
    verifier.close()
    with pytest.raises(VerifierPoolError, match="closed"):
        verifier.score(boxed("1+x"), ["x+1"])


def test_a_copy_has_the_options_and_its_own_processes(verifier: MathVerifier) -> None:
    verifier.score(boxed("1+x"), ["x+1"])
    with pickle.loads(pickle.dumps(verifier)) as copy:
        assert (copy.pool.workers, copy.pool.timeout) == (2, 6)
        assert copy.metrics["verifier/answers"] == 0
        assert copy.score(boxed("1+x"), ["x+1"]) == [1.0]
        assert not set(copy.pool.pids) & set(verifier.pool.pids)
    assert verifier.score(boxed("1+x"), ["x+1"]) == [1.0]


SCRIPT = """
import json, os, sys
from ebpo_core.rewards import MathVerifier

# No guard around this, as in many training scripts.
verifier = MathVerifier(workers=1)
assert verifier.score(["\\\\boxed{1+x}"], ["x+1"]) == [1.0]
"""


@posix
def test_after_a_fork_parent_and_child_work_with_their_own(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        SCRIPT
        + """
ours = verifier.pool.pids
child = os.fork()
assert verifier.score(["\\\\boxed{1+x}", "\\\\boxed{x}"], ["x+1", "x+1"]) == [1.0, 0.0]
assert (verifier.pool.pids == ours) is (child > 0)
print(json.dumps(verifier.pool.pids), flush=True)
if child:
    assert os.waitpid(child, 0)[1] == 0
    assert verifier.score(["\\\\boxed{1+x}"], ["x+1"]) == [1.0]
    assert verifier.pool.pids == ours
"""
    )
    # Newer Pythons warn of any fork beside threads.
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    pids = [pid for line in done.stdout.splitlines() for pid in json.loads(line)]
    assert len(set(pids)) == 2
    assert not [pid for pid in pids if runs(pid)], "every process ended with its program"


@posix
def test_workers_end_with_a_caller_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT + "print(verifier.pool.pids[0], flush=True); os.kill(os.getpid(), 9)")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    while runs(int(done.stdout)):  # pytest-timeout ends this where it does not end by itself
        time.sleep(0.05)


def runs(pid: int) -> bool:
    """Whether a process lives; one that has ended and that nobody has asked about yet does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
