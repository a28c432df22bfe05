"""``ebpo curriculum``: pass rates of a base model, buckets of difficulty, topics, and an ordered data set.

Rollouts go to <output>.samples.jsonl as they are drawn, and topic replies of a model to <output>.topics.jsonl: the same
command again draws what is missing. The output keeps every column and adds id, pass_rate, passes, rollouts, the Beta
posterior's pass_rate_mean, pass_rate_low and pass_rate_high, difficulty (0 the easiest) and topic.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

    from ebpo_core.cli.sampling import Sampling


def build_parser() -> argparse.ArgumentParser:
    from ebpo_core.cli.sampling import add_options
    from ebpo_core.curriculum.difficulty import EDGES
    from ebpo_core.curriculum.samplers import Order

    orders = [*get_args(Order), "none"]
    parser = argparse.ArgumentParser(prog="ebpo curriculum", description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", required=True, help="data file to write, .jsonl or .parquet")
    parser.add_argument("--rollouts", type=int, default=16, help="completions of each problem (16)")
    parser.add_argument("--order", default="easy_to_hard", choices=orders, help="order of the rows (easy_to_hard)")
    parser.add_argument("--order-batch", type=int, default=1, help="prompts of a batch, for the topic orders (1)")
    parser.add_argument("--order-seed", type=int, default=0, help="seed of ties and shuffles (0)")
    parser.add_argument(
        "--edges", type=float, nargs="*", default=list(EDGES), help="pass rates between the buckets (0.2 0.4 0.6 0.8)"
    )
    parser.add_argument(
        "--prior", default="uniform", choices=["uniform", "jeffreys", "empirical"], help="of the pass rates (uniform)"
    )
    topics = parser.add_argument_group("topic labels (a column 'topic' is kept as it is without them)")
    source = topics.add_mutually_exclusive_group()
    source.add_argument("--label-column", metavar="NAME", help="a column of the data")
    source.add_argument(
        "--label-function", metavar="MODULE:FUNCTION", help="a function of a row that returns its topic"
    )
    source.add_argument("--label-server", metavar="URL", help="ask a model for one of the paper's nine topics")
    topics.add_argument("--label-model", metavar="NAME", help="the model on that server; its only one by default")
    add_options(parser, split="train")
    return parser


def _label(sampling: Sampling, output: Path, console: Console) -> list[str] | None:
    """Topics as the options say, None where they say nothing."""
    from ebpo_core.curriculum import topics
    from ebpo_core.evaluation.journal import Journal
    from ebpo_core.evaluation.sampling import SamplingOptions
    from ebpo_core.evaluation.server import ServerModel
    from ebpo_core.progress import bar

    given, problems = sampling.arguments, sampling.problems
    if given.label_column:
        return topics.column_topics(problems, given.label_column)
    if given.label_function:
        return topics.function_topics(problems, given.label_function)
    if not given.label_server:
        return None
    model = ServerModel(
        sampling.server(given.label_server),
        given.label_model,
        SamplingOptions(max_new_tokens=topics.MAX_REPLY_TOKENS, temperature=0.0),
        concurrency=given.concurrency,
    )
    settings = topics.label_settings(model, sampling.fingerprint)
    with Journal(output.with_name(f"{output.name}.topics.jsonl"), topics.KIND, settings, ("problem",)) as journal:
        done = len(journal.records)
        with bar(console, "Topics", len(problems), done) as shown:
            return topics.server_topics(problems, model, journal, on_progress=lambda n: shown.update(done + n))


def _print(rows: Sequence[dict[str, Any]], edges: Sequence[float], console: Console) -> None:
    """Problems of each bucket by topic."""
    from rich.table import Table
    from rich.text import Text

    topics = sorted({str(row.get("topic") or "-") for row in rows})
    counts = Counter((row["difficulty"], str(row.get("topic") or "-")) for row in rows)
    table = Table("bucket", "pass rate")
    for topic in topics:
        table.add_column(Text(topic), justify="right")
    if len(topics) > 1:
        table.add_column("all", justify="right")
    bounds = [1.0, *reversed(edges), 0.0]
    for bucket in range(len(edges) + 1):
        cells = [counts[bucket, topic] for topic in topics]
        total = [str(sum(cells))] if len(topics) > 1 else []
        ends = f"{bounds[bucket + 1]:g} to {bounds[bucket]:g}"
        table.add_row(str(bucket), ends, *map(str, cells), *total)
    console.print(table)


def main(argv: Sequence[str]) -> int:
    """Roll out, estimate, label, order, write."""
    from rich.console import Console

    from ebpo_core.cli.sampling import Sampling
    from ebpo_core.curriculum.difficulty import arrange, check_edges, curriculum_rows, difficulties
    from ebpo_core.curriculum.posterior import JEFFREYS, UNIFORM
    from ebpo_core.curriculum.topics import UNLABELLED
    from ebpo_core.data.rows import check_writable, write_rows

    given = build_parser().parse_args(argv)
    console = Console()
    output = check_writable(given.output)
    edges = check_edges(given.edges)
    if given.order_batch < 1:
        raise ValueError(f"--order-batch {given.order_batch}: expected at least 1")
    sampling = Sampling(given)
    if given.order.startswith("topic") and not (given.label_column or given.label_function or given.label_server):
        unnamed = sum(not problem.topic for problem in sampling.problems)
        if unnamed:
            raise ValueError(f"--order {given.order}: {unnamed} rows have no 'topic'; give one of the --label- options")
    # Cheap, and wrong names in it should not show only after the rollouts.
    topics = _label(sampling, output, console)
    records = sampling.draw(output.with_name(f"{output.name}.samples.jsonl"), given.rollouts, "Rollouts", console)
    prior: Any = {"uniform": UNIFORM, "jeffreys": JEFFREYS}.get(given.prior, given.prior)
    found = difficulties(sampling.problems, records, given.rollouts, prior=prior, edges=edges)
    rows = arrange(
        curriculum_rows(sampling.problems, found, topics),
        given.order,
        batch_size=given.order_batch,
        seed=given.order_seed,
    )
    write_rows(output, rows)
    _print(rows, edges, console)
    rate = sum(one.pass_rate for one in found) / len(found)
    never, always = (sum(one.passes == end for one in found) for end in (0, given.rollouts))
    console.print(
        f"{len(rows)} problems, mean pass rate {rate:.3f}; "
        f"{never} never passed and {always} always in {given.rollouts} rollouts",
        markup=False,
        highlight=False,
    )
    unlabelled = sum(topic == UNLABELLED for topic in topics or [])
    if unlabelled:
        console.print(f"{unlabelled} problems are {UNLABELLED!r}", style="yellow", markup=False, highlight=False)
    console.print(f"Written: {output}", markup=False, highlight=False, soft_wrap=True)
    return 0
