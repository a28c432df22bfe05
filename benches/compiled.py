"""What compiling experts costs in accuracy: a checkpoint compiled at several ranks, beside itself.

    python benches/compiled.py --checkpoint runs/fusionroute/checkpoint             # the demo's; CPU hours
    python benches/compiled.py --checkpoint runs/chat/checkpoint --problems-of chat --rows 6000 --steps 300 \\
        --batch-size 16 --learning-rate 5e-4 --problems 100                         # SmolLM2's
    python benches/compiled.py --smoke                                              # untrained tiny models, seconds

``fusionroute demo`` makes the first checkpoint, ``benches/chat_experts.py`` the second. Every rank is one ``compile``
on training problems of the same recipe; a run that is killed goes on where it was, and a rank whose record is in the
JSON file is not compiled again. Answers to held-out problems, which share no question with any training problem, are
greedy, through ``generate``; "mixed" problems are those that no expert can answer alone. Differences are of the same
problems, with 95 % intervals from their standard errors.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from chat_experts import ALL_KINDS as ALL_CHAT_KINDS
from chat_experts import KINDS as CHAT_KINDS
from chat_experts import MAX_ANSWER_TOKENS as CHAT_ANSWER_TOKENS
from chat_experts import problems as chat_problems
from chat_experts import rows as chat_rows
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ebpo_core.data import Problem
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

RESULTS = Path(__file__).parent / "results"
_Z95 = 1.96


class Source(NamedTuple):
    """Problems of a recipe: held-out ones to answer, rows to distil on and to report on, tokens of an answer."""

    problems: list[Problem]
    rows: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    max_new_tokens: int


def source(name: str, problems: int, size: int) -> Source:
    """``problems`` of each kind, and ``size`` training rows, of "demo" or "chat"."""
    if name == "demo":
        test, train = generate(len(KINDS) * problems, 77, "test", KINDS), generate(size, 501, "train", ALL_KINDS)
        held_out = generate(700, 502, "test", ALL_KINDS)
        return Source(list(test), sft_rows(list(train)), sft_rows(list(held_out)), MAX_ANSWER_TOKENS)
    test, train = (
        chat_problems(len(CHAT_KINDS) * problems, 77, "test", CHAT_KINDS),
        chat_problems(size, 501, "train", ALL_CHAT_KINDS),
    )
    held_out = chat_problems(140, 502, "test", ALL_CHAT_KINDS)
    return Source(list(test), chat_rows(list(train)), chat_rows(list(held_out)), CHAT_ANSWER_TOKENS)


def answers(folder: Path, problems: list[Problem], tokenizer: Any, max_new_tokens: int) -> Outcomes:
    """For each kind of problem, which answers of the checkpoint in ``folder`` are right."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    greedy = SamplingOptions(max_new_tokens=max_new_tokens, temperature=0.0)
    texts = complete(model, tokenizer, [problem.prompt for problem in problems], greedy, batch_size=100)
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
    parser.add_argument("--checkpoint", type=Path, help="that `fusionroute demo` or chat_experts.py left")
    parser.add_argument("--problems-of", choices=["demo", "chat"], default="demo", help="what the checkpoint answers")
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
    parser.add_argument("--json", type=Path, help="records, read and added to; by default one of benches/results")
    parser.add_argument("--smoke", action="store_true", help="untrained tiny models, two steps")
    args = parser.parse_args()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(args.threads)
    args.json = args.json or RESULTS / f"compiled-{args.problems_of}.json"
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
    given = source(args.problems_of, args.problems, args.rows)
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
                given.rows,
                eval_data=given.held_out,
                console=Console(),
                **settings,
            )
        seconds = time.process_time() - started
        before = before or answers(args.checkpoint, given.problems, tokenizer, given.max_new_tokens)
        found = compared(before, answers(folder, given.problems, tokenizer, given.max_new_tokens))
        report = json.loads((folder / "compiled" / "report.json").read_text(encoding="utf-8"))
        records.append({"name": name, "cpu_seconds": seconds, "report": report, "problems": found})
        machine = {"machine": platform.machine(), "threads": args.threads, "torch": torch.__version__}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": machine, "records": records}, indent=1) + "\n", encoding="utf-8")
        print(markdown(records[-1:]), flush=True)
    print(markdown(records))


if __name__ == "__main__":
    main()
