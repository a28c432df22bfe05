"""`fusionroute demo` with few steps of small models: what it prints, what it leaves, and that its pieces are seeded."""

from __future__ import annotations

import json
import re
import shutil
from io import StringIO
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("rich")

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from ebpo_core.fusionroute import FusionRouteForCausalLM, demo
from ebpo_core.fusionroute.demo.demo import KINDS, run
from ebpo_core.fusionroute.demo.domains import (
    DOMAINS,
    build_tokenizer,
    generate,
    preference_rows,
    sft_rows,
)
from ebpo_core.fusionroute.demo.experts import Course, build_model, encode
from ebpo_core.fusionroute.demo.results import outcomes, results_table
from ebpo_core.fusionroute.demo.routers import new_router, train_mix, train_sft
from ebpo_core.fusionroute.demo.settings import FULL_SIZE, QUICK, Settings
from ebpo_core.fusionroute.traces import trace

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

SYSTEMS = [
    "base model",
    "expert add",
    "expert reverse",
    "expert caesar",
    "routing only",
    "SFT only",
    "SFT, as many steps",
    "FusionRoute",
    "fine-tuned, SFT",
    "fine-tuned router",
    "task arithmetic",
    "DARE",
    "sequence selection",
    "... by an oracle",
]
SHORT = Course(steps=3, batch_size=8, learning_rate=1e-3)
TINY = Settings(
    hidden_size=16,
    base=SHORT,
    experts=dict.fromkeys(DOMAINS, SHORT),
    sft=SHORT,
    mix=SHORT,
    test_problems=3,
    tuning_problems=2,
    cpu_threads=1,
)


def silent() -> Console:
    return Console(file=StringIO(), width=200)


def test_the_demo_prints_what_it_measured_and_leaves_a_page_and_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "demo"
    threads = torch.get_num_threads()
    assert demo.main(["--quick", "--output", str(output), "--seed", "3"]) == 0
    assert torch.get_num_threads() == threads
    shown = capsys.readouterr().out
    result = json.loads((output / "result.json").read_text())
    assert result["seed"] == 3
    assert list(result["systems"]) == SYSTEMS
    for name, kinds in result["systems"].items():
        assert list(kinds) == [*KINDS, "mean"]
        accuracies = [kinds[kind]["accuracy"] for kind in KINDS]
        assert kinds["mean"]["accuracy"] == pytest.approx(sum(accuracies) / 4)
        assert all((accuracy * QUICK.test_problems) % 1 == pytest.approx(0) for accuracy in accuracies)
        cells = [f"{100 * part['accuracy']:.1f}±{100 * part['standard_error']:.1f}" for part in kinds.values()]
        line = next(line for line in shown.splitlines() if re.match(rf" ?{re.escape(name)} +[\d.]+±", line))
        assert line.split()[-5:] == cells
    assert all(len(line) <= 80 for line in shown.splitlines() if "±" in line)

    systems = result["systems"]
    assert systems["expert caesar"]["caesar"]["accuracy"] > 0.5, "the experts learn something even here"
    best = max(systems[f"expert {domain}"]["caesar"]["accuracy"] for domain in DOMAINS)
    assert systems["... by an oracle"]["caesar"]["accuracy"] >= best
    for kind in KINDS:
        oracle = systems["... by an oracle"][kind]["accuracy"]
        assert oracle >= systems["sequence selection"][kind]["accuracy"]
    gain = result["gain_of_fusionroute"]["fine-tuned router"]
    assert gain["value"] == pytest.approx(
        systems["FusionRoute"]["mean"]["accuracy"] - systems["fine-tuned router"]["mean"]["accuracy"]
    )
    assert f"FusionRoute - fine-tuned router: {100 * gain['value']:+.1f}" in shown
    for name in ("FusionRoute", "fine-tuned router"):
        notes = result["notes"][name]
        assert 0 < notes["pairs_from_mistakes"] <= notes["pairs"] == 160
        assert [record["step"] for record in notes["log"]] == [*range(2, 41, 2), *range(1, 11)]
    assert result["notes"]["FusionRoute"]["log"][-1]["cdpo/bias"] != 0
    assert result["notes"]["fine-tuned router"]["log"][-1]["cdpo/bias"] == 0
    assert sorted(path.name for path in output.iterdir()) == [
        "answers.html",
        "answers.json",
        "base",
        "checkpoint",
        "experts",
        "result.json",
    ]

    # The checkpoint needs nothing else of the run, and gives the accuracies of the table.
    moved = shutil.copytree(output / "checkpoint", tmp_path / "moved")
    traces = trace.load(output / "answers.json")
    page = (output / "answers.html").read_text()
    shutil.rmtree(output)
    model = AutoModelForCausalLM.from_pretrained(moved)
    tokenizer = AutoTokenizer.from_pretrained(moved)
    assert isinstance(model, FusionRouteForCausalLM)
    assert model.experts.names == list(DOMAINS)
    held_out = list(generate(4 * QUICK.test_problems, 309, "test", KINDS))
    ids, mask, labels = encode(held_out, tokenizer)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    right = ((logits.argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == -100)).all(dim=1)
    answers = [problem.answer if ok else "" for problem, ok in zip(held_out, right.tolist(), strict=True)]
    for kind, values in outcomes(held_out, answers).items():
        assert systems["FusionRoute"][kind]["accuracy"] == pytest.approx(sum(values) / len(values))

    assert [found.prompt for found in traces] == [problem.prompt for problem in held_out[:12]]
    for found, problem, ok in zip(traces, held_out, right.tolist(), strict=False):
        assert (found.text == problem.answer) == ok
    assert page.count('class="trace"') == 12
    assert all(problem.prompt in page for problem in held_out[:12])


