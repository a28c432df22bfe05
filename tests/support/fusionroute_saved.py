"""What the command-line and evaluation tests read from the disk: a tiny checkpoint with its experts, and two tasks."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from fusionroute_tiny import save_tiny, tiny_tokenizer

from ebpo_core.fusionroute import FusionRouteForCausalLM

DOCUMENTS = [
    {"question": f"w{10 + n} w{20 + n} w{30 + n}", "choices": [f"w{50 + n}", f"w{60 + n} w7", "w9"], "label": n % 3}
    for n in range(6)
]
_SHARED = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/documents.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
doc_to_text: "{{{{question}}}}"
metadata: {{version: 1}}
"""
_TASKS = {
    "tiny_answers": """
task: tiny_answers
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "tiny_choices": """
task: tiny_choices
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
}


def save_fused(folder: Path) -> Path:
    """Experts "math" and "code" of two families, a router, and their checkpoint; returns the checkpoint's folder.

    The route head is random with a wide spread, so that both experts are selected.
    """
    for seed, (name, family) in enumerate([("router", "llama"), ("math", "llama"), ("code", "qwen3")]):
        save_tiny(folder / name, family, seed=seed)
    model = FusionRouteForCausalLM.from_experts(folder / "router", {"math": folder / "math", "code": folder / "code"})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model.route_head.weight.normal_(std=1.0)
    model.save_pretrained(folder / "fused")
    tiny_tokenizer().save_pretrained(folder / "fused")
    return folder / "fused"


def save_tasks(folder: Path, answers: list[str]) -> Path:
    """Tasks "tiny_answers" (generation) and "tiny_choices" (log-likelihood) over DOCUMENTS; returns ``folder``."""
    lines = [json.dumps({**document, "answer": answer}) for document, answer in zip(DOCUMENTS, answers, strict=True)]
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")
    for name, own in _TASKS.items():
        (folder / f"{name}.yaml").write_text(own.lstrip() + _SHARED.format(folder=folder).lstrip())
    return folder
