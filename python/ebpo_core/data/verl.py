"""Problems as a Parquet file for verl's ``RLHFDataset``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ebpo_core.data.problem import Problem, messages
from ebpo_core.files import write_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence


def write_verl_parquet(
    problems: Sequence[Problem], path: str | Path, *, split: str = "train", system: str | None = None
) -> Path:
    """Write problems in verl's schema.

    Columns: ``data_source`` (the problem's source), ``prompt`` (messages), ``ability`` ("math"), ``reward_model``
    (style "rule" and the ``ground_truth``), ``extra_info`` (``index``, ``split``, ``id``, ``topic``, ``level``). verl's
    own rewards know few data sources; :func:`ebpo_core.rewards.compute_score` scores every one.

    Args:
        problems: At least one.
        path: Ends in ``.parquet``. A file there is replaced once the new one is complete.
        split: Noted in every row.
        system: A system message before each prompt.

    Returns:
        The path written.

    Raises:
        ValueError: No problems, or another suffix (verl refuses it).
        ImportError: pyarrow is not installed.
    """
    path = Path(path).expanduser()
    if path.suffix != ".parquet":
        raise ValueError(f"path={str(path)!r}: verl reads data files that end in .parquet")
    if not problems:
        raise ValueError("problems: none to write")
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(f'{path}: writing Parquet needs pyarrow: pip install "ebpo-core[train]"') from error
    text = pa.string()
    # Given, not inferred: a file without a single topic must still agree with one that has them.
    schema = pa.schema(
        [
            ("data_source", text),
            ("prompt", pa.list_(pa.struct([("role", text), ("content", text)]))),
            ("ability", text),
            ("reward_model", pa.struct([("style", text), ("ground_truth", text)])),
            (
                "extra_info",
                pa.struct([("index", pa.int64()), ("split", text), ("id", text), ("topic", text), ("level", text)]),
            ),
        ]
    )
    rows = [
        {
            "data_source": problem.source,
            "prompt": messages(problem, system),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": problem.answer},
            "extra_info": {
                "index": index,
                "split": split,
                "id": problem.id,
                "topic": problem.topic,
                "level": problem.level,
            },
        }
        for index, problem in enumerate(problems)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    content = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), content)
    write_bytes(path, content.getvalue().to_pybytes())
    return path
