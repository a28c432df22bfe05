"""Mathematical data sets in the forms they are published in, read into one: a list of :class:`Problem`.

``read("HuggingFaceH4/MATH-500")``, ``read("train.jsonl")`` or ``read("folder")``; then :func:`to_rows` for TRL, or
:func:`write_verl_parquet` for verl. :func:`read_rows` and :func:`load_rows` give the rows of any data set as they are.
Importing this package imports none of the libraries that reading may need.
"""

from __future__ import annotations

from ebpo_core.data.formats import FORMATS
from ebpo_core.data.problem import BOXED, Problem, to_rows
from ebpo_core.data.reading import read
from ebpo_core.data.rows import load_rows, read_rows, write_rows
from ebpo_core.data.verl import write_verl_parquet

__all__ = [
    "BOXED",
    "FORMATS",
    "Problem",
    "load_rows",
    "read",
    "read_rows",
    "to_rows",
    "write_rows",
    "write_verl_parquet",
]
