"""What compiling experts costs in accuracy: the demo's checkpoint compiled at several ranks, beside itself.

    python benches/compiled.py --checkpoint runs/fusionroute/checkpoint     # the demo's; CPU hours
    python benches/compiled.py --smoke                                      # untrained tiny models, seconds

``fusionroute demo`` makes the checkpoint. Every rank is one ``compile`` on the demo's training problems; a run that is
killed goes on where it was, and a rank whose record is in the JSON file is not compiled again. Answers to held-out
problems, which share no question with any training problem, are greedy, through ``generate``; "mixed" problems are
those that no expert can answer alone. Differences are of the same problems, with 95 % intervals from their standard
errors.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ebpo_core.evaluation import SamplingOptions, complete
from ebpo_core.evaluation.estimators import mean_and_error
from ebpo_core.fusionroute import FusionRouteForCausalLM
from ebpo_core.fusionroute.cli.options import number_or_named
from ebpo_core.fusionroute.compiled.compilation import compile as compiled
from ebpo_core.fusionroute.demo.demo import KINDS
from ebpo_core.fusionroute.demo.domains import DOMAINS, MAX_ANSWER_TOKENS, build_tokenizer, generate, sft_rows
from ebpo_core.fusionroute.demo.domains import KINDS as ALL_KINDS
from ebpo_core.fusionroute.demo.experts import build_model
from ebpo_core.fusionroute.demo.results import Outcomes, outcomes

RESULTS = Path(__file__).parent / "results" / "compiled-demo.json"
GREEDY = SamplingOptions(max_new_tokens=MAX_ANSWER_TOKENS, temperature=0.0)
_Z95 = 1.96


def answers(folder: Path, problems: list[Any], tokenizer: Any, batch_size: int = 100) -> Outcomes:
    """For each kind of problem, which answers of the checkpoint in ``folder`` are right."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    texts = complete(model, tokenizer, [problem.text for problem in problems], GREEDY, batch_size=batch_size)
    return outcomes(problems, [text.text for text in texts])


def compared(before: Outcomes, after: Outcomes) -> dict[str, dict[str, float]]:
    """By kind: both accuracies, and the difference with the half width of its interval."""
    found = {}
    for kind, old in before.items():
        difference = mean_and_error([b - a for a, b in zip(old, after[kind], strict=True)])
        found[kind] = {
            "uncompiled": sum(old) / len(old),
            "compiled": sum(after[kind]) / len(old),
            "difference": difference.value,
            "interval": _Z95 * difference.standard_error,
        }
    return found


def untrained(folder: Path) -> Path:
    """A checkpoint like the demo's, of random weights."""
    tokenizer = build_tokenizer()
    experts = {domain: build_model(tokenizer, hidden_size=32, seed=i) for i, domain in enumerate(DOMAINS, start=1)}
    model = FusionRouteForCausalLM.from_experts(build_model(tokenizer, hidden_size=32), experts)
    model.save_pretrained(folder, save_experts=True)
    tokenizer.save_pretrained(folder)
    return folder


def markdown(records: list[dict[str, Any]]) -> str:
    kinds = list(records[0]["problems"])
    lines = [
        f"| rank | steps | lr | CPU s | KL | agreement | {' | '.join(kinds)} |",
        "|" + "---|" * (6 + len(kinds)),
    ]
    for record in records:
        cells = [
            f"{100 * one['compiled']:.1f} ({100 * one['difference']:+.1f} ± {100 * one['interval']:.1f})"
            for one in record["problems"].values()
        ]
        fused, settings = record["report"]["fused"], record["report"]["settings"]
        steps = settings["steps"]
        steps = steps if isinstance(steps, int) else ", ".join(f"{name} {count}" for name, count in steps.items())
        lines.append(
            f"| {settings['rank']} | {steps} | {settings['learning_rate']:g} | {record['cpu_seconds']:.0f} "
            f"| {fused['kl']:.4f} | {fused['agreement']:.1%} | {' | '.join(cells)} |"
        )
    before = ", ".join(f"{kind} {100 * one['uncompiled']:.1f}" for kind, one in records[0]["problems"].items())
    return "\n".join([*lines, "", f"Uncompiled: {before} (percent)."])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="that `fusionroute demo` left")
    parser.add_argument("--work", type=Path, default=Path("runs/compiled"), help="of compiled checkpoints")
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 16, 4])
    parser.add_argument("--steps", nargs="+", default=["4000"], help="of every expert, or NAME=N for each")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--alpha", type=float, help="lora_alpha over the rank")
    parser.add_argument("--other-weight", type=float, default=0.1)
    parser.add_argument("--rows", type=int, default=40_000, help="training problems")
    parser.add_argument("--problems", type=int, default=400, help="held-out ones of each kind")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS, help="records, read and added to")
    parser.add_argument("--smoke", action="store_true", help="untrained tiny models, two steps")
    args = parser.parse_args()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(args.threads)
    if args.smoke:
        with tempfile.TemporaryDirectory() as folder:
            args.checkpoint, args.work = untrained(Path(folder) / "checkpoint"), Path(folder) / "work"
            args.json = Path(folder) / "records.json"
            args.ranks, args.steps, args.batch_size, args.rows, args.problems = [4], ["2"], 8, 100, 4
            measure(args)
        return
    if args.checkpoint is None:
        print("left out: pass --checkpoint, a trained one; `fusionroute demo` makes it")
        return
    measure(args)


def measure(args: argparse.Namespace) -> None:
    """Compile and answer at every rank without a record; print all records."""
    records = json.loads(args.json.read_text(encoding="utf-8"))["records"] if args.json.is_file() else []
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    problems = list(generate(len(KINDS) * args.problems, 77, "test", KINDS))
    before = None
    for rank in args.ranks:
        settings = {
            "rank": rank,
            "steps": number_or_named("steps", args.steps),
            "batch_size": args.batch_size,
            "learning_rate": args.learning_rate,
            "other_weight": args.other_weight,
            "alpha": None if args.alpha is None else args.alpha * rank,
        }
        name = "-".join(map(str, {**settings, "steps": "-".join(args.steps)}.values()))
        if any(record["name"] == name for record in records):
            continue
        folder = args.work / name
        started = time.process_time()
        if not (folder / "config.json").is_file() or (folder / "compiled" / "compiling.json").is_file():
            compiled(
                args.checkpoint,
                folder,
                sft_rows(list(generate(args.rows, 501, "train", ALL_KINDS))),
                eval_data=sft_rows(list(generate(700, 502, "test", ALL_KINDS))),
                console=Console(),
                **settings,
            )
        seconds = time.process_time() - started
        before = before or answers(args.checkpoint, problems, tokenizer)
        found = compared(before, answers(folder, problems, tokenizer))
        report = json.loads((folder / "compiled" / "report.json").read_text(encoding="utf-8"))
        records.append({"name": name, "cpu_seconds": seconds, "report": report, "problems": found})
        machine = {"machine": platform.machine(), "threads": args.threads, "torch": torch.__version__}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": machine, "records": records}, indent=1) + "\n", encoding="utf-8")
        print(markdown(records[-1:]), flush=True)
    print(markdown(records))


if __name__ == "__main__":
    main()
