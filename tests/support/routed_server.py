"""A real HTTP server that speaks vLLM's protocol of a served FusionRoute model: metrics, both APIs, whole or streamed.

What it answers is a list of steps. Their log-probabilities are made as in an engine: the routing's columns are added to
the float32 logits, one log-softmax goes over all of them, and the API cuts at -9999.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any, NamedTuple

import torch
from openai_server import Handler, OpenAIServer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from ebpo_core.fusionroute import FusionRouteForCausalLM
from ebpo_core.fusionroute.vllm.columns import encode

CUT = -9999.0


class Step(NamedTuple):
    """One token: what it adds to the text, its own text as log-probabilities tell it, and all log-probabilities."""

    id: int
    text: str
    own_text: str
    logprobs: list[float]


def engine_logprobs(logits: Tensor, expert_ids: Tensor, weights: Tensor, own: Tensor) -> Tensor:
    """``[T, V + n + 2]`` float32 of float32 logits ``[T, V]``, as the served model and vLLM's sampler make them."""
    columns = encode(expert_ids, weights, own)
    fused = torch.cat([logits, logits.logsumexp(-1, keepdim=True) + columns], dim=-1)
    return fused.log_softmax(-1, dtype=torch.float32)


def steps(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int], logprobs: Tensor) -> list[Step]:
    """The tokens with texts as vLLM has them, by the same decoder; a special token adds none but has a text of its own.

    Args:
        tokenizer: A fast one of transformers.
        prompt: Ids before the first token.
        tokens: T ids.
        logprobs: ``[T, V + n + 2]``.
    """
    stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)
    found = []
    for token, row in zip(tokens, logprobs.tolist(), strict=True):
        text = stream.step(tokenizer._tokenizer, token) or ""
        special = token in tokenizer.all_special_ids
        found.append(Step(token, text, tokenizer.decode([token]) if special else text, row))
    return found


def scripted(tokenizer: Any, tokens: Sequence[int], experts: Sequence[int], overruled: Sequence[bool]) -> list[Step]:
    """Steps of a given routing between two experts, over random logits and weights."""
    V, T = len(tokenizer), len(tokens)
    generator = torch.Generator().manual_seed(0)
    logits = 10 * torch.randn(T, V, generator=generator)
    weights = torch.randn(T, 2, generator=generator)
    weights = torch.where(torch.tensor(experts)[:, None] == weights.argmax(-1, keepdim=True), weights, weights.flip(-1))
    ids = weights.argmax(-1)
    assert ids.tolist() == list(experts)
    own = torch.tensor([(token + wrong) % V for token, wrong in zip(tokens, overruled, strict=True)])
    return steps(tokenizer, [], tokens, engine_logprobs(logits, ids, weights, own))


def greedy(model: FusionRouteForCausalLM, tokenizer: Any) -> Callable[[dict[str, Any]], list[Step]]:
    """What a server of this model answers greedily; the experts' own tokens are those of their plain forwards."""

    def answer(body: dict[str, Any]) -> list[Step]:
        if "messages" in body:
            prompt = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)["input_ids"]
        else:
            prompt = tokenizer(body["prompt"])["input_ids"] if isinstance(body["prompt"], str) else body["prompt"]
        with torch.no_grad():
            ids = model.generate(torch.tensor([prompt]), max_new_tokens=body["max_tokens"], do_sample=False)
            places = slice(len(prompt) - 1, -1)
            out = model(input_ids=ids, use_cache=False)
            each = [expert.model(input_ids=ids, use_cache=False).logits[0, places] for expert in model.experts]
        V = model.config.vocab_size
        chosen = out.expert_ids[0, places]
        own = torch.stack([logits[:, :V].argmax(-1) for logits in each])[chosen, torch.arange(len(chosen))]
        rows = engine_logprobs(out.logits[0, places], chosen, out.routing_weights[0, places], own)
        return steps(tokenizer, prompt, ids[0, len(prompt) :].tolist(), rows)

    return answer


def logprobs_of(some: Sequence[Step], body: dict[str, Any], *, chat: bool) -> dict[str, Any] | None:
    """The ``logprobs`` of a choice as vLLM's two APIs write them."""
    if not body.get("logprobs") and body.get("logprobs") != 0:
        return None

    def name(token: int) -> str:
        return f"token_id:{token}" if body.get("return_tokens_as_token_ids") else f"<{token}>"

    def tops(step: Step) -> dict[str, float]:
        return {name(one): max(step.logprobs[one], CUT) for one in (step.id, *body.get("logprob_token_ids", ()))}

    if not chat:
        return {
            "text_offset": [0] * len(some),
            "token_logprobs": [max(step.logprobs[step.id], CUT) for step in some],
            "tokens": [name(step.id) for step in some],
            "top_logprobs": [tops(step) for step in some],
        }
    return {
        "content": [
            {
                "token": name(step.id),
                "logprob": max(step.logprobs[step.id], CUT),
                "bytes": list(step.own_text.encode()),
                "top_logprobs": [
                    {"token": token, "logprob": value, "bytes": list(token.encode())}
                    for token, value in tops(step).items()
                ],
            }
            for step in some
        ]
    }


