"""Sampling with a real tiny model, in this process and behind a real HTTP server, against torch's own distributions."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from openai_server import OpenAIServer, serving

from ebpo_core.evaluation.journal import Journal
from ebpo_core.evaluation.local_model import LocalModel, SeededChoice, complete, weights_fingerprint
from ebpo_core.evaluation.problems import PromptFormat, load_problems
from ebpo_core.evaluation.sampling import (
    KEY,
    KIND,
    Completion,
    Request,
    SamplingOptions,
    collect,
    missing_requests,
    sample_seed,
)
from ebpo_core.evaluation.scoring import load_scorer
from ebpo_core.evaluation.server import Server, ServerError, ServerModel, completion_of
from ebpo_core.models import load_model
from ebpo_core.tasks.tiny_model import build_tokenizer, save_tiny_model

FIELDS = ("model", "max_tokens", "temperature", "top_p", "top_k", "seed", "n")
TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), hidden_size=32, layers=2)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    # What a model's own config would do to sampling, if it were inherited: see that it is not.
    config = json.loads((folder / "generation_config.json").read_text())
    config |= {"do_sample": True, "temperature": 0.01, "top_k": 1, "repetition_penalty": 50.0, "min_new_tokens": 5}
    config |= {"suppress_tokens": [7], "forced_eos_token_id": 9}
    (folder / "generation_config.json").write_text(json.dumps(config))
    return str(folder)


def requests(count: int, samples: int = 1, *, chat: bool = False, seed: int = 0) -> list[Request]:
    form = PromptFormat(chat=chat)
    return [
        Request(problem, form(problem.prompt), sample, sample_seed(seed, problem.id, sample))
        for problem in load_problems("countdown", size=count)
        for sample in range(samples)
    ]


def drawn(backend: Any, wanted: list[Request]) -> dict[tuple[str, int], Completion]:
    found = [pair for batch in backend.generate(wanted) for pair in batch]
    assert len(found) == len(wanted)
    return {(request.problem.id, request.sample): completion for request, completion in found}


def local(model: str, batch_size: int = 64, **options: Any) -> LocalModel:
    options = {"max_new_tokens": 6, **options}
    return LocalModel(model, SamplingOptions(**options), batch_size=batch_size, dtype="float32", device="cpu")


def test_tokens_are_drawn_with_the_models_probabilities(model: str) -> None:
    """The first token of many samples against softmax of the logits, by a chi-squared test."""
    problem = load_problems("countdown", size=1)[0]
    wanted = [Request(problem, problem.prompt, i, sample_seed(1, problem.id, i)) for i in range(4000)]
    network, tokenizer = load_model(model, dtype="float32")
    encoded = tokenizer(problem.prompt, return_tensors="pt")
    with torch.no_grad():
        logits = network(input_ids=encoded["input_ids"]).logits[0, -1].double()
    for options, kept in (({}, len(logits)), ({"temperature": 0.5, "top_k": 20}, 20)):
        backend = local(model, batch_size=2000, max_new_tokens=1, **options)
        counts = Counter(completion.text for completion in drawn(backend, wanted).values())
        scaled = logits / options.get("temperature", 1.0)
        scaled[scaled < scaled.topk(kept).values[-1]] = -math.inf
        expected = Counter()  # special tokens all decode to nothing
        for token, share in enumerate(scaled.softmax(0).tolist()):
            expected[tokenizer.decode([token], skip_special_tokens=True)] += 4000 * share
        assert set(counts) <= {text for text, share in expected.items() if share > 0}
        statistic = sum((counts[text] - share) ** 2 / share for text, share in expected.items() if share > 0)
        degrees = sum(share > 0 for share in expected.values()) - 1
        assert statistic < degrees + 5 * math.sqrt(2 * degrees)


def test_top_p_keeps_the_smallest_likely_set() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    choice = SeededChoice(SamplingOptions(max_new_tokens=1, top_p=0.6), range(4000))
    picked = choice(torch.zeros(4000, 1, dtype=torch.long), logits).argmax(-1)
    counts = torch.bincount(picked, minlength=4).tolist()
    assert counts[2:] == [0, 0]
    assert counts[0] / 4000 == pytest.approx(0.625, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_without_probability_is_never_drawn(dtype: torch.dtype) -> None:
    logits = torch.full((5000, 8), -torch.inf, dtype=dtype)
    logits[:, 2], logits[:, 5] = 0.0, -20.0
    choice = SeededChoice(SamplingOptions(max_new_tokens=1), range(5000))
    choice.uniforms[:, :2] = [0.0, 1 - 2**-53]
    out = choice(torch.zeros(5000, 1, dtype=torch.long), logits)
    assert set(out.argmax(-1).tolist()) <= {2, 5}
    assert out.dtype == dtype
    assert (out == 0).sum(-1).tolist() == [1] * 5000


def test_a_sample_does_not_depend_on_its_batch(model: str) -> None:
    wanted = requests(12, 3)
    together = drawn(local(model), wanted)
    alone = drawn(local(model, batch_size=5), list(reversed(wanted)))
    assert together == alone
    assert drawn(local(model), requests(12, 3, seed=1)) != together
    assert len({completion.text for completion in together.values()}) > 20


def test_lengths_and_finish_reasons(model: str) -> None:
    completions = drawn(local(model, max_new_tokens=30, temperature=2.0), requests(40)).values()
    reasons = Counter(completion.finish_reason for completion in completions)
    assert set(reasons) == {"stop", "length"}
    for completion in completions:
        assert completion.tokens is not None
        assert completion.tokens == 30 if completion.finish_reason == "length" else completion.tokens <= 30
    # min_new_tokens of the model's own config would allow none of these
    assert min(completion.tokens or 0 for completion in completions) < 5


def test_temperature_zero_is_greedy(model: str) -> None:
    network, tokenizer = load_model(model, dtype="float32")
    wanted = requests(6)
    for request, completion in zip(wanted, drawn(local(model, temperature=0.0), wanted).values(), strict=True):
        ids = tokenizer(request.prompt, return_tensors="pt")["input_ids"]
        for _ in range(6):
            with torch.no_grad():
                token = network(input_ids=ids).logits[0, -1].argmax()
            if token == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, token.reshape(1, 1)], 1)
        prompt = tokenizer(request.prompt)["input_ids"]
        assert completion.text == tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)


def test_chats_go_through_the_template_and_need_one(model: str, tmp_path: Path) -> None:
    chat, text = requests(4, chat=True), requests(4)
    assert isinstance(chat[0].prompt, list)
    # The template writes no <bos>: the same words, but another sequence.
    assert drawn(local(model), chat) != drawn(local(model), text)
    assert drawn(local(model), chat) == drawn(local(model, batch_size=1), chat)
    with pytest.raises(ValueError, match="one kind"):
        drawn(local(model), [chat[0], text[1]])
    save_tiny_model(tmp_path, hidden_size=32, layers=1)
    with pytest.raises(ValueError, match="no chat template"):
        drawn(local(str(tmp_path)), chat)


def test_a_models_fingerprint_is_its_weights(model: str, tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        save_tiny_model(tmp_path / name, hidden_size=32, layers=1, seed=seed)
    one, same, other = (weights_fingerprint(tmp_path / name) for name in ("one", "same", "other"))
    assert one == same
    assert one != other
    settings = local(model).settings()
    assert settings["model"] == Path(model).name
    assert settings["weights"] == weights_fingerprint(Path(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, r"temperature=-1\.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_p": 0.0}, r"top_p=0\.0"),
        ({"top_p": 1.1}, r"top_p=1\.1"),
        ({"top_k": -1}, "top_k=-1"),
    ],
)
def test_sampling_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**options)


def served(server: OpenAIServer, name: str | None = None, **options: Any) -> ServerModel:
    sampling = {"max_new_tokens": 6, **options.pop("sampling", {})}
    return ServerModel(
        Server(server.url, retries=options.pop("retries", 3)), name, SamplingOptions(**sampling), **options
    )


@pytest.mark.parametrize("chat", [False, True])
def test_a_server_draws_what_the_same_model_draws_here(model: str, chat: bool) -> None:
    wanted = requests(6, 2, chat=chat)
    sampling = {"temperature": 0.8, "top_p": 0.9, "top_k": 30}
    with serving(model) as server:
        here = drawn(local(model, batch_size=1, **sampling), wanted)
        # A server sends no token ids.
        expected = {name: completion._replace(ids=None) for name, completion in here.items()}
        assert drawn(served(server, sampling=sampling), wanted) == expected
        assert {tuple(sorted(body)) for body in server.requests} == {
            tuple(sorted([*FIELDS, "messages" if chat else "prompt"]))
        }


def test_vllm_is_told_what_it_would_take_from_the_model(model: str) -> None:
    with serving(model, owner="vllm") as server:
        drawn(served(server), requests(1))
        assert {name: server.requests[0][name] for name in ("top_k", "min_p", "repetition_penalty")} == {
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        backend = served(server, extra_body={"chat_template_kwargs": {}})
        drawn(backend, requests(1))
        assert "min_p" not in server.requests[1]
        assert backend.settings() == {"kind": "server", "model": "tiny", "extra_body": {"chat_template_kwargs": {}}}
    with serving(model) as server:
        drawn(served(server), requests(1))
        assert not {"top_k", "min_p"} & set(server.requests[0])


def test_passing_failures_are_tried_again(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = requests(5)
    with serving(model) as server:
        expected = drawn(served(server), wanted)
        half = {"Content-Length": "1000", "Connection": "close"}  # of what a refusal says
        server.failures = [(503, {}), "drop", (429, {"Retry-After": "0"}), "half", (500, half), (408, {})]
        assert drawn(served(server, retries=4, concurrency=2), wanted) == expected
        assert server.failures == []
        assert len(server.requests) == 5 + 5 + 6


def test_retry_after_is_waited_for(model: str) -> None:
    with serving(model) as server:
        server.failures = [(429, {"Retry-After": "1.5"})]
        start = time.monotonic()
        drawn(served(server), requests(1))
        assert time.monotonic() - start >= 1.5  # what the server asked for is a promise, not a speed


def test_a_refusal_is_final_and_keeps_what_arrived(model: str, tmp_path: Path) -> None:
    problems = load_problems("countdown", size=8)
    options = SamplingOptions(max_new_tokens=6)
    with serving(model) as server, load_scorer(None, "countdown") as scorer:
        with Journal(tmp_path / "s.jsonl", KIND, {}, KEY) as journal:
            wanted = missing_requests(problems, 1, journal, options, PromptFormat())
            # Every one of the first three is answered before the fourth is sent.
            backend = served(server, concurrency=1)
            server.failures = [None, None, None, (400, {})]
            with pytest.raises(ServerError, match=r"/completions: status 400.*status 400"):
                collect(wanted, backend, scorer, journal)
            assert len(journal.records) == 3
        with Journal(tmp_path / "s.jsonl", KIND, {}, KEY) as journal:
            wanted = missing_requests(problems, 1, journal, options, PromptFormat())
            assert collect(wanted, served(server), scorer, journal) == 5
            assert len(journal.records) == 8
        assert len(server.requests) == 4 + 5


def test_retries_end_and_say_what_to_do(model: str) -> None:
    with serving(model) as server:
        server.failures = [(503, {})] * 2
        with pytest.raises(ServerError, match=r"tried 2 times.*status 503.*run the same command again"):
            drawn(served(server, retries=1, concurrency=1), requests(3))
        url = server.url
    with pytest.raises(ServerError, match="Is the server running"):
        Server(url, retries=0).models()


def test_a_slow_server_times_out(model: str) -> None:
    with serving(model) as server, server._generating:
        backend = ServerModel(Server(server.url, timeout=0.3, retries=0), None, SamplingOptions(max_new_tokens=6))
        with pytest.raises(ServerError, match="tried 1 times.*[Tt]ime"):
            drawn(backend, requests(1))


def test_concurrency_is_what_was_asked_for(model: str) -> None:
    with serving(model) as server:
        drawn(served(server, concurrency=3), requests(12))
        assert 1 < server.most_at_once <= 3


def test_the_key_is_sent_and_not_written_down(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(model, key="secret") as server:
        with pytest.raises(ServerError, match="401"):
            served(server)
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        backend = served(server)
        drawn(backend, requests(1))
        assert "secret" not in json.dumps(backend.settings())


def test_which_model(model: str) -> None:
    with serving(model) as server:
        assert served(server).model == "tiny"
        with pytest.raises(ValueError, match="model='other': the server offers"):
            served(server, "other")
        with pytest.raises(ValueError, match="concurrency=0"):
            served(server, concurrency=0)
    for url in ("localhost:8000", "file:///etc/passwd", ""):
        with pytest.raises(ValueError, match="expected a URL"):
            Server(url)


@pytest.mark.parametrize(
    ("answer", "text", "reason"),
    [
        ({"choices": [{"message": {"content": None}, "finish_reason": "length"}]}, "", "length"),
        ({"choices": [{"text": "1 + 2"}], "usage": None}, "1 + 2", "unknown"),
    ],
)
def test_shapes_of_answers(answer: dict[str, Any], text: str, reason: str) -> None:
    assert completion_of(answer)[:2] == (text, reason)


@pytest.mark.parametrize("answer", [{}, {"choices": []}, {"choices": [{}]}, {"choices": None}])
def test_an_answer_without_a_completion_is_an_error(answer: dict[str, Any]) -> None:
    with pytest.raises(ServerError, match="holds no completion"):
        completion_of(answer)


def test_a_loaded_model_draws_what_its_name_draws_and_stays_as_it_was(model: str) -> None:
    network, tokenizer = load_model(model, dtype="float32")
    wanted, options = requests(6, 2), SamplingOptions(max_new_tokens=6)
    config, state = network.generation_config, torch.random.get_rng_state()
    network.train()
    loaded = LocalModel(network, options, tokenizer=tokenizer)
    assert drawn(loaded, wanted) == drawn(local(model), wanted)
    assert network.training
    assert network.generation_config is config
    assert torch.equal(state, torch.random.get_rng_state())
    with pytest.raises(ValueError, match="a loaded LlamaForCausalLM has no name"):
        loaded.settings()
    for arguments, message in (
        ((model,), "is a name: .* leave it out"),
        ((network,), "for a model by its name"),
    ):
        with pytest.raises(ValueError, match=message):
            LocalModel(*arguments, options, tokenizer=tokenizer, dtype="float32")
    with pytest.raises(ValueError, match="tokenizer is missing"):
        LocalModel(network, options)


def test_completions_of_prompts_are_seeded_counted_and_steered(model: str) -> None:
    network, tokenizer = load_model(model, dtype="float32")
    prompts = [problem.prompt for problem in load_problems("countdown", size=3)] * 2
    done: list[tuple[int, int]] = []
    options = SamplingOptions(max_new_tokens=6, temperature=2.0)
    first = complete(network, tokenizer, prompts, options, batch_size=4, on_batch=lambda *count: done.append(count))
    assert done == [(4, 6), (6, 6)]
    assert first == complete(network, tokenizer, prompts, options)
    assert first[:3] != first[3:], "equal prompts are drawn with seeds of their own"
    seven = [lambda _ids, scores: torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([7]), 0.0)]
    for temperature in (0.0, 1.0):
        options = SamplingOptions(max_new_tokens=2, temperature=temperature)
        found = complete(network, tokenizer, prompts, options, logits_processor=seven)
        assert [completion.ids for completion in found] == [(7, 7)] * 6
