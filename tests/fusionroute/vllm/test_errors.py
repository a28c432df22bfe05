"""What the client says of servers that are not there, refuse, serve something else, or stop in the middle."""

from __future__ import annotations

import threading
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("transformers")

from openai_server import OpenAIServer, running
from routed_server import RoutedOpenAIServer, refusing_url
from serving_script import MESSAGES, NAMES, TOKENS, V, check

from ebpo_core.fusionroute.vllm.client import RoutedServer, ServerError


def fails(served: RoutedOpenAIServer, message: str, prompt: Any = "x") -> None:
    with pytest.raises(ServerError, match=message):
        RoutedServer(served.root).trace(prompt)


def test_a_server_that_is_not_there() -> None:
    refused = r"/metrics: not to be reached \(ConnectionRefusedError: .*vllm serve"
    with refusing_url() as url, pytest.raises(ServerError, match=refused):
        RoutedServer(url)
    for url in ("localhost:8000", "ftp://host", ""):
        with pytest.raises(ValueError, match="expected a URL such as"):
            RoutedServer(url)


def test_another_server_than_one_of_fusionroute(served: RoutedOpenAIServer) -> None:
    with running(OpenAIServer("")) as other, pytest.raises(ServerError, match="no FusionRoute model is served there"):
        RoutedServer(other.url)
    complete = served.metrics
    lines = complete.splitlines(keepends=True)
    for wrong in (
        "",
        "".join(line for line in lines if not line.startswith("fusionroute_vocab_size")),
        "".join(line for line in lines if not line.startswith("fusionroute_tokens_total")),
        complete.replace('index="0"', 'index="2"'),
        complete.replace('expert="math"', 'name="math"'),
        complete + "fusionroute_vocab_size 7\n",
        complete.replace(f"vocab_size {float(V)}", "vocab_size NaN"),
        complete.replace(f"vocab_size {float(V)}", "vocab_size +Inf"),
    ):
        served.metrics = wrong
        fails(served, "no FusionRoute model is served there")


def test_where_a_gateway_hides_the_metrics(served: RoutedOpenAIServer) -> None:
    served.metrics = ""
    check(RoutedServer(served.url, experts=NAMES, vocab_size=V).trace("x"))
    with pytest.raises(ValueError, match="give both, or neither"):
        RoutedServer(served.url, experts=NAMES)
    with pytest.raises(ValueError, match="distinct"):
        RoutedServer(served.url, experts=["a", "a"], vocab_size=V)


def test_models_that_are_not_offered(served: RoutedOpenAIServer) -> None:
    assert RoutedServer(served.url, "fused").model == "fused"
    with pytest.raises(ValueError, match=r"model='other': the server offers \['fused'\]"):
        RoutedServer(served.url, "other")


def test_keys(served: RoutedOpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    served.key = "secret"
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    fails(served, r"/v1/models: status 401: wrong key \(pass api_key")
    check(RoutedServer(served.root, api_key="secret").trace("x"))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    check(RoutedServer(served.root).trace("x"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"error": {"message": "max_tokens is too large", "code": 400}}, "status 400: max_tokens is too large$"),
        ({"object": "error", "message": "no"}, "status 400: no$"),
        ({"detail": [{"msg": "wrong"}]}, r'status 400: \[\{"msg": "wrong"\}\]$'),
        ({"error": "default chat template is no longer allowed"}, r"ask with a text instead of messages\)$"),
    ],
)
def test_the_words_of_a_refusal_are_shown(served: RoutedOpenAIServer, content: Any, message: str) -> None:
    served.failures.append((400, content))
    fails(served, message, MESSAGES)


@pytest.mark.parametrize("status", [200, 500])
def test_a_refusal_that_breaks_off(served: RoutedOpenAIServer, status: int) -> None:
    longer = {"Content-Length": "1000", "Connection": "close"}
    served.failures.append((status, {"detail": "no room"}, longer))
    fails(served, r"status 500: no room$" if status == 500 else r'got application/json: \{"detail": "no room"\}$')


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ({"error": {"message": "EngineCore died", "code": 500}}, "the answer ended with an error: EngineCore died"),
        ({"object": "error", "message": "EngineCore died"}, "the answer ended with an error: EngineCore died"),
        ({"error": {}}, "the answer ended with an error"),
        ({"choices": [{"index": 1, "text": ""}]}, "answers to several prompts"),
        ({"choices": [{"index": 0, "delta": "x"}]}, "choices of another form"),
        ({"choices": [None]}, "choices of another form"),
        ({"choices": []}, "the answer ended in the middle"),
        ("unfinished", r"the answer ended in the middle \(no finish_reason"),
        ("cut", "the answer ended in the middle"),
        ("abort", "the server aborted the request"),
    ],
)
def test_an_answer_that_ends_in_the_middle(
    served: RoutedOpenAIServer, ending: str | dict[str, Any], message: str, chat: bool
) -> None:
    served.ending = ending
    tokens = RoutedServer(served.root).stream(MESSAGES if chat else "x")
    arrived = []
    with pytest.raises(ServerError, match=message):
        arrived.extend(token.id for token in tokens)
    assert arrived == TOKENS  # what came before is given


def test_a_server_that_falls_silent(served: RoutedOpenAIServer) -> None:
    served.gate = threading.Event()
    tokens = RoutedServer(served.root, timeout=0.2).stream("x")
    assert next(tokens).id == TOKENS[0]
    with pytest.raises(ServerError, match="ended in the middle .*timed out"):
        next(tokens)
    served.gate.set()


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(
    ("forgets", "message"),
    [
        (("logprobs",), "an answer without log-probabilities"),
        (("logprob_token_ids",), "has no log-probability of"),
        (("return_tokens_as_token_ids",), "return_tokens_as_token_ids"),
        (("stream",), "expected a stream of events, got application/json: {"),
    ],
)
def test_a_server_that_ignores_fields(
    served: RoutedOpenAIServer, forgets: tuple[str, ...], message: str, chat: bool
) -> None:
    served.forgets = forgets
    fails(served, message, MESSAGES if chat else "x")


@pytest.mark.parametrize("prompt", [[], ["a"], [1, {"role": "user"}], [[1]]])
def test_prompts_of_other_kinds(served: RoutedOpenAIServer, prompt: Any) -> None:
    with pytest.raises(ValueError, match="expected a text, a list of token ids, or of messages"):
        RoutedServer(served.root).stream(prompt)
