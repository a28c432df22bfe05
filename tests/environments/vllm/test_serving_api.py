"""FusionRoute behind vLLM's real server and the ``openai`` client: tokens, routing, metrics, refusals, load.

The experts differ in architecture, depth, width, heads and attention window; prompts are read in chunks of 64 tokens
and through the prefix cache.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from checkpoints import MIXED, VOCAB, Answer, load, prompts, reference, save_checkpoint
from fusionroute_oracle import oracle_logits
from server import CHUNKED, NAME, Server, serving
from transformers import LogitsProcessorList

from ebpo_core.fusionroute import FusionRouteForCausalLM, RoutedToken
from ebpo_core.fusionroute.vllm.columns import decode, routing_ids

pytestmark = pytest.mark.timeout(900)  # engines start slowly on a busy machine

NEW = 24
IDS = routing_ids(VOCAB, len(MIXED))
ROUTING: dict[str, Any] = {"logprob_token_ids": IDS, "return_tokens_as_token_ids": True}
FREE: dict[str, Any] = {"ignore_eos": True, "add_special_tokens": False}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("mixed"), "llama", MIXED)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> FusionRouteForCausalLM:
    return load(checkpoint)


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    with serving(checkpoint, *CHUNKED) as one:
        yield one


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=300)


def ask(client: openai.OpenAI, prompt: list[int], new: int = NEW, **settings: Any) -> Any:
    """One completion of token ids, with the routing; ``settings`` that the client does not know go into the body."""
    known = {name: settings.pop(name) for name in ("temperature", "seed", "logit_bias") if name in settings}
    extra = FREE | ROUTING | settings
    return client.completions.create(
        model=NAME, prompt=prompt, max_tokens=new, **{"temperature": 0, "logprobs": len(IDS), **known}, extra_body=extra
    )


def tokens_of(answer: Any) -> list[int]:
    return [int(token.removeprefix("token_id:")) for token in answer.choices[0].logprobs.tokens]


def routing_of(answer: Any) -> list[RoutedToken]:
    rows = answer.choices[0].logprobs.top_logprobs
    found = [decode([row[f"token_id:{one}"] for one in IDS]) for row in rows]
    return [
        RoutedToken(token, column.expert, column.weight, token != column.own)
        for token, column in zip(tokens_of(answer), found, strict=True)
    ]


def metric(server: Server, name: str) -> float:
    """The sum over a metric's lines."""
    lines = re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", server.get("/metrics"), re.MULTILINE)
    assert lines, f"no metric {name}"
    return sum(map(float, lines))


def per_expert(server: Server, name: str) -> dict[str, float]:
    found = re.findall(rf'^{name}{{expert="(\w+)",index="\d"}} (\S+)$', server.get("/metrics"), re.MULTILINE)
    return {expert: float(value) for expert, value in found}


# ------------------------------------------------------------------------------------------------------ greedy, routing


def test_greedy_tokens_and_their_routing_are_generates(client: openai.OpenAI, model: Any) -> None:
    sure = 0
    for prompt in prompts([1, 5, 40, 150, 300]):
        expected = reference(model, prompt, NEW)
        answer = ask(client, prompt)
        expected.check(tokens_of(answer), routing_of(answer))
        sure += expected.sure
    assert sure > 4 * NEW  # the comparison is of most tokens
    # All experts wrote: a model that ran one of them only would not pass.
    assert {token.expert for token in expected.routing} == {0, 1, 2}


def test_a_prompt_from_the_prefix_cache_gives_the_same(client: openai.OpenAI, model: Any, server: Server) -> None:
    (prompt,) = prompts([200], seed=5)
    hits = "vllm:prefix_cache_hits_total"
    first = ask(client, prompt)
    before = metric(server, hits)
    again = ask(client, prompt)
    assert metric(server, hits) - before >= 128
    assert tokens_of(again) == tokens_of(first)
    reference(model, prompt, NEW).check(tokens_of(again), routing_of(again))


def test_logprobs_of_samples_are_the_policys(client: openai.OpenAI, model: Any) -> None:
    (prompt,) = prompts([30], seed=1)
    answer = ask(client, prompt, temperature=1.0, seed=3)
    tokens, routing = tokens_of(answer), routing_of(answer)
    assert tokens != tokens_of(ask(client, prompt))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0]
    policy = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    for step, (token, found) in enumerate(zip(tokens, answer.choices[0].logprobs.token_logprobs, strict=True)):
        assert found == pytest.approx(policy[step, token].item(), abs=1e-4)
    # The same from the models' plain forwards, for the expert the server says.
    for step in (0, 10, 20):
        plain = oracle_logits(model, prompt + tokens[:step], routing[step].expert).log_softmax(-1)
        assert answer.choices[0].logprobs.token_logprobs[step] == pytest.approx(plain[tokens[step]].item(), abs=1e-4)


