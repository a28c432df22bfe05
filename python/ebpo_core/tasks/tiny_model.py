"""A tokenizer of one token per number and a Llama of about one million parameters, for runs of minutes on a CPU.

Both are saved in an ordinary model directory and loaded with ``from_pretrained``, exactly as a large model would be.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebpo_core.tasks.countdown import LARGEST_TARGET, TOPICS

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from tokenizers.decoders import Decoder
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
LONGEST_SEQUENCE = 64


def word_tokenizer(
    words: Sequence[str], split: PreTokenizer, decoder: Decoder | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer of one token a word, the special tokens before them; it puts a ``<bos>`` in front by itself.

    Args:
        words: The vocabulary.
        split: How text is cut into words.
        decoder: How words become text; by default with spaces between them.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate([*SPECIAL_TOKENS.values(), *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = split
    if decoder is not None:
        tokenizer.decoder = decoder
    bos = SPECIAL_TOKENS["bos_token"]
    tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        model_max_length=LONGEST_SEQUENCE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer: a token for each of 0..99, the operators, "=", ":", and a token for each topic.

    Text is split at spaces and decoded with spaces, so every prompt and answer of the task survives a round trip.
    """
    from tokenizers.pre_tokenizers import WhitespaceSplit

    topics = [f"[{operators}]" for operators in TOPICS.values()]
    return word_tokenizer([*map(str, range(LARGEST_TARGET + 1)), *"+-*()=:", *topics], WhitespaceSplit())


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int = 128,
    layers: int = 5,
    heads: int = 4,
    seed: int = 0,
    **config: Any,
) -> LlamaForCausalLM:
    """A Llama with random float32 weights; the defaults give about one million parameters. Torch's generator is kept.

    ``config`` are further fields of ``LlamaConfig``.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {"intermediate_size": 8 * hidden_size // 3, "tie_word_embeddings": True} | config
    configuration = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=LONGEST_SEQUENCE,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
        **fields,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(configuration)


def save_tiny_model(
    directory: str | os.PathLike[str], *, hidden_size: int = 128, layers: int = 5, heads: int = 4, seed: int = 0
) -> Path:
    """Write a fresh model and its tokenizer into ``directory``, weights in safetensors, and return the directory."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, hidden_size=hidden_size, layers=layers, heads=heads, seed=seed)
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
    return Path(directory)