class RoutedOpenAIServer(OpenAIServer):
    """Serves ``answer`` under the name "fused".

    Attributes:
        group: Tokens in a chunk of a stream.
        piece: Bytes that go over the wire at once; None sends an event whole.
        indent: Of the events' JSON, whose lines are then lines of the event.
        ending: How a stream ends: "done", "none" (done, after a chunk without tokens), "unfinished" (done, but not
            said of the answer), "cut" (the connection), "abort" (vLLM's finish reason), "never", which repeats the
            answer until the client has left, or an event that takes the place of the end.
        metrics: The text of /metrics.
        forgets: Fields of requests that the server does not know.
        gate: Awaited after the first chunk with tokens.
        left: Set when the client has left.
    """

    def __init__(
        self, answer: Callable[[dict[str, Any]], list[Step]], names: Sequence[str], vocab_size: int, **options: Any
    ) -> None:
        super().__init__("", handler=_Streaming, **options)
        self.answer = answer
        self.group, self.forgets = 1, ()
        self.ending: str | dict[str, Any] = "done"
        self.piece: int | None = None
        self.indent: int | None = None
        self.gate: threading.Event | None = None
        self.left = threading.Event()
        self.metrics = metrics_of(names, vocab_size)

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")


def metrics_of(names: Sequence[str], vocab_size: int) -> str:
    """Prometheus' text, as the collector in ``fusionroute/vllm/counters.py`` and vLLM's own metrics give it."""
    lines = ["# HELP fusionroute_tokens_total Tokens emitted", "# TYPE fusionroute_tokens_total counter"]
    escaped = [name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for name in names]
    for metric, value in (("fusionroute_tokens_total", 3.0), ("fusionroute_token_share", 0.5)):
        lines += [f'{metric}{{expert="{name}",index="{index}"}} {value}' for index, name in enumerate(escaped)]
    lines += [f"fusionroute_vocab_size {float(vocab_size)}", 'vllm:num_requests_running{engine="0"} 0.0']
    return "\n".join(lines) + "\n"


class _Streaming(Handler):
    server: RoutedOpenAIServer
    timeout = 100  # a client that neither reads nor leaves is a failure, not a hang

    def do_GET(self) -> None:  # noqa: N802 -- http.server's name
        if self.path == "/metrics":
            data = self.server.metrics.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        elif not self._refused():
            self._send(200, {"object": "list", "data": [{"id": "fused", "owned_by": "vllm"}]})

    def do_POST(self) -> None:  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.counted() as failure:
            self.server.requests.append(body)
            if self._refused():
                return
            if failure is not None:
                self._send(*failure)
                return
            body = {name: value for name, value in body.items() if name not in self.server.forgets}
            chat = self.path == "/v1/chat/completions"
            some = self.server.answer(body)
            if body.get("stream"):
                self._stream(some, body, chat)
                return
            text = "".join(step.text for step in some)
            said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            choice = {"index": 0, "logprobs": logprobs_of(some, body, chat=chat), "finish_reason": "stop", **said}
            self._send(200, {"choices": [choice]})

    def _stream(self, some: list[Step], body: dict[str, Any], chat: bool) -> None:
        server = self.server
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.close_connection = True
        try:
            if chat:
                self._event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            written = 0
            for number, group in enumerate(_groups(some, server.group, forever=server.ending == "never")):
                written += len(group)
                reason = "stop" if server.ending == "done" and written == len(some) else None
                text = "".join(step.text for step in group)
                said: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
                said["logprobs"] = logprobs_of(group, body, chat=chat)
                self._event({"choices": [{"index": 0, "finish_reason": reason, **said}]})
                if number == 0 and server.gate is not None:
                    assert server.gate.wait(60)
            if server.ending == "cut":
                return
            if isinstance(server.ending, dict):
                self._event(server.ending)
            if server.ending in ("none", "abort"):
                said = {"delta": {"content": ""}} if chat else {"text": ""}
                said["logprobs"] = logprobs_of([], body, chat=chat)
                reason = "abort" if server.ending == "abort" else "stop"
                self._event({"choices": [{"index": 0, "finish_reason": reason, **said}]})
            self._write(b": a comment\n\ndata:\n\ndata: [DONE]\n\n")
            self.wfile.write(b"0\r\n\r\n")
        except ConnectionError:
            server.left.set()

    def _event(self, content: dict[str, Any]) -> None:
        lines = json.dumps(content, ensure_ascii=False, indent=self.server.indent).split("\n")
        data = "".join(f"data: {line}\n" for line in [*lines[:-1], f"{lines[-1]}\n"]).encode()
        size = self.server.piece or len(data)
        for start in range(0, len(data), size):
            self._write(data[start : start + size])

    def _write(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


def _groups(some: list[Step], size: int, *, forever: bool) -> Iterator[list[Step]]:
    groups = [some[start : start + size] for start in range(0, len(some), size)]
    return cycle(groups) if forever else iter(groups)


@contextmanager
def refusing_url() -> Iterator[str]:
    """An address at which nobody listens, as long as it is needed."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
