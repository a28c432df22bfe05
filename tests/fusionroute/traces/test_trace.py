"""The routing trace: its JSON form, strictness, token texts, and the numbers drawn from it."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("transformers")

import torch
from fusionroute_traces import byte_tokenizer, example, fallback_tokenizer, trace_of, traces
from hypothesis import given
from hypothesis import strategies as st

from ebpo_core.fusionroute.traces.token_texts import token_texts
from ebpo_core.fusionroute.traces.trace import RoutedToken, RoutingTrace, dump, load

if TYPE_CHECKING:
    from pathlib import Path

BYTES = byte_tokenizer()
FALLBACK = fallback_tokenizer()
TEXTS = ["the sum", "naïve café — 中文 🙂👩‍👩‍👧", "", "  two\n\nlines\t", "the" * 90, "中" * 90]


def untexted(ids: list[int]) -> RoutingTrace:
    return RoutingTrace(("a",), tuple(RoutedToken(token, 0, 1.0, False) for token in ids))


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)) if ids else ""


# ---------------------------------------------------------------------------------------------------------- JSON


@given(trace=traces())
def test_json_gives_back_every_field(trace: RoutingTrace) -> None:
    assert RoutingTrace.from_dict(json.loads(json.dumps(trace.to_dict()))) == trace


@given(several=st.lists(traces(), min_size=1, max_size=3), lines=st.booleans())
def test_files_give_back_every_trace(several: list[RoutingTrace], lines: bool, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("traces") / ("t.jsonl" if lines else "t.json")
    assert dump(path, several) == path
    assert load(path) == several
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    if lines:
        assert path.read_text(encoding="utf-8").count("\n") == len(several)
    else:
        assert isinstance(json.loads(path.read_text(encoding="utf-8")), list if len(several) > 1 else dict)


def test_the_documented_form() -> None:
    trace = trace_of([(" the", 1, True)])
    assert trace.to_dict() == {
        "format": "fusionroute/trace",
        "version": 1,
        "experts": ["math", "code"],
        "prompt": None,
        "text": " the",
        "tokens": [{"id": 100, "text": " the", "expert": 1, "weight": 1.0, "overruled": True}],
    }


def test_nullable_keys_may_be_left_out_and_whole_weights_may_be_ints() -> None:
    content = {"format": "fusionroute/trace", "version": 1, "experts": ["a"]}
    trace = RoutingTrace.from_dict({**content, "tokens": [{"id": 3, "expert": 0, "weight": 1, "overruled": False}]})
    assert (trace.prompt, trace.text, trace.tokens[0].text) == (None, None, None)


TOKEN = {"id": 1, "text": "x", "expert": 0, "weight": 0.5, "overruled": False}
TRACE = {"format": "fusionroute/trace", "version": 1, "experts": ["a", "b"], "prompt": None, "text": "x"}


@pytest.mark.parametrize(
    ("trace", "token", "message"),
    [
        ({"format": "other"}, {}, "format='other'"),
        ({"version": 2}, {}, "version=2"),
        ({"version": True}, {}, "version=True"),
        ({"versoin": 1}, {}, "unknown 'versoin'"),
        ({"experts": []}, {}, "at least one"),
        ({"experts": "ab"}, {}, "experts='ab'"),
        ({"experts": ["a", "a"]}, {}, "distinct"),
        ({"experts": ["a", 1]}, {}, "found 1"),
        ({"experts": None}, {}, "expected a list"),
        ({"prompt": 3}, {}, "prompt=3"),
        ({"text": "y"}, {}, "do not concatenate"),
        ({"text": ["x"]}, {}, "text="),
        ({"tokens": {}}, {}, "tokens: expected a list"),
        ({}, {"expert": 2}, r"tokens\[0\].expert=2: there are 2 experts"),
        ({}, {"expert": -1}, r"tokens\[0\]: expert=-1"),
        ({}, {"expert": True}, "expert=True"),
        ({}, {"expert": 0.0}, "expert=0.0"),
        ({}, {"id": "1"}, "id='1'"),
        ({}, {"weight": 1.5}, "weight=1.5"),
        ({}, {"weight": math.nan}, "weight=nan"),
        ({}, {"weight": True}, "weight=True"),
        ({}, {"overruled": 0}, "overruled=0"),
        ({}, {"text": 1}, "text=1"),
        ({}, {"text": "\ud800"}, "surrogate"),
        ({}, {"logprob": 0.1}, "unknown 'logprob'"),
    ],
)
def test_anything_else_is_refused_by_name(trace: dict[str, Any], token: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutingTrace.from_dict({**TRACE, "tokens": [{**TOKEN, **token}], **trace})


@pytest.mark.parametrize("key", ["format", "version", "experts", "tokens"])
def test_a_missing_key_of_a_trace_is_named(key: str) -> None:
    content = {**TRACE, "tokens": [TOKEN]}
    del content[key]
    with pytest.raises(ValueError, match=key):
        RoutingTrace.from_dict(content)


@pytest.mark.parametrize("key", ["id", "expert", "weight", "overruled"])
def test_a_missing_key_of_a_token_is_named(key: str) -> None:
    token = {name: value for name, value in TOKEN.items() if name != key}
    with pytest.raises(ValueError, match=f"missing '{key}'"):
        RoutingTrace.from_dict({**TRACE, "tokens": [token]})


def test_files_that_hold_no_trace(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    good = json.dumps(example().to_dict())
    for content, message in [
        ("", "holds no trace"),
        ("[]", "holds no trace"),
        ("nonsense", "not JSON"),
        ('{"format": 1}', "trace 0: format=1"),
        ("[3]", "trace 0: format='int'"),
        (f"[{good}, {{}}]", "trace 1: "),
        (f"{good}\n{{}}\n", "line 2: format=None"),
        (f"{good}\n\n{good[:-4]}\n", "line 3: "),
        (good[:-4], "not JSON"),
        (json.dumps(example().to_dict(), indent=1)[:-40], r"not JSON \((?!line 1:)"),
    ]:
        file.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=message) as error:
            load(file)
        assert str(file) in str(error.value)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not JSON"):
        load(file)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(tmp_path)
    with pytest.raises(ValueError, match="at least one"):
        dump(file, [])


def test_lines_are_read_whatever_the_name_and_however_they_are_broken(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    awkward = trace_of([("\u2028\u0085\r\n", 0, False)])
    lines = [json.dumps(trace.to_dict(), ensure_ascii=False) for trace in (awkward, example())]
    file.write_text("\r\n\r\n".join(lines) + "\r\n", encoding="utf-8", newline="")
    assert load(file) == [awkward, example()]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = dump(tmp_path / "t.json", example())
    before = file.read_bytes()
    with pytest.raises(AttributeError):
        dump(file, [example(), None])  # type: ignore[list-item]
    assert file.read_bytes() == before


# ---------------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize("kind", [list, np.asarray, torch.tensor])
def test_columns_of_lists_arrays_and_tensors(kind: Any) -> None:
    trace = RoutingTrace.from_columns(
        ["a", "b"], kind([5, 6]), kind([1, 0]), kind([0.25, 1.0]), kind([True, False]), prompt="p"
    )
    assert trace == RoutingTrace(("a", "b"), (RoutedToken(5, 1, 0.25, True), RoutedToken(6, 0, 1.0, False)), "p")
    json.dumps(trace.to_dict())


def test_columns_of_unequal_length() -> None:
    with pytest.raises(ValueError, match=r"lengths \[2, 1, 1, 1\]"):
        RoutingTrace.from_columns(["a"], [1, 2], [0], [1.0], [False])


def test_the_constructor_keeps_lists_as_tuples_and_checks_them() -> None:
    trace = RoutingTrace(["a"], [RoutedToken(1, 0, 1.0, False)])  # type: ignore[arg-type]
    assert hash(trace) == hash(RoutingTrace(("a",), (RoutedToken(1, 0, 1.0, False),)))
    with pytest.raises(ValueError, match=r"tokens\[0\]=1"):
        RoutingTrace(("a",), (1,))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("text", TEXTS, ids=["ascii", "unicode", "empty", "spaces", "long", "long-unicode"])
@pytest.mark.parametrize("tokenizer", [BYTES, FALLBACK], ids=["bytes", "fallback"])
def test_token_texts_concatenate_to_the_decoded_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    trace = untexted(ids).with_text(tokenizer)
    assert trace.text == "".join(token.text or "" for token in trace.tokens) == decoded(tokenizer, ids)
    if tokenizer is BYTES:
        assert trace.text == text


def test_a_character_goes_to_the_token_that_completes_it() -> None:
    ids = BYTES("ab中🙂c", add_special_tokens=False)["input_ids"]
    pieces = [token.text for token in untexted(ids).with_text(BYTES).tokens]
    assert pieces == ["a", "b", "", "", "中", "", "", "", "🙂", "c"]
    cut = untexted(ids[:4]).with_text(BYTES)
    assert [token.text for token in cut.tokens] == ["a", "b", "\ufffd", ""], (
        "what never completes shows where it begins"
    )


@given(ids=st.lists(st.integers(0, 257), max_size=12), repeats=st.integers(1, 12))
def test_any_bytes_concatenate(ids: list[int], repeats: int) -> None:
    trace = untexted(ids * repeats).with_text(BYTES)
    assert trace.text == "".join(token.text or "" for token in trace.tokens) == decoded(BYTES, ids * repeats)


@given(ids=st.lists(st.integers(1, 267), max_size=12), repeats=st.integers(1, 12), prompt=st.booleans())
def test_any_fallback_bytes_concatenate(ids: list[int], repeats: int, prompt: bool) -> None:
    """One wrong byte in a run turns the whole run to U+FFFD, so earlier texts would have been taken back."""
    ids = ids * repeats
    context = FALLBACK("a b", add_special_tokens=False)["input_ids"] if prompt else None
    trace = untexted(ids).with_text(FALLBACK, context)
    joined = "".join(token.text or "" for token in trace.tokens)
    assert trace.text == joined
    whole = decoded(FALLBACK, (context or []) + ids)
    assert joined == whole if context is None else whole.endswith(joined)
    assert context is None or not ids or len(whole) - len(joined) <= len("a b")


@given(text=st.text(st.characters(codec="utf-8"), max_size=200))
def test_valid_text_is_spread_without_replacement_characters(text: str) -> None:
    """Across the window at which decoding restarts, too: up to 800 byte tokens."""
    ids = BYTES(text, add_special_tokens=False)["input_ids"]
    trace = untexted(ids).with_text(BYTES)
    assert trace.text == text
    ends = np.cumsum([len(token.text or "") for token in trace.tokens]).tolist()
    for index, end in enumerate(ends):
        seen = decoded(BYTES, ids[: index + 1])
        assert text[:end] == seen.rstrip("\ufffd") or seen.startswith(text[:end])
        assert end >= len(seen.rstrip("\ufffd")), "a complete character waits for no later token"


def test_texts_concatenate_though_decoding_takes_something_back() -> None:
    """Decoders that tidy up may shorten what an earlier token had added."""
    texts = {1: "ab", 2: "a", 3: "abc"}
    assert token_texts(lambda ids: texts.get(len(ids), ""), [], [1, 2, 3]) == ["ab", "", "c"]


def test_texts_of_a_tokenizer_that_decodes_nothing_without_its_first_token() -> None:
    ids = [0, *[1] * 200]
    pieces = token_texts(lambda part: "a" * len(part) if part[:1] == [0] else "", [], ids)
    assert pieces == ["a"] * len(ids)


def test_a_prompt_keeps_the_space_that_a_tokenizer_drops_at_the_start() -> None:
    prompt = FALLBACK("a", add_special_tokens=False)["input_ids"]
    ids = FALLBACK("a b", add_special_tokens=False)["input_ids"][1:]
    assert untexted(ids).with_text(FALLBACK).text == "b"
    trace = untexted(ids).with_text(FALLBACK, prompt)
    assert (trace.prompt, trace.text) == ("a", " b")
    assert RoutingTrace(("a",), trace.tokens, "mine").with_text(FALLBACK, prompt).prompt == "mine"


def test_special_tokens_add_nothing_unless_asked_for() -> None:
    ids = [*BYTES("the", add_special_tokens=False)["input_ids"], BYTES.eos_token_id]
    assert [token.text for token in untexted(ids).with_text(BYTES).tokens] == ["the", ""]
    kept = untexted(ids).with_text(BYTES, skip_special_tokens=False)
    assert [token.text for token in kept.tokens] == ["the", "<eos>"]


# ---------------------------------------------------------------------------------------------------------- numbers


def test_numbers_of_a_trace() -> None:
    trace = example()
    assert trace.counts == {"math": 2, "code": 2, "chat": 3}
    assert trace.shares == {"math": 2 / 7, "code": 2 / 7, "chat": 3 / 7}
    assert trace.overruled_share == 2 / 7
    assert trace.switches == 4


def test_numbers_of_an_empty_trace() -> None:
    trace = RoutingTrace(("a", "b"))
    assert trace.counts == {"a": 0, "b": 0}
    assert all(math.isnan(share) for share in (*trace.shares.values(), trace.overruled_share))
    assert trace.switches == 0


@given(trace=traces())
def test_numbers_against_their_definitions(trace: RoutingTrace) -> None:
    experts = [token.expert for token in trace.tokens]
    assert sum(trace.counts.values()) == len(experts)
    assert trace.switches == sum(experts[i] != experts[i - 1] for i in range(1, len(experts)))
    if experts:
        assert sum(trace.shares.values()) == pytest.approx(1)
