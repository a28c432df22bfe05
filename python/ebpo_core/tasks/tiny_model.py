"""A tokenizer of one token per number and a Llama of about one million parameters, for runs of minutes on a CPU.

Both are saved in an ordinary model directory and loaded with ``from_pretrained``, exactly as a large model would be.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ebpo_core.tasks.countdown import LARGEST_TARGET, TOPICS

if TYPE_CHECKING:
    import os

    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
LONGEST_SEQUENCE = 64


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer: a token for each of 0..99, the operators, "=", ":", and a token for each topic.

    Text is split at spaces and decoded with spaces, so every prompt and answer of the task survives a round trip. A
    ``<bos>`` is put in front by the tokenizer itself.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    topics = [f"[{operators}]" for operators in TOPICS.values()]
    words = [*SPECIAL_TOKENS.values(), *map(str, range(LARGEST_TARGET + 1)), *"+-*()=:", *topics]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    bos = SPECIAL_TOKENS["bos_token"]
    tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        model_max_length=LONGEST_SEQUENCE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, *, hidden_size: int = 128, layers: int = 5, heads: int = 4, seed: int = 0
) -> LlamaForCausalLM:
    """A Llama with random float32 weights; the defaults give about one million parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=LONGEST_SEQUENCE,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def save_tiny_model(
    directory: str | os.PathLike[str], *, hidden_size: int = 128, layers: int = 5, heads: int = 4, seed: int = 0
) -> Path:
    """Write a fresh model and its tokenizer into ``directory``, weights in safetensors, and return the directory."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, hidden_size=hidden_size, layers=layers, heads=heads, seed=seed)
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
    return Path(directory)
