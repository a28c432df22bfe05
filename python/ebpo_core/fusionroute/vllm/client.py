"""A client of a FusionRoute model behind vLLM: its answers token by token, each with the expert that wrote it.

Plain HTTP by the standard library. For the ``openai`` package, :func:`routing_request` gives the fields that ask for
the routing and :func:`routed_tokens` reads it from an answer.
"""

from __future__ import annotations

import http.client
import json
import re
import urllib.error
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

from ebpo_core.evaluation.server import Server, ServerError, arrived, chosen_model, offered_models
from ebpo_core.fusionroute.traces.trace import RoutedToken, RoutingTrace
from ebpo_core.fusionroute.vllm.answers import routed_tokens, routing_request

__all__ = ["Prompt", "RoutedServer", "ServerError", "routed_tokens", "routing_request"]

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A text or token ids, which the model goes on from, or a chat's messages."""

_VERSION, _METRICS = "/v1", "/metrics"
_SHOWN, _READ = 500, 2**16
_VOCAB_SIZE = re.compile(r"^fusionroute_vocab_size(?:\{.*\})? (\d+(?:\.\d*)?(?:e\+?\d+)?)(?: \d+)?$", re.MULTILINE)
_EXPERT = re.compile(r"^fusionroute_tokens_total\{(.*)\} ", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_REMEDIES = {
    401: "pass api_key, or set OPENAI_API_KEY",
    403: "pass api_key, or set OPENAI_API_KEY",
}
_NOT_ONE = (
    "no FusionRoute model is served there: install ebpo-core beside vLLM and serve a FusionRoute checkpoint; where a "
    "gateway hides or changes its /metrics, pass experts and vocab_size"
)
_IN_THE_MIDDLE = (
    "the answer ended in the middle ({}). The part that arrived is incomplete: see the server's log, and ask again"
)
_NO_ROUTING = "serve the checkpoint with vLLM's own server, without parsers that hide reasoning"


class RoutedServer:
    """A vLLM server of a FusionRoute checkpoint; usable by several threads.

    Args:
        url: Such as ``http://localhost:8000``, with or without ``/v1``.
        model: Its name there; None takes the only one that the server offers.
        api_key: By default the environment variable ``OPENAI_API_KEY``, or none.
        timeout: Seconds without a word from the server.
        experts, vocab_size: The experts' names in the order of the route head, and V of the checkpoint. Both are read
            from the server's ``/metrics``; give them where a gateway hides that.

    Attributes:
        model, experts, vocab_size: As above.

    Raises:
        ServerError: The server is not to be reached, refuses, or does not serve a FusionRoute checkpoint.
        ValueError: A malformed url, or a model that the server does not offer.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        experts: Sequence[str] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        root = url.rstrip("/").removesuffix(_VERSION)
        metrics = Server(root, api_key=api_key, timeout=timeout, retries=0)
        self._api = Server(f"{metrics.url}{_VERSION}", api_key=api_key, timeout=timeout, retries=0)
        if (experts is None) != (vocab_size is None):
            raise ValueError(f"experts={experts!r}, vocab_size={vocab_size!r}: give both, or neither")
        if experts is None or vocab_size is None:
            vocab_size, experts = _described(_read(metrics, _METRICS).decode(errors="replace"), root)
        self.vocab_size, self.experts = vocab_size, RoutingTrace(experts=tuple(experts)).experts
        where = f"{self._api.url}/models"
        try:
            offered = offered_models(json.loads(_read(self._api, "/models")), where)
        except ValueError as error:
            raise ServerError(f"{where}: the answer is not JSON ({error})") from error
        self.model = chosen_model(model, offered)

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> Generator[RoutedToken, None, None]:
        """The tokens of one answer as they arrive, the one that ends it included, with texts that concatenate to it.

        Nothing of sampling is taken from the server's generation config, so that the defaults decode greedily. To leave
        the iterator early, by ``break`` or ``close()``, closes the connection, upon which vLLM aborts the request.

        Args:
            prompt: See :data:`Prompt`. vLLM puts messages into the checkpoint's chat template, and begins a text with
                its tokenizer's special tokens.
            max_new_tokens: Tokens at most.
            temperature: 0 takes the most likely token.
            top_p: Sample from the smallest set of this probability.
            top_k: Sample from so many tokens; None from all.
            seed: Of sampling.
            stop: Texts that end the answer. They are part of it, as with the ``stop_strings`` of ``generate``: a server
                that cuts them off holds texts back, so that they arrive with other tokens than their own.
            extra_body: Further fields of the request, which win over these, but for ``n`` and ``stream``: what is read
                here is one answer, token by token.

        Raises:
            ServerError: While iterating: the server is not to be reached, refuses (with its own words), sends no
                routing, or ends the stream in the middle.
            ValueError: A prompt of another kind.
        """
        path, asked = _endpoint(prompt)
        body = {
            "model": self.model,
            **asked,
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            **({} if seed is None else {"seed": seed}),
            **({} if stop is None else {"stop": stop, "include_stop_str_in_output": True}),
            **routing_request(self.vocab_size, len(self.experts), chat="messages" in asked),
            **(extra_body or {}),
            "n": 1,
            "stream": True,
        }
        return self._stream(path, body)

    def trace(
        self, prompt: Prompt, *, on_token: Callable[[RoutedToken], object] | None = None, **options: Any
    ) -> RoutingTrace:
        """One answer as the trace that ``generate(output_routing=True)`` gives, with texts.

        Args:
            prompt: As in :meth:`stream`. The trace's own ``prompt`` is the text, or that of the last message.
            on_token: Called with each token as it arrives.
            options: As in :meth:`stream`.
        """
        tokens = []
        for token in self.stream(prompt, **options):
            tokens.append(token)
            if on_token is not None:
                on_token(token)
        text = "".join(token.text or "" for token in tokens)
        return RoutingTrace(self.experts, tuple(tokens), _shown(prompt), text)

    def _stream(self, path: str, body: dict[str, Any]) -> Generator[RoutedToken, None, None]:
        where = f"{self._api.url}{path}"
        with _opened(self._api, path, body) as answer:
            if (kind := answer.headers.get_content_type()) != "text/event-stream":
                content = arrived(answer, _SHOWN).decode(errors="replace")
                raise ServerError(f"{where}: expected a stream of events, got {kind}: {content}")
            ahead, finished = "", False  # text that came before its token; whether the server called it an answer
            for event in _events(answer, where):
                for choice in _choices(event, where):
                    text, logprobs = _said(choice), choice.get("logprobs")
                    if logprobs is None and text:
                        raise ServerError(f"{where}: an answer without log-probabilities; {_NO_ROUTING}")
                    ahead += text
                    try:
                        tokens = [] if logprobs is None else self._tokens(logprobs, ahead)
                    except ValueError as error:
                        raise ServerError(f"{where}: {error}") from error
                    if tokens:
                        ahead = ""
                        yield from tokens
                    finished = finished or choice.get("finish_reason") is not None
                    if choice.get("finish_reason") == "abort":
                        raise ServerError(f"{where}: the server aborted the request; is it shutting down?")
            if not finished:
                raise ServerError(f"{where}: {_IN_THE_MIDDLE.format('no finish_reason before [DONE]')}")
            if ahead:
                raise ServerError(f"{where}: text that belongs to no token: {ahead[:_SHOWN]!r}; {_NO_ROUTING}")

    def _tokens(self, logprobs: Any, text: str) -> list[RoutedToken]:
        return routed_tokens(logprobs, self.vocab_size, len(self.experts), text)


def _endpoint(prompt: Prompt) -> tuple[str, dict[str, Any]]:
    """The path that a prompt is sent to, and the field that it is in."""
    if isinstance(prompt, str):
        return "/completions", {"prompt": prompt}
    items: list[Any] = list(prompt)
    if items and all(isinstance(item, Mapping) for item in items):
        return "/chat/completions", {"messages": [dict(item) for item in items]}
    if items and all(isinstance(item, int) for item in items):
        return "/completions", {"prompt": items}
    raise ValueError(
        f"prompt={prompt!r}: expected a text, a list of token ids, or of messages such as "
        '{"role": "user", "content": "..."}'
    )


def _shown(prompt: Prompt) -> str | None:
    """The prompt as a trace shows it."""
    if isinstance(prompt, str):
        return prompt
    last = prompt[-1]
    content = last.get("content") if isinstance(last, Mapping) else None
    return content if isinstance(content, str) else None


def _choices(event: Mapping[str, Any], where: str) -> list[Any]:
    """The choices of an event, none of one that is about usage.

    Raises:
        ServerError: the event is an error, whatever its form, or no part of one answer.
    """
    if event.get("error") or "choices" not in event:
        raise ServerError(f"{where}: the answer ended with an error: {_words(event)}")
    choices: Any = event["choices"] or []
    if not isinstance(choices, list) or not all(
        isinstance(choice, Mapping) and isinstance(choice.get("delta") or {}, Mapping) for choice in choices
    ):
        raise ServerError(f"{where}: an event with choices of another form: {json.dumps(choices)[:_SHOWN]}")
    if any(choice.get("index") for choice in choices):
        raise ServerError(f"{where}: answers to several prompts in one stream: ask for them one at a time")
    return choices


def _said(choice: Mapping[str, Any]) -> str:
    """The text that a chunk adds: of a completion or a chat, reasoning before the answer."""
    delta = choice.get("delta") or {}
    return str(choice.get("text") or "") + str(delta.get("reasoning") or "") + str(delta.get("content") or "")


def _opened(server: Server, path: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
    """An answer that the server agreed to give, not read yet."""
    where = f"{server.url}{path}"
    try:
        return server.open(path, body)
    except urllib.error.HTTPError as error:
        with error:
            content = arrived(error, _READ)
        words = _words(content) or error.reason
        remedy = _REMEDIES.get(error.code, "")
        if path == _METRICS and not remedy:
            remedy = _NOT_ONE
        elif "chat template" in words:
            remedy = "the checkpoint has none: ask with a text instead of messages"
        raise ServerError(f"{where}: status {error.code}: {words}{remedy and f' ({remedy})'}") from error
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(
            f"{where}: not to be reached ({_problem(error)}). Is the server running, and at this address? "
            "`vllm serve CHECKPOINT` starts one"
        ) from error


def _read(server: Server, path: str) -> bytes:
    with _opened(server, path) as answer:
        try:
            return answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"{server.url}{path}: half an answer ({_problem(error)}); try again") from error


def _events(answer: http.client.HTTPResponse, where: str) -> Iterator[dict[str, Any]]:
    """The objects of a stream of server-sent events, up to its ``[DONE]``."""
    data: list[bytes] = []
    problem = "the connection was closed"
    while True:
        try:
            line = answer.readline()
        except (OSError, http.client.HTTPException) as error:
            line, problem = b"", _problem(error)
        if not line:
            raise ServerError(f"{where}: {_IN_THE_MIDDLE.format(problem)}")
        line = line.rstrip(b"\r\n")
        if line.startswith(b"data:"):
            data.append(line[len(b"data:") :].strip())
        elif not line and data:
            event, data = b"\n".join(data), []
            if not event:  # which is no event, as a gateway's sign of life may be
                continue
            if event == b"[DONE]":
                return
            try:
                content = json.loads(event)
            except ValueError:
                content = None
            if not isinstance(content, dict):
                raise ServerError(f"{where}: an event is not a JSON object: {event[:_SHOWN].decode(errors='replace')}")
            yield content


def _problem(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    return f"{type(reason if isinstance(reason, Exception) else error).__name__}: {reason}"


def _words(content: Any) -> str:
    """A server's own message out of the JSON around it, whatever its form."""
    found = content
    if isinstance(content, bytes):
        try:
            found = json.loads(content)
        except ValueError:
            return content[:_SHOWN].decode(errors="replace").strip()
    while isinstance(found, Mapping) and (key := next((k for k in ("error", "message", "detail") if k in found), None)):
        found = found[key]
    return found if isinstance(found, str) else json.dumps(found)[:_SHOWN]


def _described(metrics: str, root: str) -> tuple[int, tuple[str, ...]]:
    """V and the experts' names from the server's metrics, in Prometheus' text format."""
    sizes = _VOCAB_SIZE.findall(metrics)
    experts = {}
    for line in _EXPERT.findall(metrics):
        labels = dict(_LABEL.findall(line))
        experts[labels.get("index")] = _unescaped(labels.get("expert", ""))
    names = [experts.get(str(index), "") for index in range(len(experts))]
    if len(sizes) != 1 or not names or not all(names):
        raise ServerError(
            f"{root}{_METRICS}: does not have fusionroute_vocab_size and fusionroute_tokens_total of every expert: "
            f"{_NOT_ONE}"
        )
    return int(float(sizes[0])), tuple(names)


def _unescaped(label: str) -> str:
    return re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], label)
