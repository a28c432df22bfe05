"""What lazy_serving.py takes as given: the time of a forward on this machine, and how a FusionRoute model switches.

    python benches/serving_inputs.py --output times.json                             # forwards, two minutes
    python benches/serving_inputs.py --switching runs/fusionroute/checkpoint --output switching.json
    python benches/serving_inputs.py --smoke                                         # tiny sizes, seconds

A forward of t new tokens in r rows, over c cached tokens of all rows together, is fitted as

    weights + token t + row r + cached c        seconds

by least squares of relative errors, on medians of cached forwards with logits of each row's last token. The roofline's
form, ``max(weights, token t)``, is shown beside it. Weights are random: times do not depend on them.

``--switching`` reads the checkpoint that ``fusionroute demo`` leaves, answers held-out problems of each kind greedily
and counts which expert followed which, and the lengths of runs of one expert.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import Counter
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from decode import synthetic
from serving.checkpoints import SMOLLM2
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, PreTrainedModel
from transformers.utils import logging

from ebpo_core.fusionroute.compat import CACHE
from ebpo_core.fusionroute.demo.domains import DOMAINS, MAX_ANSWER_TOKENS, MIXED, generate

SEED = 7  # of held-out problems


class Point(NamedTuple):
    """One forward: ``rows`` rows of ``tokens`` new tokens each, behind ``context`` cached ones each."""

    rows: int
    tokens: int
    context: int


POINTS = [Point(1, t, 0) for t in (1, 8, 32, 128, 512)]
POINTS += [Point(8, 1, 0), Point(32, 1, 0), Point(128, 1, 0), Point(1, 1, 512), Point(8, 1, 512), Point(32, 1, 512)]
SMOKE_POINTS = [Point(1, 1, 0), Point(1, 8, 0), Point(1, 32, 0), Point(8, 1, 0), Point(8, 1, 16)]


# ------------------------------------------------------------------------------------------------------------- forwards


@torch.no_grad()
def seconds(model: PreTrainedModel, point: Point, repeats: int) -> float:
    """Median over ``repeats`` forwards on one cache, which is cropped after each; one more goes before them."""
    cache = DynamicCache(config=model.config)
    if point.context:
        model(input_ids=torch.full((point.rows, point.context), 5), logits_to_keep=1, **{CACHE: cache})
    ids = torch.full((point.rows, point.tokens), 5)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        model(input_ids=ids, logits_to_keep=1, **{CACHE: cache})
        times.append(time.perf_counter() - start)
        cache.crop(-point.tokens)
    return statistics.median(times[1:])


def calibrate(model: PreTrainedModel, points: list[Point], repeats: int) -> dict[str, Any]:
    """Measured times and the fit; ``worst_error`` is relative, over the points."""
    seconds(model, points[0], repeats)
    times = np.array([seconds(model, point, repeats) for point in points])
    terms = np.array([[1, p.rows * p.tokens, p.rows, p.rows * p.context] for p in points], dtype=float)
    fit = np.linalg.lstsq(terms / times[:, None], np.ones(len(points)), rcond=None)[0]
    chunks = [(p.tokens, t) for p, t in zip(points, times, strict=True) if p.rows == 1 and not p.context]
    weights, token = chunks[0][1], chunks[-1][1] / chunks[-1][0]
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "points": [{**p._asdict(), "ms": 1e3 * t} for p, t in zip(points, times, strict=True)],
        "fit": dict(zip(("weights", "token", "row", "cached"), fit.tolist(), strict=True)),
        "worst_error": float(np.abs(terms @ fit / times - 1).max()),
        "worst_error_of_max": max(abs(max(weights, token * t) / measured - 1) for t, measured in chunks),
    }


def show(name: str, found: dict[str, Any]) -> None:
    print(f"\n{name}, {found['parameters'] / 1e6:.0f} million parameters, float32")
    print("| rows | new tokens each | cached each | ms |\n|---|---|---|---|")
    for point in found["points"]:
        print(f"| {point['rows']} | {point['tokens']} | {point['context']} | {point['ms']:.1f} |")
    fit = found["fit"]
    print(
        f"fit: {1e3 * fit['weights']:.1f} ms + {1e3 * fit['token']:.2f} ms a token + {1e3 * fit['row']:.2f} ms a row + "
        f"{1e6 * fit['cached']:.1f} us a cached token; worst error {found['worst_error']:.0%} "
        f"(of the chunks, max(weights, token t): {found['worst_error_of_max']:.0%})"
    )


# ------------------------------------------------------------------------------------------------------------ switching


def count(sequences: list[list[int]], n: int) -> dict[str, Any]:
    """First experts, which followed which (``[from][to]``), run lengths, distinct experts of a response."""
    first, runs, distinct = Counter(s[0] for s in sequences), Counter[int](), Counter(len(set(s)) for s in sequences)
    pairs = Counter(pair for s in sequences for pair in pairwise(s))
    for sequence in sequences:
        runs.update(len(list(run)) for _, run in groupby(sequence))
    tokens = sum(map(len, sequences))
    return {
        "responses": len(sequences),
        "tokens_per_response": tokens / len(sequences),
        "first": [first[i] for i in range(n)],
        "transitions": [[pairs[i, j] for j in range(n)] for i in range(n)],
        "run_lengths": {str(length): runs[length] for length in sorted(runs)},
        "mean_run": tokens / sum(runs.values()),
        "share": [sum(s.count(i) for s in sequences) / tokens for i in range(n)],
        "distinct_experts": {str(k): distinct[k] for k in sorted(distinct)},
    }


def switching(checkpoint: Path, problems: int) -> dict[str, Any]:
    """Routing of greedy answers to ``problems`` held-out problems of each kind."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    n = len(DOMAINS)
    kinds = {}
    for kind in (*DOMAINS, MIXED):
        prompts = [problem.prompt for problem in generate(problems, SEED, "test", [kind])]
        encoded = tokenizer(prompts, padding=True, return_tensors="pt")
        out = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=MAX_ANSWER_TOKENS,
            do_sample=False,
            output_routing=True,
        )
        kinds[kind] = count([[token.expert for token in trace.tokens] for trace in out["routing"]], n)
        found = kinds[kind]
        print(
            f"{kind}: mean run {found['mean_run']:.1f} of {found['tokens_per_response']:.1f} tokens, {found['share']}"
        )
    return {"experts": list(DOMAINS), "problems_of_a_kind": problems, "kinds": kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one repeat")
    parser.add_argument("--output", type=Path, help="also write what was measured here, as JSON")
    parser.add_argument("--switching", type=Path, metavar="CHECKPOINT", help="count the demo's routing, time nothing")
    parser.add_argument("--problems", type=int, default=400, help="of each kind, for --switching")
    parser.add_argument("--threads", type=int, help="of torch")
    args = parser.parse_args()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.switching:
        result = switching(args.switching, args.problems)
    else:
        small = {"hidden_size": 72, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
        config = LlamaConfig(**(SMOLLM2 | small if args.smoke else SMOLLM2))  # type: ignore[arg-type]
        models = {"smollm2": AutoModelForCausalLM.from_config(config).eval(), "synthetic": synthetic(args.smoke).router}
        points, repeats = (SMOKE_POINTS, 1) if args.smoke else (POINTS, 5)
        threads = torch.get_num_threads()
        machine = {"threads": threads, "torch": torch.__version__}
        print(f"{platform.processor() or platform.machine()}, {threads} threads, PyTorch {torch.__version__}")
        result = {"machine": machine, "models": {}}
        for name, model in models.items():
            result["models"][name] = calibrate(model, points, repeats)
            show(name, result["models"][name])
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