class _Frequency:
    """What OpenAI's frequency and presence penalties are: of the tokens that were answered so far."""

    def __init__(self, prompt: int, frequency: float, presence: float) -> None:
        self.prompt, self.frequency, self.presence = prompt, frequency, presence

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(ids[0, self.prompt :], minlength=scores.shape[1])
        return scores - self.frequency * counts - self.presence * (counts > 0)


def test_biases_and_penalties_act_on_the_fused_logits(client: openai.OpenAI, model: Any) -> None:
    (prompt,) = prompts([20], seed=2)
    plain = reference(model, prompt, NEW).tokens
    most = max(set(plain), key=plain.count)
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"logit_bias": {str(most): -9.0}}, {"sequence_bias": {(most,): -9.0}}),
        ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
        ({"bad_words": [f"w{most}"]}, {"bad_words_ids": [[most]]}),
        (
            {"frequency_penalty": 2.0, "presence_penalty": 2.0},
            {"logits_processor": LogitsProcessorList([_Frequency(len(prompt), 2.0, 2.0)])},
        ),
        ({"allowed_token_ids": list(range(6, 60))}, {"suppress_tokens": [*range(6), *range(60, VOCAB)]}),
    ]
    for ours, theirs in cases:
        expected = reference(model, prompt, NEW, **theirs)
        assert expected.tokens != plain, ours
        found = tokens_of(ask(client, prompt, **ours))
        # The margin that counts is of the processed logits, which `settled` does not see: most, not all.
        agreed = next((step for step in range(NEW) if found[step] != expected.tokens[step]), NEW)
        assert agreed >= 12, (ours, found, expected.tokens)


def test_routing_is_streamed_through_the_chat_api(client: openai.OpenAI, model: Any, checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    messages: Any = [{"role": "user", "content": "w50 w61 w72 w83"}]
    ids = AutoTokenizer.from_pretrained(checkpoint).apply_chat_template(messages, add_generation_prompt=True)
    expected = reference(model, ids["input_ids"], NEW)
    stream = client.chat.completions.create(
        model=NAME,
        messages=messages,
        temperature=0,
        max_tokens=NEW,
        logprobs=True,
        stream=True,
        extra_body={"ignore_eos": True, **ROUTING},
    )
    routing, arrivals = [], 0
    for chunk in stream:
        content = chunk.choices[0].logprobs.content if chunk.choices and chunk.choices[0].logprobs else None
        arrivals += bool(content)
        for one in content or ():
            values = {other.token: other.logprob for other in one.top_logprobs}
            column = decode([values[f"token_id:{extra}"] for extra in IDS])
            token = int(one.token.removeprefix("token_id:"))
            routing.append(RoutedToken(token, column.expert, column.weight, token != column.own))
    assert arrivals > NEW // 2  # as they were written, not at the end
    expected.check([token.id for token in routing], routing)


def test_metrics_count_every_emitted_token_of_every_expert(client: openai.OpenAI, server: Server) -> None:
    assert metric(server, "fusionroute_vocab_size") == VOCAB
    before = {name: per_expert(server, f"fusionroute_{name}_total") for name in ("tokens", "overruled_tokens")}
    generated = metric(server, "vllm:generation_tokens_total")
    expected = {name: dict.fromkeys(MIXED, 0) for name in before}
    for prompt in prompts([3, 70, 130], seed=4):
        for temperature in (0.0, 1.0):
            for token in routing_of(ask(client, prompt, temperature=temperature)):
                name = list(MIXED)[token.expert]
                expected["tokens"][name] += 1
                expected["overruled_tokens"][name] += token.overruled
    for name, earlier in before.items():
        now = per_expert(server, f"fusionroute_{name}_total")
        assert {expert: now[expert] - earlier[expert] for expert in now} == expected[name]
    assert metric(server, "vllm:generation_tokens_total") - generated == sum(expected["tokens"].values())
    assert metric(server, "fusionroute_tokens_total") == metric(server, "vllm:generation_tokens_total")
    assert metric(server, "fusionroute_token_share") == pytest.approx(1)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("extra", [IDS[0], IDS[-1]])
def test_extra_ids_cannot_be_asked_for(client: openai.OpenAI, server: Server, extra: int) -> None:
    (prompt,) = prompts([8])
    for settings in ({"allowed_token_ids": [extra]}, {"logit_bias": {str(extra): 100}}, {"stop_token_ids": [extra]}):
        with pytest.raises(openai.BadRequestError, match="carry the routing"):
            ask(client, prompt, **settings)
        assert server.healthy()
    # In a prompt vLLM lets them pass, as ids of the model; they stand for no token.
    for answer in (ask(client, [extra]), ask(client, [*prompt, extra, *prompt])):
        assert all(token < VOCAB for token in tokens_of(answer))
    assert server.healthy()
    assert tokens_of(ask(client, prompt)) == tokens_of(ask(client, prompt))


def test_extra_ids_are_not_what_is_left_when_all_else_is_forbidden(client: openai.OpenAI, server: Server) -> None:
    (prompt,) = prompts([8])
    allowed = list(range(50, 150))
    forbidden = [f"w{token}" for token in allowed]
    for temperature in (0, 2):
        settings = {"allowed_token_ids": allowed, "bad_words": forbidden, "temperature": temperature, "seed": 0}
        tokens = tokens_of(ask(client, prompt, **settings))
        assert all(token < VOCAB for token in tokens)
    assert server.healthy()


def test_malformed_requests_are_refused_and_the_engine_lives(client: openai.OpenAI, server: Server) -> None:
    (prompt,) = prompts([8])
    wrong: list[dict[str, Any]] = [
        {"logprob_token_ids": [IDS[-1] + 1]},
        {"logprob_token_ids": [-1]},
        {"logprob_token_ids": ["x"]},
        {"allowed_token_ids": []},
        {"logit_bias": {"x": 1}},
        {"temperature": -1},
        {"prompt": prompts([500])[0]},
        {"prompt": [10**9]},
        {"prompt": [-5]},
        {"prompt": []},
        {"max_tokens": -1},
        {"structured_outputs": {"regex": "("}},
        {"n": 0},
    ]
    for settings in wrong:
        body = {"model": NAME, "prompt": prompt, "max_tokens": 4, "logprobs": len(IDS), **ROUTING, **settings}
        with pytest.raises(openai.APIStatusError) as error:
            client.post("/completions", body=body, cast_to=object)
        assert 400 <= error.value.status_code < 500, settings
        assert server.healthy(), settings
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt=prompt)


