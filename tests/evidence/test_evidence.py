"""The evidence study: its statistics, its records, its page, and that a run is the same bits again."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trl")

import contrasts
import ladder
import rules
import training
from scipy import stats

import ebpo_core

FIGURES = Path(training.HERE) / "figures.py"


def run_of(arm: str, seed: int, score: float, **config: Any) -> dict[str, Any]:
    """A record with nothing but what contrasts read."""
    return {
        "config": {**training.configuration("countdown", "middle", 2, arm, seed, 4e-4), **config},
        "before": {"pass@1": 0.22},
        "after": {"pass@1": score},
        "curves": {"equal": [0.5]},
    }


def test_contrast_is_the_paired_t_test_over_the_seeds_that_both_arms_have() -> None:
    ours, theirs = [0.44, 0.43, 0.46, 0.40, 0.45], [0.40, 0.41, 0.39, 0.41, 0.42, 0.9]
    records = [run_of("ebpo", seed, value) for seed, value in enumerate(ours)]
    records += [run_of("grpo", seed, value) for seed, value in enumerate(theirs)]
    found = contrasts.paired(contrasts.by_cell(records)["countdown", "middle", 2, ""], "ebpo", "grpo")
    assert found is not None
    assert (found.seeds, found.wins) == (5, 4)
    wanted = stats.ttest_rel(ours, theirs[:5])
    assert found.p == pytest.approx(wanted.pvalue)
    interval = wanted.confidence_interval()
    assert (found.low, found.high) == pytest.approx((100 * interval.low, 100 * interval.high))
    # What the cell can see: power of the noncentral t is near 80 % there.
    spread = 100 * np.std(np.subtract(ours, theirs[:5]), ddof=1)
    power = stats.nct.sf(stats.t.ppf(0.975, 4), 4, found.visible / spread * np.sqrt(5))
    assert power == pytest.approx(0.8, abs=0.1)


def test_contrast_needs_five_pairs() -> None:
    for pairs, compared in ((4, False), (5, True)):
        runs = [
            run_of(arm, seed, 0.4 + seed / 100 + (arm == "ebpo") / (9 + seed))
            for arm in ("ebpo", "grpo")
            for seed in range(pairs)
        ]
        cells = contrasts.by_cell([*runs, run_of("ebpo", 5, 0.4)])
        assert (contrasts.paired(cells["countdown", "middle", 2, ""], "ebpo", "grpo") is not None) == compared


def test_runs_from_another_base_are_no_pair() -> None:
    records = [
        run_of(arm, seed, 0.4 + seed / (90 + 9 * (arm == "ebpo"))) for arm in ("ebpo", "grpo") for seed in range(7)
    ]
    for record in records[:2]:  # warmed up on another machine
        record["before"] = {"pass@1": 0.23}
    arms = contrasts.by_cell(records)["countdown", "middle", 2, ""]
    assert contrasts.shared_seeds(arms, "ebpo", "grpo") == [2, 3, 4, 5, 6]
    found, over = (
        contrasts.paired(arms, "ebpo", "grpo"),
        contrasts.over_tasks({contrasts.MIDDLE: arms}, "ebpo", "grpo", draws=10),
    )
    assert found is not None
    assert over is not None
    assert found.seeds == over["runs"] == 5


def test_holm_gives_the_values_of_a_worked_example() -> None:
    assert contrasts.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_correction_counts_contrasts_that_have_not_been_run() -> None:
    rng = np.random.default_rng(0)
    records = [
        run_of(arm, seed, shift + rng.normal(0, 0.01))
        for arm, shift in (("ebpo", 0.45), ("grpo", 0.43))
        for seed in range(8)
    ]
    [(G, contrast, corrected)] = contrasts.main_family(contrasts.by_cell(records))
    assert G == 2
    assert corrected == pytest.approx(min(1.0, 16 * contrast.p))


def test_cells_are_never_mixed() -> None:
    records = [
        run_of("ebpo", 0, 0.4),
        run_of("ebpo", 0, 0.4, equal_rms=True, rate=2e-4),
        run_of("ebpo", 0, 0.4, train_size=512),
        run_of("ebpo", 0, 0.4, prompts_per_call=1, G=8),
        run_of("ebpo", 0, 0.4, G=4),
        run_of("ebpo", 0, 0.4, rung="low"),
        run_of("ebpo", 0, 0.4, rung="low", rate=2e-4),  # one rate for all
        run_of("ebpo", 0, 0.4, task="arithmetic", rung="smollm2", G=4, rate=3e-4, steps=40, rollouts=64, samples=4),
    ]
    strays = [
        run_of("ebpo", 1000, 0.9),  # tunes a learning rate
        run_of("ebpo", 0, 0.9, steps=10),
        run_of("ebpo", 0, 0.9, protocol=training.PROTOCOL + 1),
        run_of("ebpo", 0, 0.9, rung="low", rate=1e-4),
        run_of("ebpo", 0, 0.9, train_size=512, equal_rms=True),
    ]
    cells = contrasts.by_cell([*records, *strays])
    assert len(cells) == len(records)
    assert [run["after"]["pass@1"] for arms in cells.values() for run in arms["ebpo"].values()] == [0.4] * len(records)


def test_run_at_the_common_rate_stays_out_of_the_cell_of_tuned_rates() -> None:
    tuning = [
        {**run_of("ebpo", config["seed"], score), "config": config, "hash": training.name_of(config)}
        for config in training.tuning("ebpo")
        for score in [0.5 if config["rate"] == 4e-4 else 0.4]
    ]
    scores = (("ebpo", 0.45, 4e-4), ("ebpo", 0.43, 2e-4), ("grpo", 0.4, 2e-4))
    records = [run_of(arm, 0, score, rate=rate) for arm, score, rate in scores]
    cells = contrasts.by_cell([*tuning, *records])
    assert contrasts.outcome(cells[contrasts.MIDDLE]["ebpo"][0], "pass@1") == 0.45
    assert contrasts.outcome(cells[contrasts.COMMON[2]]["ebpo"][0], "pass@1") == 0.43
    # GRPO has no records of a tuning here, so that its rate is the default, which is not the common one.
    assert "grpo" not in cells[contrasts.MIDDLE]
    assert contrasts.outcome(cells[contrasts.COMMON[2]]["grpo"][0], "pass@1") == 0.4


def test_a_fixed_mix_at_the_common_rate_is_in_both_cells() -> None:
    tuning = [
        {**run_of("grpo", config["seed"], 0.5 if config["rate"] == 2e-4 else 0.4), "config": config}
        for config in training.tuning("grpo")
    ]
    cells = contrasts.by_cell([*tuning, run_of("mix_50", 10, 0.45, rate=2e-4)])
    assert list(cells) == [contrasts.MIDDLE, contrasts.COMMON[2]]


def test_interval_over_warm_ups_takes_the_mean_of_each() -> None:
    gains = [0.01, 0.02, 0.03, 0.05, 0.03, 0.02]  # seeds 0 and 4, 1 and 5 start from one policy each
    records = [run_of("grpo", seed, 0.4) for seed in range(6)]
    records += [run_of("ebpo", seed, 0.4 + gain) for seed, gain in enumerate(gains)]
    arms = contrasts.by_cell(records)[contrasts.MIDDLE]
    found = contrasts.paired(arms, "ebpo", "grpo")
    assert found is not None
    wanted = stats.ttest_1samp([2, 2, 3, 5], 0).confidence_interval()
    assert found.clustered == pytest.approx((wanted.low, wanted.high))
    del arms["ebpo"][3]
    found = contrasts.paired(arms, "ebpo", "grpo")
    assert found is not None
    assert found.clustered is None


def test_a_fixed_mix_is_the_packages_fixed_shrinkage() -> None:
    rewards, groups = np.random.default_rng(0).random(24), np.repeat(np.arange(12), 2)
    for share in (0.25, 0.5, 0.75):
        mix = rules.RULES[f"mix_{round(100 * share)}"]()(rewards, groups)
        np.testing.assert_allclose(mix, ebpo_core.EBPO(shrinkage=share)(rewards, groups), atol=1e-12)


def test_a_record_after_a_line_that_a_kill_cut_short_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "training.jsonl"
    monkeypatch.setattr(training, "RECORDS", file)
    training.append({"hash": "a"})
    with file.open("a") as stream:
        stream.write('{"hash": "b", "con')
    training.append({"hash": "c"})
    training.append({"hash": "d"})
    assert list(training.recorded()) == ["a", "c", "d"]
    assert training.lines_of(file) == [{"hash": "a"}, {"hash": "c"}, {"hash": "d"}]


def test_a_run_that_fails_ends_the_queue_and_loses_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, failed = [], threading.Event()

    def timed(config: dict[str, Any]) -> tuple[dict[str, Any], float]:
        started.append(config["seed"])
        if config["seed"] == 1:
            failed.set()
            raise FloatingPointError("seed 1")
        failed.wait()
        time.sleep(0.1)
        return {"after": {"pass@1": 0.5}}, 1.0

    monkeypatch.setattr(training, "RECORDS", tmp_path / "training.jsonl")
    monkeypatch.setattr(training, "timed", timed)
    monkeypatch.setattr(training, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers))
    monkeypatch.setattr(training, "commit", lambda: "abc")
    configs = [training.configuration("countdown", "middle", 2, "ebpo", seed, 4e-4) for seed in range(40)]
    with pytest.raises(FloatingPointError, match="seed 1"):
        training.run_all(configs, workers=2)
    kept = [record["config"]["seed"] for record in training.recorded().values()]
    assert 0 in kept
    assert sorted([*kept, 1]) == sorted(started)
    assert len(started) < 40


def test_committed_records_are_whole_and_each_belongs_to_its_configuration() -> None:
    records = contrasts.read("training")
    assert records
    assert len({record["hash"] for record in records}) == len(records)
    for record in records:
        assert record["hash"] == training.name_of(record["config"])
        assert record["commit"]
        assert 0 <= record["after"]["pass@1"] <= record["after"][f"pass@{record['config']['samples']}"] <= 1


def test_page_shows_what_the_records_give() -> None:
    command = [sys.executable, str(FIGURES), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arm", ["ebpo", "dapo"])
def test_run_is_the_same_bits_again(arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "BASES", tmp_path)
    monkeypatch.setitem(ladder.WARM_UP_STEPS, ("countdown", "low"), 2)
    config = training.configuration("countdown", "low", 2, arm, 0, 4e-4, prompts_per_call=4)
    config |= {"steps": 2, "rollouts": 16, "samples": 2}
    assert training.run(config) == training.run(config)
