"""Drafts by a trained router: forwards and tokens per second of lazy decoding with and without them.

    python benches/drafts.py --checkpoint runs/fusionroute/checkpoint    # the demo's
    python benches/drafts.py --smoke                                     # untrained tiny models, seconds

The demo's held-out problems, mixed ones among them, are answered greedily with the checkpoint's own routing, one row
and eight. "agrees" is the share of answer tokens that are the router's own argmax too. "router" and "experts" are calls
per new column of a batch, without the prompts and the tokens that these give; "forwards" their sum, "experts 4 x" the
sum where an expert's call costs four of the router's. These are counts, the same on any machine; tokens per second are
of whole calls, medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from decode import Forwards, synthetic
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ebpo_core.fusionroute.demo.demo import KINDS
from ebpo_core.fusionroute.demo.domains import MAX_ANSWER_TOKENS, generate

DRAFTS: dict[str, Any] = {"none": None, "2": 2, "4": 4, "8": 8, "auto": "auto"}
Batch = dict[str, Tensor]


def problems(path: Path, count: int, rows: int) -> list[Batch]:
    """Prompts of the demo's held-out problems, padded on the left."""
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    prompts = [problem.prompt for problem in generate(count, 1, "test", KINDS)]
    return [dict(tokenizer(prompts[at : at + rows], return_tensors="pt", padding=True)) for at in range(0, count, rows)]


def random_prompts(count: int, rows: int) -> list[Batch]:
    found = []
    for seed in range(count // rows):
        ids = torch.randint(3, 200, (rows, 8), generator=torch.Generator().manual_seed(seed))
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return found


@torch.no_grad()
def agreement(model: Any, batches: list[Batch], texts: list[Tensor]) -> tuple[int, int]:
    """Answer tokens that the router alone would have written too, and all."""
    right = total = 0
    for batch, text in zip(batches, texts, strict=True):
        start = batch["input_ids"].shape[1]
        real = text[:, start:] != model.generation_config.pad_token_id
        mask = torch.cat([batch["attention_mask"], real.long()], dim=1)
        own = model(input_ids=text, attention_mask=mask, router_only=True).logits[:, start - 1 : -1].argmax(-1)
        right += int(((own == text[:, start:]) & real).sum())
        total += int(real.sum())
    return right, total


def measure(model: Any, batches: list[Batch], rounds: int) -> list[dict[str, Any]]:
    texts: dict[str, list[Tensor]] = {}
    counts: dict[str, tuple[int, int]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in DRAFTS}
    for turn in range(rounds + 1):  # the first warms up and counts
        for name, drafts in DRAFTS.items():
            begin = time.perf_counter()
            with Forwards(model) as forwards:
                texts[name] = [
                    model.generate(**batch, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False, draft_tokens=drafts)
                    for batch in batches
                ]
            seconds[name] += [time.perf_counter() - begin] if turn else []
            counts[name] = forwards.router, forwards.experts
    with Forwards(model) as prompts:
        for batch in batches:
            model.generate(**batch, max_new_tokens=1, do_sample=False)
    right, total = agreement(model, batches, texts["none"])
    pairs = zip(texts["none"], batches, strict=True)
    columns = sum(text.shape[1] - batch["input_ids"].shape[1] - 1 for text, batch in pairs)
    return [
        {
            "rows": len(batches[0]["input_ids"]),
            "draft_tokens": name,
            "agrees": right / total,
            "same_texts": sum(map(torch.equal, texts["none"], texts[name])) / len(batches),
            "tokens_per_s": total / statistics.median(seconds[name]),
            "router_forwards": router / columns,
            "expert_forwards": experts / columns,
            "forwards": (router + experts) / columns,
            "forwards_of_experts_four_times_as_large": (router + 4 * experts) / columns,
            "columns": columns,
        }
        for name, (router, experts) in (
            (name, (one - prompts.router, other - prompts.experts)) for name, (one, other) in counts.items()
        )
    ]


def markdown(results: list[dict[str, Any]]) -> str:
    names = ["rows", "agrees", "draft_tokens", "tok/s", "router", "experts", "forwards", "experts 4 x", "same texts"]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    lines += [
        f"| {r['rows']} | {r['agrees']:.1%} | {r['draft_tokens']} | {r['tokens_per_s']:.0f} "
        f"| {r['router_forwards']:.2f} | {r['expert_forwards']:.2f} | {r['forwards']:.2f} "
        f"| {r['forwards_of_experts_four_times_as_large']:.2f} | {r['same_texts']:.0%} |"
        for r in results
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="that `fusionroute demo` left")
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="untrained tiny models, one round")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--threads", type=int, help="of torch")
    args = parser.parse_args()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.smoke and args.checkpoint is None:
        print("left out: pass --checkpoint, a trained one; `fusionroute demo` makes it")
        return
    if args.smoke:
        model: Any = synthetic(smoke=True)
        model.generation_config.pad_token_id = 0
    else:
        model = AutoModelForCausalLM.from_pretrained(args.checkpoint)
    rounds = 1 if args.smoke else args.rounds
    results = []
    for rows in (1, 8):
        batches = random_prompts(8, rows) if args.smoke else problems(args.checkpoint, args.problems, rows)
        results += measure(model, batches, rounds)
    threads = torch.get_num_threads()
    print(f"{platform.processor() or platform.machine()}, {threads} threads, PyTorch {torch.__version__}")
    print(markdown(results))
    if args.json:
        machine = {"threads": threads, "torch": torch.__version__, "problems": args.problems, "rounds": rounds}
        args.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
