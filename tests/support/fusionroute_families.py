"""A tiny config of every causal language model that the installed transformers knows."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

KINDS = tuple(kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind != "fusionroute")
VOCAB = 200
LARGEST = 15_000_000  # parameters

# Whatever of these a config has is set, in the config and in those inside of it.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "dim_ff", "dff"), 64),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "intermediate_size_mlp"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 4),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("head_dim", "global_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions"), 128),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "forced_eos_token_id": None,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
}

# Where the sizes of one kind depend on each other.
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "bailing_hybrid": {"num_hidden_layers": 8},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"num_hidden_layers": 4},
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_ssm": 64,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 2,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
    },
    "inkling2_text": {"unpadded_vocab_size": 200},
    "inkling2_loop_text": {"unpadded_vocab_size": 200},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "kimi_linear": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_attn_config": {"head_dim": 8, "num_heads": 4, "short_conv_kernel_size": 4},
    },
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "reformer": {"axial_pos_embds_dim": [8, 24], "axial_pos_shape": [8, 16], "attention_head_size": 8},
    "roc_bert": {"pronunciation_vocab_size": 200, "shape_vocab_size": 200, "pronunciation_embed_dim": 8},
    "zamba": {"num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "mamba_headdim": 16, "n_mamba_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_family_config(kind: str) -> PreTrainedConfig:
    """The config of a tiny model of a kind, with a vocabulary of ``VOCAB`` tokens."""
    return _small(CONFIG_MAPPING[kind])


def _small(cls: Any) -> PreTrainedConfig:
    default = cls()
    values = {name: value for name, value in _SIZES.items() if name in cls.__dataclass_fields__ or _has(default, name)}
    for name in cls.sub_configs:
        inner = getattr(default, name, None)
        if inner is not None and type(inner) in CONFIG_MAPPING.values():
            values[name] = _small(type(inner)).to_dict()
    if "kv_lora_rank" in values:  # latent attention has as many keys as queries
        values["num_key_value_heads"] = 4
    values |= _OWN.get(cls.model_type, {})
    while True:
        try:
            config: PreTrainedConfig = cls(**values)
        except (AttributeError, NotImplementedError) as error:  # noqa: PERF203 -- a name that only reads another
            bad = [name for name in values if f"'{name}'" in str(error) or f"`{name}`" in str(error)]
            if not bad or len(bad) > 2:
                raise
            del values[bad[0]]
        else:
            return config


def _has(config: PreTrainedConfig, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:
        return True
