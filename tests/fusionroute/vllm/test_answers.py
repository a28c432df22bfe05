"""Whole answers, as JSON or as the ``openai`` package's objects, to routed tokens; and answers without the routing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("transformers")

from routed_server import RoutedOpenAIServer, Step, logprobs_of
from serving_script import MESSAGES, NAMES, SCRIPT, TEXT, TOKENS, V, check

from ebpo_core.fusionroute.traces.trace import RoutingTrace
from ebpo_core.fusionroute.vllm.client import RoutedServer, routed_tokens, routing_request


class Dumped:
    """As objects of the ``openai`` package are."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content

    def model_dump(self) -> dict[str, Any]:
        return self.content


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("wrap", [Dumped, dict])
def test_whole_answers_are_converted(served: RoutedOpenAIServer, chat: bool, wrap: Any) -> None:
    asked: dict[str, Any] = {"messages": MESSAGES} if chat else {"prompt": "x"}
    asked |= {"max_tokens": 99, **routing_request(V, 2, chat=chat)}
    answer = RoutedServer(served.root)._api.call("/chat/completions" if chat else "/completions", asked)
    (choice,) = answer["choices"]
    tokens = routed_tokens(wrap(choice["logprobs"]), V, 2)
    assert {token.text for token in tokens} == {None}
    text = choice["message"]["content"] if chat else choice["text"]
    with_text = routed_tokens(wrap(choice["logprobs"]), V, 2, text)
    check(RoutingTrace(NAMES, tuple(with_text), None, text), None if chat else [""] * (len(TOKENS) - 1) + [TEXT])
    assert [dataclasses.replace(token, text=None) for token in with_text] == tokens


@pytest.mark.parametrize("text", ["", "the Gr", "the Größe 🚲\nmore", "another"])
def test_texts_concatenate_whatever_tokens_say(text: str) -> None:
    """An answer that was cut at a stop string, or that a parser changed."""
    logprobs = logprobs_of(SCRIPT, routing_request(V, 2, chat=True), chat=True)
    tokens = routed_tokens(logprobs, V, 2, text)
    assert "".join(str(token.text) for token in tokens) == text
    assert len(tokens) == len(TOKENS)
    if text == "the Gr":
        assert [token.text for token in tokens[:4]] == ["the", " ", "G", "r"]


def test_no_tokens() -> None:
    assert routed_tokens({"content": []}, V, 2, "") == []
    assert routed_tokens({"tokens": [], "top_logprobs": [], "text_offset": [], "token_logprobs": []}, V, 2) == []


@pytest.mark.parametrize("chat", [True, False])
def test_answers_without_the_routing_are_refused(chat: bool) -> None:
    request = routing_request(V, 2, chat=chat)

    def refused(message: str, logprobs: Any, experts: int = 2) -> None:
        with pytest.raises(ValueError, match=message):
            routed_tokens(logprobs, V, experts, TEXT)

    for nothing in (None, {}, [], "x", {"content": None}, {"tokens": ["token_id:1"], "top_logprobs": None}):
        refused("expected the logprobs of", nothing)
    top = {"token": f"token_id:{V}"}
    for other in ({"content": [None]}, {"content": [{"token": "x", "top_logprobs": [top]}]}, {"content": [{}]}):
        refused("expected the logprobs of", other)
    for other in ({"tokens": ["x"], "top_logprobs": ["x"]}, {"tokens": ["x"], "top_logprobs": []}, {"tokens": 1}):
        refused("expected the logprobs of", other)
    unsaid = {"content": [{"token": "token_id:1", "top_logprobs": [{**top, "logprob": "-5000"}]}]}
    refused(f"token 0 has no log-probability of 'token_id:{V}'", unsaid)
    refused(f"token 0 has no log-probability of 'token_id:{V}'", logprobs_of(SCRIPT, {"logprobs": 1}, chat=chat))
    refused("has no log-probability of", logprobs_of(SCRIPT, request, chat=chat), experts=3)
    refused("carry no routing", logprobs_of(SCRIPT, request | routing_request(V, 1, chat=chat), chat=chat), experts=1)
    masked = [Step(step.id, step.text, step.own_text, [-1.0] * V + [-9999.0] * 4) for step in SCRIPT]
    refused("under a grammar", logprobs_of(masked, request, chat=chat))
    for name in ("the", "token_id:", "token_id:x", "token_id:-1", "token_id:1.0"):
        named = logprobs_of(SCRIPT[:1], request, chat=chat)
        assert named is not None
        if chat:
            named["content"][0] |= {"token": name}
        else:
            named["tokens"] = [name]
        refused(f"token='{name}': expected an id; .*return_tokens_as_token_ids", named)
