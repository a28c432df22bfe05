"""The study's modules are scripts beside each other: they are found where they lie."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benches" / "evidence"), str(ROOT / "examples")]
