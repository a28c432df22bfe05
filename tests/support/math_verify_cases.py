"""Math-Verify's own test cases, out of its source distribution, whose files are read and never run.

The distribution is fetched at its pinned version into tests/rewards/.sources, which git ignores.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

from ebpo_core.rewards import final_answer

VERSION = "0.9.0"
FOLDER = Path(__file__).parents[1] / "rewards" / ".sources"


class Case(NamedTuple):
    """A reference, a completion that states an answer in a form that we read, and Math-Verify's score."""

    test: str
    gold: str
    prediction: str
    completion: str
    expected: int


def fetch() -> Path:
    """The source distribution; raises CalledProcessError where the package index cannot be reached."""
    found = sorted(FOLDER.glob(f"math_verify-{VERSION}.tar.gz"))
    if not found:
        FOLDER.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        command += ["--no-build-isolation", "--dest", str(FOLDER), f"math-verify=={VERSION}"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
        found = sorted(FOLDER.glob(f"math_verify-{VERSION}.tar.gz"))
    return found[0]


def cases(archive: Path) -> list[Case]:
    """Cases with the parameters gold, prediction, expected that fit our interface.

    They fit where the prediction is nothing but an answer (it is put into a box), or marks one. Left out is prose of
    which the answer would have to be guessed, since a completion without a mark has no answer here.
    """
    found: list[Case] = []
    with tarfile.open(archive) as files:
        for member in sorted(files.getnames()):
            if re.search(r"/tests/test_\w+\.py$", member):
                content = files.extractfile(member)
                assert content is not None
                found += _of_file(Path(member).stem, content.read().decode())
    return found


def _of_file(name: str, content: str) -> list[Case]:
    found: list[Case] = []
    for function in ast.parse(content).body:
        for decorator in getattr(function, "decorator_list", ()):
            if not isinstance(decorator, ast.Call) or ast.unparse(decorator.func) != "pytest.mark.parametrize":
                continue
            names = str(ast.literal_eval(decorator.args[0])).replace(" ", "").split(",")
            if names not in (["gold", "pred", "expected"], ["gold", "pred", "result"]):
                continue
            for row in decorator.args[1].elts:  # type: ignore[attr-defined]
                try:
                    gold, prediction, expected = ast.literal_eval(row)
                except ValueError:
                    continue  # made by an expression
                completion = stated(prediction)
                if completion is not None:
                    found.append(Case(f"{name}::{function.name}", gold, prediction, completion, int(expected)))  # type: ignore[attr-defined]
    return found


def stated(prediction: str) -> str | None:
    """A completion that states the prediction's answer; None for prose that marks none."""
    if final_answer(prediction) is not None:
        return prediction
    around = re.sub(r"\$\$.+?\$\$|\$.+?\$|\\\[.+?\\\]|\\\(.+?\\\)", " ", prediction, flags=re.DOTALL)
    words = set(re.findall(r"[A-Za-z]{3,}", re.sub(r"\\[A-Za-z]+(?:\{[^{}]*\})?", " ", around)))
    return None if words - {"and", "percent", "pct", "Answer"} else f"\\boxed{{{prediction}}}"
