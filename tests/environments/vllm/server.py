"""vLLM's real OpenAI-compatible server on a free port, for as long as a test needs it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

START_SECONDS = 600
"""A CPU build compiles kernels on its first start."""

NAME = "tiny"

CHUNKED = (
    *("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16", "--block-size", "32"),
    *("--max-num-batched-tokens", "64", "--max-model-len", "400"),
)
"""Flags of a server that reads prompts in chunks, through blocks of the smallest size that a CPU has."""


class Server(NamedTuple):
    """A running server: ``root`` without ``/v1``, its process, and what it printed so far."""

    root: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        return f"{self.root}/v1"

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.root}{path}", timeout=60) as answer:  # noqa: S310
            text: str = answer.read().decode()
        return text

    def healthy(self) -> bool:
        """Whether the engine, too, is alive: the server answers 503 where it is not."""
        try:
            self.get("/health")
        except OSError:
            return False
        return self.process.poll() is None


def environment() -> dict[str, str]:
    """Of a server's process."""
    return os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def command(model: Path, port: int, *flags: str, name: str = NAME) -> list[str]:
    """What starts a server: ``vllm serve`` itself needs package metadata that the CPU build lacks."""
    start = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    return [*start, "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port), *flags]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@contextmanager
def serving(model: Path, *flags: str, name: str = NAME) -> Iterator[Server]:
    """A server of ``model`` on a free port."""
    port = free_port()
    with serving_command(command(model, port, *flags, name=name), f"http://127.0.0.1:{port}") as server:
        yield server


@contextmanager
def serving_command(start: list[str], root: str, folder: Path | None = None) -> Iterator[Server]:
    """Start, wait until it answers at ``root``, stop. One that dies is an assertion with the end of what it printed."""
    log = Path(tempfile.mkdtemp(prefix="server-")) / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(start, stdout=out, stderr=subprocess.STDOUT, env=environment(), cwd=folder)
        server = Server(root, process, log)
        try:
            deadline = time.monotonic() + START_SECONDS
            while True:
                assert process.poll() is None, log.read_text()[-6000:]
                assert time.monotonic() < deadline, log.read_text()[-6000:]
                if server.healthy():
                    break
                time.sleep(1)
            yield server
        finally:
            process.terminate()
            process.wait(60)
