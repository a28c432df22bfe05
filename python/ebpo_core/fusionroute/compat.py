"""Names that moved within the range of transformers this package supports (5.16 and later)."""

from __future__ import annotations

from dataclasses import fields

from transformers.modeling_outputs import CausalLMOutputWithPast

# The keyword and output field of the key/value cache: 5.24 renamed `past_key_values` to `cache` everywhere.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