# ----------------------------------------------------------------------------------------------------------------- load


def test_a_thousand_requests_with_aborts_leave_no_wrong_token_and_nothing_behind(
    model: Any, server: Server, client: openai.OpenAI
) -> None:
    lengths, news = [1, 7, 33, 64, 65, 120, 200], [1, 2, 9, 24]
    asked = prompts(lengths, seed=9)
    longest = [reference(model, prompt, max(news)) for prompt in asked]
    aborted, wrong, total = 0, [], 1000
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, 2**31, (total, 3), generator=generator).tolist()
    memory = _resident(server)

    async def soak() -> None:
        nonlocal aborted
        gate = asyncio.Semaphore(24)
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=600) as many:

            async def one(pick: list[int]) -> None:
                nonlocal aborted
                index, new = pick[0] % len(lengths), news[pick[1] % len(news)]
                async with gate:
                    stream = await many.completions.create(
                        model=NAME,
                        prompt=asked[index],
                        max_tokens=new,
                        temperature=0,
                        logprobs=len(IDS),
                        stream=True,
                        extra_body=FREE | ROUTING,
                    )
                    tokens: list[int] = []
                    stop_after = pick[2] % 8 if pick[2] % 4 == 0 else None
                    async for chunk in stream:
                        if chunk.choices and chunk.choices[0].logprobs:
                            found = chunk.choices[0].logprobs.tokens or []
                            tokens += [int(token.removeprefix("token_id:")) for token in found]
                        if stop_after is not None and len(tokens) > stop_after:
                            aborted += 1
                            await stream.close()
                            break
                answer: Answer = longest[index]
                sure = min(len(tokens), answer.sure)
                if tokens[:sure] != answer.tokens[:sure] or (stop_after is None and len(tokens) != new):
                    wrong.append((index, new, tokens))

            await asyncio.gather(*(one(pick) for pick in picks))

    asyncio.run(soak())
    assert not wrong, wrong[:3]
    assert aborted > 50
    # Everything was given back: no request runs or waits, no block of a cache is held, and memory stays.
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        _until_zero(server, name)
    assert _resident(server) < memory + 300 * 2**20
    for prompt, answer in zip(asked, longest, strict=True):
        answer.check(tokens_of(ask(client, prompt)))
    # The engine wrote on for a step or two where a client had left; the server does not count those tokens.
    uncounted = metric(server, "fusionroute_tokens_total") - metric(server, "vllm:generation_tokens_total")
    assert 0 <= uncounted <= 8 * aborted


def _until_zero(server: Server, name: str) -> None:
    import time

    for _ in range(100):
        if metric(server, name) == 0:
            return
        time.sleep(0.2)
    raise AssertionError(f"{name} is {metric(server, name)} after the last request")


def _resident(server: Server) -> int:
    """Bytes of the server's process and of those it started."""
    total, waiting = 0, [server.process.pid]
    while waiting:
        pid = waiting.pop()
        status = Path(f"/proc/{pid}/status").read_text()
        total += int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]
        for task in Path(f"/proc/{pid}/task").iterdir():
            waiting += [int(child) for child in (task / "children").read_text().split()]
    return total
