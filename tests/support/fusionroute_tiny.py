"""Tiny models of the six families that FusionRoute's tests cover, with tokenizers, adapters, GGUF files, hub caches."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

if TYPE_CHECKING:
    import os

_CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
}
FAMILIES = tuple(_CONFIGS)
SLIDING_FAMILIES = ("mistral", "gemma2", "gemma3")
PAD, BOS, EOS = 0, 1, 2
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %} <{{ message['role'] }}> {{ message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %} <assistant>{% endif %}"
)


def tiny_config(
    family: str, *, vocab_size: int = 200, hidden_size: int = 64, layers: int = 2, window: int = 8, **overrides: Any
) -> PreTrainedConfig:
    """The config of a model of a few thousand parameters; ``window`` is the sliding window where the family has one.

    Gemma's layers alternate between sliding and full attention, Mistral's all slide. The weights' spread is wide
    (``initializer_range=0.3``), so that logits differ clearly and greedy decoding does not repeat one token.
    """
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden_size // 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    if family == "qwen2":
        del settings["head_dim"]  # follows from the other two
    if family in SLIDING_FAMILIES:
        settings["sliding_window"] = window
    if family in ("gemma2", "gemma3"):
        settings["query_pre_attn_scalar"] = hidden_size // 4
        settings["layer_types"] = ["full_attention" if n % 2 else "sliding_attention" for n in range(layers)]
    config: PreTrainedConfig = _CONFIGS[family](**{**settings, **overrides})
    return config


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A model with random weights of its own seed, in eval mode; ``overrides`` go to :func:`tiny_config`."""
    config = tiny_config(family, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.to(dtype).eval()


def tiny_tokenizer(vocab_size: int = 200) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of ``<pad> <bos> <eos> <unk> <user> <assistant> w6 w7 ...``, padding on the left.

    Text is split at spaces and decoded with spaces; ``<bos>`` is put in front by the tokenizer itself.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing

    words = [*SPECIAL_TOKENS.values(), "<user>", "<assistant>"]
    words += [f"w{index}" for index in range(len(words), vocab_size)]
    tokenizer = Tokenizer(
        WordLevel({word: index for index, word in enumerate(words)}, unk_token=SPECIAL_TOKENS["unk_token"])
    )
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny(
    folder: str | os.PathLike[str],
    family: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Save :func:`tiny_model` and a tokenizer (by default one as wide as the model) into ``folder``; returns it."""
    model = tiny_model(family, seed, dtype, **overrides)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (tiny_tokenizer(model.config.vocab_size) if tokenizer is None else tokenizer).save_pretrained(folder)
    return Path(folder)


def save_tiny_adapter(
    folder: str | os.PathLike[str], model: PreTrainedModel, seed: int = 0, **settings: Any
) -> PreTrainedModel:
    """Save a random LoRA adapter of ``model`` into ``folder``; returns PEFT's own model with it."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a deprecated attribute
        torch.manual_seed(seed)
        settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **settings}
        adapted = get_peft_model(model, LoraConfig(**settings))
    adapted.save_pretrained(folder)
    return adapted.eval()


def save_tiny_gguf(file: str | os.PathLike[str], seed: int = 0) -> PreTrainedModel:
    """Write a Llama as a GGUF file of float32 tensors, with the tiny tokenizer's vocabulary; returns the model."""
    import gguf
    import numpy as np

    model: Any = tiny_model("llama", seed)
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tiny_tokenizer(config.vocab_size).get_vocab()
    writer.add_tokenizer_model("llama")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_pad_token_id(PAD)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    }
    for name, tensor in model.state_dict().items():
        part = name.removesuffix(".weight")
        prefix = ""
        if part.startswith("model.layers."):
            layer, part = part.removeprefix("model.layers.").split(".", 1)
            prefix = f"blk.{layer}."
        array = tensor.numpy()
        if part in ("self_attn.q_proj", "self_attn.k_proj"):  # llama.cpp's order of rotary dimensions
            heads = config.num_attention_heads if "q_proj" in part else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"{prefix}{names[part]}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def put_in_hub_cache(cache: Path, repository: str, folder: Path, commit: str = "0" * 40) -> Path:
    """Lay a copy of ``folder`` into a hub cache as the snapshot that ``main`` stands for; returns the snapshot."""
    root = cache / ("models--" + repository.replace("/", "--"))
    snapshot = root / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(commit)
    return snapshot
