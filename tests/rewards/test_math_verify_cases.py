"""Agreement with Math-Verify's own test cases, and a reason for every difference (differences.json)."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("math_verify")

from math_verify_cases import Case, cases, fetch

from ebpo_core.rewards import MathVerifier

REASONS = Path(__file__).with_name("differences.json")
LEAST = {"strict": 0.85, "lenient": 0.95}


@pytest.fixture(scope="module")
def found() -> list[Case]:
    try:
        archive = fetch()
    except subprocess.SubprocessError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"Math-Verify's source distribution could not be fetched: {error}")
    return cases(archive)


@pytest.mark.parametrize("preset", LEAST)
def test_agreement_and_a_reason_for_every_difference(found: list[Case], preset: str) -> None:
    with MathVerifier(preset=preset, workers=2, timeout=60) as verifier:
        scores = verifier.score([case.completion for case in found], [case.gold for case in found])
    pairs = list(zip(found, scores, strict=True))
    false_positives = [case for case, score in pairs if score == 1 and case.expected == 0]
    assert false_positives == []
    differences = {
        (case.gold[-120:], case.prediction[-120:]): "unscorable" if math.isnan(score) else "0 for 1"
        for case, score in pairs
        if score != case.expected
    }
    known = json.loads(REASONS.read_text(encoding="utf-8"))[preset]
    assert differences == {(entry["gold"], entry["prediction"]): entry["ours"] for entry in known}
    assert all(entry["reason"] for entry in known)
    agreed = sum(score == case.expected for case, score in pairs) / len(pairs)
    assert agreed >= LEAST[preset], f"{agreed:.1%} of {len(pairs)}"
    assert len(pairs) > 200
