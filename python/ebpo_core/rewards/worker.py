"""A worker process: reads jobs as lines of JSON, compares two answers by Math-Verify, and replies in lines of JSON.

Nothing here protects the caller: it is the caller who kills a worker that takes too long (see ``pool``). This side
limits its memory, dies by itself where the caller has vanished, and proves that it works before it says that it is
ready.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
from typing import Any

_SELF_TEST = (r"\frac{1}{2}+\frac{1}{3}", r"\frac{5}{6}")
_GRACE_SECONDS = 5


def judge(job: dict[str, Any]) -> dict[str, Any]:
    """The reply to one job: whether its "answer" is its "reference" under its "preset" ("strict" by default).

    A job without an "answer" asks whether its "reference" can be scored at all, which is whether it can be read and
    equals itself (``1/0`` does not). What cannot be read is "unread".
    """
    from ebpo_core.rewards.comparison import equal
    from ebpo_core.rewards.numerals import UnreadableError
    from ebpo_core.rewards.presets import PRESETS

    reference, answer = job["reference"], job.get("answer")
    try:
        return {
            "equal": equal(reference, reference if answer is None else answer, PRESETS[job.get("preset", "strict")])
        }
    except UnreadableError as error:
        return {"equal": False, "unread": str(error)}


def main() -> None:
    """Serve until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who then closes the pool
    # Replies go to what is standard output now; whatever a library prints from here on goes to standard error.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.disable(logging.CRITICAL)

    def reply(content: dict[str, Any]) -> None:
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    options = json.loads(sys.stdin.readline())
    if not judge({"reference": _SELF_TEST[0], "answer": _SELF_TEST[1]})["equal"]:
        raise RuntimeError(f"Math-Verify does not find {_SELF_TEST[0]} equal to {_SELF_TEST[1]}")
    _limit_memory(options["memory_mb"])
    reply({"ready": True})
    alarm = getattr(signal, "alarm", lambda _: None)  # absent on Windows
    for line in sys.stdin:
        # SIGALRM's default action ends the process, even inside one long multiplication.
        alarm(math.ceil(options["timeout"]) + _GRACE_SECONDS)
        try:
            content = judge(json.loads(line))
        except Exception as error:  # whatever the library raises is about this answer, and is counted
            content = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        alarm(0)
        reply(content)


def _limit_memory(megabytes: int) -> None:
    """Let this process take ``megabytes`` more address space than it has now (Linux), and dump no core."""
    try:
        import resource
        from pathlib import Path

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    wanted = pages * resource.getpagesize() + megabytes * 2**20
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most))
