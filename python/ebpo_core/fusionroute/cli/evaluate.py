"""``fusionroute eval``: a checkpoint on held-out rows of the training formats, or lm-eval's tasks."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ebpo_core.fusionroute.cli.held_out import add_row_flags, check_rows, evaluate_rows
from ebpo_core.fusionroute.cli.options import (
    add_model_flags,
    add_routing_flags,
    load_model,
    load_tokenizer,
    routing_options,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


_BATCH, _SEED = "8", 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusionroute eval", description=__doc__, allow_abbrev=False)
    add_model_flags(parser)
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="names of tasks, with spaces or commas between")
    add_row_flags(parser)
    parser.add_argument("--limit", type=float, help="documents per task, or a share of them below 1; or rows")
    parser.add_argument("--batch-size", default=_BATCH, help="rows in a batch, or (tasks) auto (default: %(default)s)")
    parser.add_argument("--max-length", type=int, help="longest input in tokens; by default the models' limit")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON")
    group = parser.add_argument_group("tasks")
    group.add_argument("--include-path", type=Path, metavar="DIR", help="a folder with YAML files of your own tasks")
    group.add_argument("--num-fewshot", type=int, help="examples in the prompt; by default the task's")
    group.add_argument("--max-gen-toks", type=int, help="longest answer, instead of the task's; 400 in the paper")
    group.add_argument("--chat", action="store_true", help="put prompts into the tokenizer's chat template")
    group.add_argument("--seed", type=int, default=_SEED, help="seed of examples and sampling (default: %(default)s)")
    group.add_argument("--log-samples", action="store_true", help="keep every document and answer in the results")
    add_routing_flags(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Evaluate, print a table, and write the results."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if check_rows(parser, arguments):
        return evaluate_rows(arguments)
    size = arguments.batch_size
    if not size.startswith("auto") and not (size.isdigit() and int(size) > 0):
        raise ValueError(f"batch-size={size!r}: expected a whole number of at least 1, or auto")

    import lm_eval  # noqa: F401 -- if it is missing, that is said before torch is loaded

    from ebpo_core.fusionroute.evaluation import evaluate, task_manager, write_results

    # The harness warns twice that it was given a loaded model, and that is on purpose.
    logging.getLogger("lm_eval.models.huggingface").addFilter(lambda record: "`pretrained`" not in str(record.msg))
    names = [name for item in arguments.tasks for name in item.split(",") if name]
    # A wrong name is found out before minutes of loading.
    manager = task_manager(names, arguments.include_path)
    tokenizer = load_tokenizer(arguments)
    results = evaluate(
        load_model(arguments),
        names,
        tokenizer=tokenizer,
        manager=manager,
        limit=arguments.limit,
        num_fewshot=arguments.num_fewshot,
        batch_size=int(size) if size.isdigit() else size,
        max_length=arguments.max_length,
        apply_chat_template=arguments.chat,
        generation_kwargs=None if arguments.max_gen_toks is None else {"max_gen_toks": arguments.max_gen_toks},
        log_samples=arguments.log_samples,
        seed=arguments.seed,
        **routing_options(arguments),
    )
    print_results(Console(highlight=False), results)
    if arguments.output is not None:
        print(write_results(arguments.output, results))
    return 0


def print_results(console: Console, results: dict[str, Any]) -> None:
    """Print a row per task and metric: value, standard error where the harness gives one, number of documents."""
    table = Table("task", "metric")
    for name in ("value", "s.e.", "documents"):
        table.add_column(name, justify="right")
    for task, numbers in results["results"].items():
        for key, value in numbers.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr"):
                continue
            error = numbers.get(f"{metric}_stderr,{kind}")
            label = metric if kind == "none" else f"{metric} ({kind})"
            documents = results.get("n-samples", {}).get(task, {}).get("effective", "")
            table.add_row(Text(task), Text(label), _number(value), _number(error), str(documents))
    console.print(table)


def _number(value: Any) -> str:
    """Four decimals; a dash for what the harness could not compute."""
    return f"{value:.4f}" if isinstance(value, (int, float)) else "-"
