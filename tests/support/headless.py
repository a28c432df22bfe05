"""A headless Chromium for tests, over DevTools' pipe: the standard library and an installed browser, nothing else."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

REQUIRE = "EBPO_REQUIRE_BROWSER"
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
_PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
_FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # it needs rights that containers rarely give, and the tests open only pages they wrote themselves
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--no-first-run",
    "--hide-scrollbars",
)
# DevTools speaks on file descriptors 3 and 4 of the browser; fork with a hook would warn in a process with threads.
_LAUNCH = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_browser() -> str | None:
    """The path of a Chromium-like browser, or None. DevTools' pipe is for POSIX systems here."""
    if os.name != "posix":
        return None
    found = (shutil.which(name) for name in _NAMES)
    return next((path for path in [*found, *_PLACES] if path and Path(path).is_file()), None)


def require_browser() -> str:
    """The browser's path; without one the test is skipped, or fails where ``EBPO_REQUIRE_BROWSER=1`` is set."""
    path = find_browser()
    if path is None:
        message = "no Chromium on this machine (Debian: apt install chromium)"
        if os.environ.get(REQUIRE) == "1":
            pytest.fail(f"{message}, and {REQUIRE}=1")
        pytest.skip(message)
    return path


class Page:
    """One tab. ``events`` holds what DevTools reported of it so far, in order."""

    def __init__(self, send: Callable[..., dict[str, Any]], events: list[dict[str, Any]], session: str) -> None:
        self._send, self._events, self._session = send, events, session
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)  # focus events, whichever tab is in front

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One DevTools command's result."""
        return self._send(method, parameters, self._session)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [event for event in self._events if event.get("sessionId") == self._session]

    def named(self, method: str) -> list[dict[str, Any]]:
        """Parameters of the events of one kind."""
        return [event["params"] for event in self.events if event["method"] == method]

    def open(self, path: Path) -> None:
        """Load a file and wait until it is loaded."""
        loaded = len(self.named("Page.loadEventFired"))
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait(lambda: len(self.named("Page.loadEventFired")) > loaded)

    def wait(self, condition: Callable[[], bool], seconds: float = 30) -> None:
        """Poll until ``condition`` holds; commands in between bring in the events."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(f"not after {seconds} s; the last events: {self.events[-3:]}")
            time.sleep(0.02)
            self.call("Runtime.evaluate", expression="0")

    def evaluate(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression; what it throws fails the test."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def key(self, key: str) -> None:
        """Press and release a key such as ``Tab`` or ``ArrowRight``."""
        code = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36}.get(key)
        code = code or {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}[key]
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def pointer(self, x: float, y: float, *, click: bool = False) -> None:
        """Move the mouse to a place of the viewport in CSS pixels, and click there or not."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path: Path) -> Path:
        """The viewport as a PNG file."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
        return path


@contextmanager
def browser(path: str) -> Iterator[Callable[[], Page]]:
    """A running browser, as a function that opens a new empty tab."""
    to_read, to_write = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [sys.executable, "-I", "-c", _LAUNCH, str(to_read[0]), str(to_write[1]), path]
        process = subprocess.Popen(
            [*command, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_read[0], to_write[1]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read[0])
        os.close(to_write[1])
        pipe = _Pipe(to_read[1], to_write[0])
        try:
            yield lambda: _new_page(pipe)
        finally:
            try:
                pipe.send("Browser.close", {}, None)
                process.wait(timeout=20)
            except (OSError, TimeoutError, subprocess.TimeoutExpired):
                process.kill()
                process.wait()
            os.close(to_read[1])
            os.close(to_write[0])


class _Pipe:
    """JSON messages that end in a NUL, both ways."""

    def __init__(self, out: int, into: int) -> None:
        self.out, self.into = out, into
        self.buffer = b""
        self.events: list[dict[str, Any]] = []
        self.last = 0

    def send(self, method: str, parameters: dict[str, Any], session: str | None, seconds: float = 60) -> dict[str, Any]:
        self.last += 1
        message = {"id": self.last, "method": method, "params": parameters}
        data = json.dumps(message if session is None else {**message, "sessionId": session}).encode() + b"\0"
        while data:
            data = data[os.write(self.out, data) :]
        end = time.monotonic() + seconds
        while True:
            answer = self._receive(method, end)
            if "id" not in answer:
                self.events.append(answer)
            elif answer["id"] == self.last:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])

    def _receive(self, method: str, end: float) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            if not select.select([self.into], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"{method}: no answer from the browser")
            data = os.read(self.into, 1 << 16)
            if not data:
                raise OSError(f"{method}: the browser has ended")
            self.buffer += data
        line, self.buffer = self.buffer.split(b"\0", 1)
        return dict(json.loads(line))


def _new_page(pipe: _Pipe) -> Page:
    target = pipe.send("Target.createTarget", {"url": "about:blank"}, None)["targetId"]
    session = pipe.send("Target.attachToTarget", {"targetId": target, "flatten": True}, None)["sessionId"]
    return Page(pipe.send, pipe.events, session)
