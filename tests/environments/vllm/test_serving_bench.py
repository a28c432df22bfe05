"""``benches/serve.py`` in this environment, on tiny sizes: every row there, every token counted and agreed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[3] / "benches" / "serve.py"
COMPARED, BATCHES = ("vllm", "compiled", "one by one"), ("static batch", "static batch, compiled")
CLIENTS, REQUESTS_EACH, NEW, ONE_BY_ONE = [1, 4], 2, 8, 3  # of the smoke run


@pytest.mark.timeout(1800)  # several servers, on a busy machine
def test_the_smoke_run_measures_all_of_them_and_their_tokens_agree(tmp_path: Path) -> None:
    out = tmp_path / "serve.json"
    command = [sys.executable, str(BENCH), "--smoke", "--dtype", "float32", "bfloat16", "--output", str(out)]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    content = json.loads(out.read_text(encoding="utf-8"))
    assert list(content["results"]) == ["float32", "bfloat16"]
    for dtype, result in content["results"].items():
        rows = {(row["system"], row["concurrency"]): row for row in result["rows"]}
        assert set(rows) == {(name, c) for name in (*COMPARED, *BATCHES) for c in CLIENTS}
        for (system, clients), row in rows.items():
            requests = ONE_BY_ONE if system == "one by one" else clients * REQUESTS_EACH
            assert (row["requests_timed"], row["tokens_timed"]) == (requests, requests * NEW)
            assert 0 < row["first_token_s"] <= row["latency_s"]["median"] <= row["latency_s"]["p95"]
            if system in COMPARED:
                assert row["tokens_compared"] == min(requests, clients * REQUESTS_EACH) * NEW
                # Of bfloat16 only the most: nothing decides its near-ties.
                assert row["tokens_agreed"] >= row["tokens_compared"] * (1 if dtype == "float32" else 0.5)
        ratios = {(ratio["of"], ratio["to"], ratio["concurrency"]): ratio["ratio"] for ratio in result["ratios"]}
        for c in CLIENTS:
            rates = rows["compiled", c]["tokens_per_s"], rows["vllm", c]["tokens_per_s"]
            assert ratios["compiled", "vllm", c] == pytest.approx(rates[0] / rates[1])
            assert ratios["vllm", "one by one", c] > 0
        shares = result["routing"]["shares"]
        assert sum(shares.values()) == pytest.approx(1)
        assert sorted(shares.values())[-2] > 0.1  # experts really change
        assert result["routing"]["mean_run_length"] < NEW
        assert min(result["resident_bytes"]["vllm"], result["resident_bytes"]["generate"]) > 2**27
    assert "compiled is" in done.stdout
    assert "| float32 | 4 | vllm |" in done.stdout
