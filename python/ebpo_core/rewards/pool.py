"""Worker processes with a hard limit on the time of each job: who exceeds it is killed, and a new process takes its
place.

Workers are fresh interpreters, as with multiprocessing's "spawn", but started without the caller's ``__main__``: a
training script needs no ``if __name__ == "__main__"`` for it, and a daemonic process may have a pool too. They talk
JSON over pipes.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import IO, TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

_START_SECONDS = 120.0
_ATTEMPTS = 2
# One thread each; and what is an error to the caller's warning filter is no reason for a worker not to start.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from ebpo_core.rewards.worker import main; main()"
)


class VerifierPoolError(RuntimeError):
    """The pool cannot work: its processes do not start, or it was closed. No score is made up for what it was asked."""


class Outcome(NamedTuple):
    """The outcome of a job: ``equal``, or where it was not judged a ``failure`` ("timeout", "error") and a reason."""

    equal: bool | None
    failure: str = ""
    reason: str = ""


class _ExpiredError(Exception):
    """The worker was killed for taking too long."""


class _DiedError(Exception):
    """The worker ended by itself, or was killed by someone else."""


class _Worker:
    """One process. Used by one thread at a time."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed with the worker
        try:
            self.process = subprocess.Popen(  # noqa: S603  our own interpreter and our own code
                [sys.executable, "-c", _BOOTSTRAP, json.dumps([str(entry) for entry in sys.path])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                env={**os.environ, **_ENVIRONMENT},
            )
        except OSError as error:
            self.errors.close()
            raise VerifierPoolError(f"a verifier's process did not start: {sys.executable!r}: {error}") from error
        try:
            self.ask(options, _START_SECONDS)
        except (_ExpiredError, _DiedError) as error:
            self.kill()
            self.errors.seek(0)
            said = self.errors.read()[-2000:].decode(errors="replace").strip()
            self.errors.close()
            raise VerifierPoolError(
                f"a verifier's worker process did not start ({sys.executable}, exit code {self.process.returncode}, "
                f"{'no sign of life' if isinstance(error, _ExpiredError) else 'ended'} before it was ready). "
                f"It said: {said or 'nothing'}"
            ) from error

    def ask(self, job: dict[str, Any], seconds: float) -> dict[str, Any]:
        """One job's reply.

        Raises:
            _ExpiredError: No reply after ``seconds``; the process has been killed.
            _DiedError: The process has ended.
        """
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self.process.kill()

        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        line = b""
        try:
            assert self.process.stdin is not None  # noqa: S101  opened above
            assert self.process.stdout is not None  # noqa: S101
            # A worker that is gone shows here or in an empty reply.
            with contextlib.suppress(BrokenPipeError, OSError):
                self.process.stdin.write(json.dumps(job).encode() + b"\n")
                self.process.stdin.flush()
                line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if expired.is_set():
            # Also where the reply came at the very last moment: the process is gone.
            raise _ExpiredError
        if not line.endswith(b"\n"):
            raise _DiedError
        reply: dict[str, Any] = json.loads(line)
        return reply

    def kill(self) -> None:
        self.process.kill()
        self.forget()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        self.errors.close()

    def disown(self) -> None:
        """In a forked child, whose parent the process belongs to: close what we hold of it, and never wait for it."""
        self.forget()
        self.errors.close()
        self.process.returncode = 0  # else Popen complains, when collected, that it still runs

    def forget(self) -> None:
        """Close our ends of the pipes."""
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError, OSError):
                if stream is not None:
                    stream.close()


class WorkerPool:
    """Up to ``workers`` processes, started when there is work for them.

    Safe to use from several threads, of which none need be the main one, and after a fork (the child starts its own).

    Args:
        workers: Processes, 1 or more.
        timeout: Seconds of wall time a job may take in a worker that is ready.
        memory_mb: Memory that a worker may take beyond what its libraries need, on Linux.
    """

    def __init__(self, workers: int, timeout: float, memory_mb: int) -> None:
        self.workers = workers
        self.options = {"timeout": timeout, "memory_mb": memory_mb}
        self.timeout = timeout
        self._closed = False
        self._reset()

    def _reset(self) -> None:
        self.restarts = 0
        self._alive: set[_Worker] = set()
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _close_all, self._alive, os.getpid())

    def after_fork(self) -> None:
        """In the child: leave the parent's processes to it."""
        for worker in self._alive:
            worker.disown()
        self._finalizer.detach()
        self._reset()

    @property
    def pids(self) -> list[int]:
        """The processes that live now."""
        return sorted(worker.process.pid for worker in list(self._alive))

    def run(self, jobs: Sequence[dict[str, Any]]) -> list[Outcome]:
        """The outcome of every job, in order.

        A job whose worker dies is tried once more in a new one, so that an answer does not pay for someone else's
        SIGKILL. If that dies as well, the job's outcome is an error: the new process had proved that it worked.

        Raises:
            VerifierPoolError: A process cannot start, or the pool was closed.
        """
        if not jobs:
            return []
        with self._lock:
            if self._closed:
                raise VerifierPoolError("the verifier was closed; make a new one, or score inside its `with` block")
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="verifier")
            futures = [self._threads.submit(self._run, job) for job in jobs]
        try:
            return [future.result() for future in futures]
        except CancelledError as error:
            raise VerifierPoolError("the verifier was closed while it was scoring") from error
        finally:
            for future in futures:
                future.cancel()

    def _run(self, job: dict[str, Any]) -> Outcome:
        # As many threads as workers: one that finds no idle worker may start one.
        for _ in range(_ATTEMPTS):
            worker = self._take()
            try:
                reply = worker.ask(job, self.timeout)
            except _ExpiredError:
                self._drop(worker)
                return Outcome(None, "timeout", f"no verdict in {self.timeout} s")
            except _DiedError:
                self._drop(worker)
                continue
            self._idle.put(worker)
            if "error" in reply:
                return Outcome(None, "error", reply["error"])
            return Outcome(reply["equal"])
        return Outcome(
            None, "error", f"{_ATTEMPTS} worker processes died of it, the last with {worker.process.returncode}"
        )

    def _take(self) -> _Worker:
        while True:
            try:
                worker = self._idle.get_nowait()
            except queue.Empty:
                break
            if worker.process.poll() is None:
                return worker
            self._drop(worker)  # died while idle: no job's fault
        worker = _Worker(self.options)
        with self._lock:
            self._alive.add(worker)
        return worker

    def _drop(self, worker: _Worker) -> None:
        worker.close()
        with self._lock:
            self._alive.discard(worker)
            self.restarts += 1

    def close(self) -> None:
        """End all processes; jobs under way come to their end first. Can be repeated."""
        with self._lock:
            self._closed = True
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=True, cancel_futures=True)
        self._finalizer()


def _close_all(alive: set[_Worker], owner: int) -> None:
    """At close, when the pool is collected, or at exit; not in a forked child, whose parent owns the processes."""
    if os.getpid() != owner:
        return
    while alive:
        alive.pop().close()
