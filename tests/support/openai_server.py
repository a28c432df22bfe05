"""A real HTTP server with OpenAI's API over a real model of transformers, for tests of clients.

Failures can be put in front of its answers: a status with headers, a dropped connection, or half an answer.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ebpo_core.data import Problem
from ebpo_core.evaluation.local_model import LocalModel
from ebpo_core.evaluation.sampling import Request, SamplingOptions


class OpenAIServer(ThreadingHTTPServer):
    """Serves the model of a directory under the name "tiny".

    Attributes:
        requests: Bodies of the requests that were answered or refused, in order.
        failures: What to do to the next requests instead of answering: (status, headers), "drop" or "half".
        most_at_once: Requests that were under way at the same time.
    """

    daemon_threads = False  # so that closing waits for them: models are not loaded by two threads at once
    request_queue_size = 64

    def __init__(
        self,
        model: str,
        owner: str = "tests",
        key: str | None = None,
        reply: str | None = None,
        handler: type[Handler] | None = None,
    ) -> None:
        super().__init__(("127.0.0.1", 0), handler or Handler)
        self.model, self.owner, self.key, self.reply = model, owner, key, reply
        self.requests: list[dict[str, Any]] = []
        self.failures: list[Any] = []
        self.most_at_once = self._at_once = 0
        self._lock, self._generating = threading.Lock(), threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def complete(self, body: dict[str, Any]) -> tuple[str, str, int]:
        """Draw with the request's own parameters; torch draws one request at a time."""
        options = SamplingOptions(
            max_new_tokens=body["max_tokens"],
            temperature=body["temperature"],
            top_p=body["top_p"],
            top_k=max(0, body.get("top_k", 0)),
        )
        prompt = body.get("prompt", body.get("messages"))
        with self._generating:
            if options not in (loaded := self.__dict__.setdefault("loaded", {})):
                loaded[options] = LocalModel(self.model, options, dtype="float32", device="cpu")
            request = Request(Problem("p", prompt), prompt, 0, body["seed"])
            ((_, done),) = next(loaded[options].generate([request]))
        return done.text, done.finish_reason, done.tokens or 0

    @contextmanager
    def counted(self) -> Iterator[Any]:
        """Count the requests under way, and hand out the next failure."""
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            failure = self.failures.pop(0) if self.failures else None
        try:
            yield failure
        finally:
            with self._lock:
                self._at_once -= 1


class Handler(BaseHTTPRequestHandler):
    """Answers whole; :class:`~routed_server.RoutedOpenAIServer` has one that streams."""

    server: OpenAIServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refused(self) -> bool:
        wanted = self.server.key
        if wanted is None or self.headers.get("Authorization") == f"Bearer {wanted}":
            return False
        self._send(401, {"error": {"message": "wrong key"}})
        return True

    def do_GET(self) -> None:
        if not self._refused():
            self._send(200, {"object": "list", "data": [{"id": "tiny", "owned_by": self.server.owner}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.counted() as failure:
            self.server.requests.append(body)
            if self._refused():
                return
            if failure == "drop":
                self.close_connection = True
                return
            if failure == "half":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices": [')
                self.close_connection = True
                return
            if failure is not None:
                self._send(failure[0], {"error": {"message": f"status {failure[0]}"}}, failure[1])
                return
            if self.server.reply is not None:
                text, reason, tokens = self.server.reply, "stop", 1
            else:
                text, reason, tokens = self.server.complete(body)
        # Not counted any more: a client that has its answer may ask again at once.
        chat = self.path.endswith("/chat/completions")
        said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choice = {"index": 0, "finish_reason": reason, **said}
        self._send(200, {"choices": [choice], "usage": {"completion_tokens": tokens}})


@contextmanager
def serving(model: str, **options: Any) -> Iterator[OpenAIServer]:
    """A server of ``model`` on a free port of this machine, with a thread of its own."""
    with running(OpenAIServer(model, **options)) as server:
        yield server


@contextmanager
def running(server: Any) -> Iterator[Any]:
    """The server, answering in a thread of its own."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
