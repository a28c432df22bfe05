"""A tiny policy that calls a tool or answers, for TRL's agent loop: bytes, a chat template, and a short SFT."""

from __future__ import annotations

from pathlib import Path

import torch
import trl
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CALL = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


def look() -> str:
    """Look the number up.

    Returns:
        What was found.
    """
    return "7"


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and as one token each what a turn may be made of; the chat template is that of Qwen3, as TRL ships it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([START, END, PAD])
    backend.add_tokens([AddedToken(CALL, normalized=False)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=PAD)
    made.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    return made


def prompts(count: int = 4) -> Dataset:
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": f"n {i}?"}] for i in range(count)]})


def policy(tokens: PreTrainedTokenizerFast, steps: int = 40) -> LlamaForCausalLM:
    """About 30,000 parameters, taught that after a prompt comes a call (more often) or a digit, and then the end."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=tokens.pad_token_id,
        eos_token_id=tokens.eos_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    ids = []
    for answer in (CALL, CALL, CALL, "0", "1", "2"):
        text = f"{START}assistant\n"
        ids.append(tokens(text + "x" * 40)["input_ids"][:12] + tokens(answer + END)["input_ids"])
    batch = torch.tensor(ids)
    labels = batch.clone()
    labels[:, :-2] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    for _ in range(steps):
        # Whatever came before: the ends of prompts and of tools' answers differ in length.
        before = torch.randint(0, 256, (len(batch), int(torch.randint(1, 30, ()))))
        prompt = torch.cat([before, batch], dim=1)
        ignored = torch.full_like(before, -100)
        loss = model(input_ids=prompt, labels=torch.cat([ignored, labels], dim=1)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