def test_two_runs_of_one_seed_are_equal_and_a_folder_can_be_used_again(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results = [run(TINY, seed, tmp_path / folder, silent()) for seed, folder in [(0, "a"), (0, "b"), (1, "a")]]
    finally:
        torch.set_num_threads(threads)
    first, again, other = ({**result, "seconds": 0, "cpu_seconds": 0} for result in results)
    assert first == again
    assert first["notes"]["FusionRoute"]["log"] != other["notes"]["FusionRoute"]["log"]
    weights = [(tmp_path / folder / "checkpoint" / "model.safetensors").read_bytes() for folder in "ab"]
    assert weights[0] != weights[1], "the second run with another seed has its own checkpoint"


class Bench:
    """A base and experts in folders, and one function that trains a router on them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tokenizer = folder, build_tokenizer()

    def save(self, name: str, seed: int) -> Path:
        model = build_model(self.tokenizer, hidden_size=16, heads=2, seed=seed)
        model.save_pretrained(self.folder / name)
        self.tokenizer.save_pretrained(self.folder / name)
        return self.folder / name

    def train(self, name: str, expert_seeds: tuple[int, int], with_experts: bool) -> dict[str, dict[str, Any]]:
        """The state dicts at the start, after SFT and after mix training."""
        experts = {f"e{seed}": self.save(f"{name}-e{seed}", seed) for seed in expert_seeds}
        model = new_router(self.save("base", 0), experts, seed=5, with_experts=with_experts)
        drawn = list(generate(24, 1, "train", KINDS))
        states = [_copy(model)]
        shown: dict[str, Any] = {"seed": 2, "console": silent(), "name": "test"}
        train_sft(model, self.tokenizer, sft_rows(drawn), SHORT, self.folder / name / "sft", **shown)
        states.append(_copy(model))
        pairs = preference_rows(drawn[:12], [problem.answer for problem in drawn[:12]], seed=3)
        train_mix(model, self.tokenizer, sft_rows(drawn[12:]), pairs, SHORT, self.folder / name / "mix", **shown)
        states.append(_copy(model))
        return dict(zip(("start", "sft", "mix"), states, strict=True))


def _copy(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_routers_are_seeded_and_without_experts_none_of_them_matters(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    first, again = (bench.train(name, (1, 2), with_experts=True) for name in ("first", "again"))
    alone = bench.train("alone", (1, 2), with_experts=False)
    others = bench.train("others", (3, 4), with_experts=False)
    for phase in ("start", "sft", "mix"):
        for name, tensor in first[phase].items():
            assert torch.equal(tensor, again[phase][name]), (phase, name)
            assert torch.equal(alone[phase][name], others[phase][name]), (phase, name)
    head = "route_head.weight"
    assert not torch.equal(first["start"][head], first["sft"][head])
    assert torch.equal(alone["start"][head], alone["mix"][head])
    body = next(name for name in first["sft"] if name.endswith("q_proj.weight"))
    assert not torch.equal(first["start"][body], first["sft"][body])
    assert not torch.equal(alone["sft"][body], alone["mix"][body])
    assert not torch.equal(alone["mix"][body], first["mix"][body])


def test_the_table_fits_a_terminal_of_80_columns() -> None:
    systems = {name: {kind: [1.0, 1.0, 0.0] for kind in KINDS} for name in SYSTEMS}
    console = Console(file=StringIO(), width=80)
    console.print(results_table(systems, bold="FusionRoute"))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    for name in SYSTEMS:
        (line,) = [line for line in lines if line.startswith(f" {name}  ")]  # no name is broken into two lines
        assert line.count("66.7±33.3") == 4


def test_the_settings_fill_their_batches_with_both_kinds_of_rows() -> None:
    for settings in (FULL_SIZE, QUICK):
        assert settings.mix.batch_size % 2 == 0
        assert settings.sft.steps * settings.sft.batch_size % len(KINDS) == 0
        assert settings.mix.steps * settings.mix.batch_size // 2 % len(KINDS) == 0


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seed=-1"):
        demo.main(["--seed", "-1", "--output", str(tmp_path)])
    with pytest.raises(SystemExit):
        demo.main(["--steps", "3"])
