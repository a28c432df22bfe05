"""Sampling from any server with OpenAI's API (vLLM, SGLang, llama.cpp, ``transformers serve``), with urllib alone.

One request a sample, each with its own seed, several under way at once. What may pass is tried again: refused and
broken connections, time-outs, the statuses 408, 409, 425, 429 and 5xx. Anything else ends the run with the server's
words; the samples that arrived are kept by the caller.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Collection, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any
from urllib.parse import urlsplit

from ebpo_core.data.problem import Prompt
from ebpo_core.evaluation.sampling import Batch, Completion, Request, SamplingOptions

RETRIED = frozenset({408, 409, 425, 429})
LONGEST_WAIT = 60.0
_ANSWER_SHOWN = 500


class ServerError(ConnectionError):
    """The server refused a request, or was not to be reached however often it was tried."""


class Server:
    """A connection to an OpenAI-compatible server; usable by several threads.

    Args:
        url: Up to and including the API's version, such as ``http://localhost:8000/v1``.
        api_key: By default the environment variable ``OPENAI_API_KEY``, or none. It is sent, never written down.
        timeout: Seconds that a request may take.
        retries: How often a request that failed in a passing way is tried again, after 0.5 s, 1 s, 2 s... or as long as
            the server's Retry-After says, at most a minute.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 600.0, retries: int = 6) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise ValueError(f"server={url!r}: expected a URL such as http://localhost:8000/v1")
        if timeout <= 0:
            raise ValueError(f"timeout={timeout}: expected a positive number of seconds")
        if retries < 0:
            raise ValueError(f"retries={retries}: expected at least 0")
        self.url, self.timeout, self.retries = url.rstrip("/"), timeout, retries
        self._key = os.environ.get("OPENAI_API_KEY") if api_key is None else api_key

    def call(
        self, path: str, body: dict[str, Any] | None = None, stop: threading.Event | None = None
    ) -> dict[str, Any]:
        """POST ``body`` (or GET without one) and return the JSON object of the answer.

        ``stop``, once set by another thread, ends the waiting between two tries.

        Raises:
            ServerError: As the module says.
        """
        problem, stop = "", stop or threading.Event()
        for attempt in range(self.retries + 1):
            pause = min(LONGEST_WAIT, 0.5 * 2**attempt) * random.uniform(0.75, 1.25)  # noqa: S311 -- spreads retries
            try:
                return self._once(path, body)
            except ServerError:
                raise
            except urllib.error.HTTPError as error:
                told = arrived(error, _ANSWER_SHOWN).decode(errors="replace").strip()
                problem = f"status {error.code}: {told or error.reason}"
                if error.code not in RETRIED and error.code < 500:
                    raise ServerError(f"{self.url}{path}: {problem}") from error
                pause = max(pause, _retry_after(error.headers.get("Retry-After")))
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
                problem = f"{type(error).__name__}: {getattr(error, 'reason', error)}"
            if attempt < self.retries and stop.wait(pause):
                break
        raise ServerError(
            f"{self.url}{path}: tried {self.retries + 1} times, the last time {problem}. Is the server running? "
            "What was sampled is kept: run the same command again"
        )

    def open(self, path: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
        """As :meth:`call`, once: the answer, not read yet. Whoever reads it closes it, which ends the request.

        Raises:
            OSError, http.client.HTTPException: What urllib raises.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data=data, headers=headers)  # noqa: S310 -- checked above
        answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=self.timeout)  # noqa: S310
        return answer

    def _once(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        with self.open(path, body) as answer:
            content = json.loads(answer.read())
        if not isinstance(content, dict):
            raise ServerError(f"{self.url}{path}: the answer is not a JSON object")
        return content

    def models(self) -> dict[str, str]:
        """The models that the server offers, each with its owner ("vllm" says that it is vLLM)."""
        return offered_models(self.call("/models"), f"{self.url}/models")


def arrived(answer: http.client.HTTPResponse | urllib.error.HTTPError, size: int) -> bytes:
    """The content of an answer up to ``size`` bytes, or what there is of one that breaks off before: a server's words,
    of which a half is better than none."""
    try:
        return answer.read(size)
    except http.client.IncompleteRead as error:
        return error.partial
    except (OSError, http.client.HTTPException):
        return b""


def offered_models(answer: Any, url: str) -> dict[str, str]:
    """The models in the answer of ``url``, as :meth:`Server.models` gives them."""
    found = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(found, list):
        raise ServerError(f"{url}: no list of models in the answer; is this an OpenAI-compatible API?")
    return {str(model["id"]): str(model.get("owned_by", "")) for model in found if "id" in model}


def chosen_model(model: str | None, offered: Collection[str]) -> str:
    """``model``, or the only one offered.

    Raises:
        ValueError: It is not offered, or None where there is a choice.
    """
    if model is None and len(offered) != 1:
        raise ValueError(f"model: the server offers {sorted(offered)}; name one of them")
    if model is not None and offered and model not in offered:
        raise ValueError(f"model={model!r}: the server offers {sorted(offered)}")
    return model or next(iter(offered))


def _retry_after(header: str | None) -> float:
    """Seconds of a Retry-After header; 0 for a date or nothing."""
    try:
        return min(LONGEST_WAIT, max(0.0, float(header or 0)))
    except ValueError:
        return 0.0


def completion_of(answer: dict[str, Any]) -> Completion:
    """Text and finish reason of the first choice, of a chat or of a text completion."""
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
    except (KeyError, IndexError, TypeError) as error:
        shown = json.dumps(answer)[:_ANSWER_SHOWN]
        raise ServerError(f"the server's answer holds no completion: {shown}") from error
    tokens = (answer.get("usage") or {}).get("completion_tokens")
    return Completion(text or "", str(choice.get("finish_reason") or "unknown"), tokens)


class ServerModel:
    """A model behind a :class:`Server`.

    Args:
        server: Where.
        model: Its name there; None takes the only one that the server offers.
        options: How to sample.
        concurrency: Requests under way at once.
        extra_body: Further fields of every request. By default vLLM, known by its list of models, gets ``top_k``,
            ``min_p`` and ``repetition_penalty``, which it would else take from the model's generation config. Any other
            server gets OpenAI's own fields, and ``top_k`` where it is set.
    """

    def __init__(
        self,
        server: Server,
        model: str | None,
        options: SamplingOptions,
        *,
        concurrency: int = 32,
        extra_body: dict[str, Any] | None = None,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency={concurrency}: expected at least 1")
        offered = server.models()
        self.server, self.model = server, chosen_model(model, offered)
        self.options, self.concurrency = options, concurrency
        if extra_body is None:
            extra_body = {"top_k": options.top_k} if options.top_k else {}
            if offered.get(self.model) == "vllm":
                extra_body = {"top_k": options.top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0}
        self.extra_body = extra_body

    def settings(self) -> dict[str, Any]:
        """The model and the further fields; not the address, so that a run may move to another host."""
        return {"kind": "server", "model": self.model, "extra_body": self.extra_body}

    def generate(self, requests: Sequence[Request]) -> Generator[Batch, None, None]:
        """Samples as they arrive; after a failure those that have arrived, then the error."""
        waiting = iter(requests)
        running: dict[Future[Completion], Request] = {}
        stop = threading.Event()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="sampling")
        try:
            while True:
                # No more than the pool works on: a failure then leaves nothing in a queue.
                while len(running) < self.concurrency and (request := next(waiting, None)) is not None:
                    running[pool.submit(self.complete, request.prompt, request.seed, stop)] = request
                if not running:
                    return
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                taken = [(running.pop(future), future) for future in finished]
                good = [(request, future.result()) for request, future in taken if future.exception() is None]
                if good:
                    yield good
                for _, future in taken:
                    future.result()
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def complete(self, prompt: Prompt, seed: int, stop: threading.Event | None = None) -> Completion:
        """One completion: of a text by ``/completions``, of messages by ``/chat/completions``."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.options.max_new_tokens,
            "temperature": self.options.temperature,
            "top_p": self.options.top_p,
            "seed": seed,
            "n": 1,
            **self.extra_body,
        }
        if isinstance(prompt, str):
            return completion_of(self.server.call("/completions", {**body, "prompt": prompt}, stop))
        return completion_of(self.server.call("/chat/completions", {**body, "messages": prompt}, stop))
