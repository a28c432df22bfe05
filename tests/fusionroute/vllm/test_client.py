"""The client of a served FusionRoute model against a real HTTP server that speaks vLLM's protocol."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("transformers")

import torch
from fusionroute_saved import save_fused
from fusionroute_tiny import tiny_tokenizer
from openai_server import running
from routed_server import RoutedOpenAIServer, greedy
from serving_script import BYTES, MESSAGES, NAMES, SCRIPT, TEXT, TOKENS, V, check

from ebpo_core.fusionroute import FusionRouteForCausalLM
from ebpo_core.fusionroute.vllm.client import RoutedServer

PROMPT = "w10 w20 w30"


# -------------------------------------------------------------------------------------------------- beside `generate`


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_fused(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> FusionRouteForCausalLM:
    return FusionRouteForCausalLM.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def real(model: FusionRouteForCausalLM) -> Iterator[RoutedOpenAIServer]:
    """A server of a real, tiny model."""
    with running(RoutedOpenAIServer(greedy(model, tiny_tokenizer()), ("math", "code"), 200)) as server:
        yield server


@pytest.mark.parametrize("group", [1, 5])
@pytest.mark.parametrize("kind", ["text", "ids", "messages"])
def test_the_trace_is_the_one_of_generate(kind: str, group: int, real: RoutedOpenAIServer, model: Any) -> None:
    real.group = group
    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": PROMPT}]
    ids = tokenizer(PROMPT)["input_ids"]
    if kind == "messages":
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    out = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, output_routing=True)
    expected = out.routing[0].with_text(tokenizer, ids)
    assert {token.expert for token in expected.tokens} == {0, 1}
    assert {token.overruled for token in expected.tokens} == {False, True}

    prompt: Any = {"text": PROMPT, "ids": ids, "messages": messages}[kind]
    trace = RoutedServer(real.root).trace(prompt, max_new_tokens=24)
    assert trace.prompt == (None if kind == "ids" else PROMPT)
    assert trace.text == expected.text
    for found, own in zip(trace.tokens, expected.tokens, strict=True):
        assert found.weight == pytest.approx(own.weight, abs=1e-5)
        text = own.text if group == 1 else found.text
        assert dataclasses.replace(found, weight=0) == dataclasses.replace(own, weight=0, text=text)


# ------------------------------------------------------------------------------------------------------- the stream


@pytest.mark.parametrize("url", ["{root}", "{root}/", "{root}/v1", "{root}/v1/"])
def test_what_is_served_is_discovered(served: RoutedOpenAIServer, url: str) -> None:
    server = RoutedServer(url.format(root=served.root))
    assert (server.model, server.experts, server.vocab_size) == ("fused", NAMES, V)
    check(server.trace("x"))


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("ending", ["done", "none"])
@pytest.mark.parametrize(("piece", "indent"), [(None, None), (7, None), (None, 1)])
def test_tokens_texts_and_the_token_that_ends_the_answer(
    served: RoutedOpenAIServer, chat: bool, ending: str, piece: int | None, indent: int | None
) -> None:
    """Characters of several tokens, and events that arrive in pieces or have several lines."""
    served.ending, served.piece, served.indent = ending, piece, indent
    trace = RoutedServer(served.root).trace(MESSAGES if chat else "What?")
    assert trace.prompt == "What?"
    check(trace)
    bicycle = TOKENS.index(BYTES("🚲")["input_ids"][0])
    assert [token.text for token in trace.tokens[bicycle:]] == ["", "", "", "🚲", "\n", ""]


@pytest.mark.parametrize("group", [2, 3, 4, len(TOKENS)])
def test_several_tokens_in_a_chunk(served: RoutedOpenAIServer, group: int) -> None:
    served.group = group
    server = RoutedServer(served.root)
    check(server.trace(MESSAGES))  # a chat says what each of them adds
    groups = [SCRIPT[start : start + group] for start in range(0, len(SCRIPT), group)]
    last = [[""] * (len(some) - 1) + ["".join(step.text for step in some)] for some in groups]
    check(server.trace("What?"), sum(last, []))  # noqa: RUF017 -- a few short lists


def test_the_request_is_what_was_asked_for(served: RoutedOpenAIServer) -> None:
    server = RoutedServer(served.root)
    list(server.stream(MESSAGES))
    list(
        server.stream(
            [5, 6],
            max_new_tokens=2,
            temperature=0.5,
            top_p=0.9,
            top_k=7,
            seed=3,
            stop=["end"],
            extra_body={"min_p": 0.1, "ignore_eos": True, "stream": False, "n": 2},
        )
    )
    assert served.requests[0] == {
        "model": "fused",
        "messages": MESSAGES,
        "max_tokens": 256,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "logprobs": True,
        "logprob_token_ids": [V, V + 1, V + 2, V + 3],
        "return_tokens_as_token_ids": True,
        "n": 1,
        "stream": True,
    }
    assert served.requests[1] == {
        **{name: value for name, value in served.requests[0].items() if name != "messages"},
        "prompt": [5, 6],
        "max_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "seed": 3,
        "logprobs": 4,
        "stop": ["end"],
        "include_stop_str_in_output": True,
        "min_p": 0.1,
        "ignore_eos": True,
    }


def test_tokens_come_as_they_are_written(served: RoutedOpenAIServer) -> None:
    served.gate = threading.Event()  # the server writes its second token when the test has read the first
    seen = []

    def see(token: Any) -> None:
        seen.append(token.text)
        served.gate.set()

    check(RoutedServer(served.root).trace("x", on_token=see))
    assert "".join(seen) == TEXT


@pytest.mark.parametrize("way", ["break", "close", "error"])
def test_to_leave_the_iterator_closes_the_connection(served: RoutedOpenAIServer, way: str) -> None:
    served.ending = "never"
    server = RoutedServer(served.root)
    if way == "break":
        for _ in server.stream("x"):
            break
    elif way == "close":
        with closing(server.stream("x")) as tokens:
            next(tokens)
    else:

        def leave(_: Any) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            server.trace(MESSAGES, on_token=leave)
    assert served.left.wait(60)
