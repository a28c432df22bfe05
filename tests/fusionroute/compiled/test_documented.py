"""The commands of the documentation's section on compiled experts run in sequence, with tiny models."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from fusionroute_tiny import save_tiny
from transformers import AutoModelForCausalLM

from ebpo_core.fusionroute.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning:(transformers|trl)")]

PAGE = Path(__file__).parents[3] / "docs" / "fusionroute.md"
SMALL = {
    "train": ["--use_cpu=true", "--bf16=false", "--max_steps=1", "--gradient_accumulation_steps=1"],
    "compile": ["--steps=2", "--rank=4", "--device=cpu"],
    "generate": ["--device=cpu", "--max-new-tokens=4"],
}


def commands() -> list[list[str]]:
    """The commands of the section's console block, as words."""
    section = PAGE.read_text(encoding="utf-8").partition("\n## Compiled experts\n")[2].partition("\n## ")[0]
    block = section.partition("```console\n")[2].partition("```")[0].replace("\\\n", " ")
    return [shlex.split(line.removeprefix("$ ")) for line in block.splitlines() if line.startswith("$ fusionroute ")]


def test_the_documented_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, name in enumerate(("router", "math", "code")):
        save_tiny(tmp_path / "models" / name, "llama", seed=seed, hidden_size=32)
    rows = [{"prompt": f"w{10 + n} w{20 + n}", "completion": f" w{30 + n} w{40 + n}"} for n in range(30)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    found = commands()
    assert [words[1] for words in found] == ["train", "compile", "show", "generate"]
    for words in found:
        assert main([*words[1:], *SMALL.get(words[1], [])]) == 0
    assert "compiled, rank 4" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained("runs/compiled")
    assert model.experts.names == ["math", "code"]
    assert model.compiled is not None
    again = ["train", "--model_name_or_path", "runs/compiled", "--data", "data/sft.jsonl", "--output_dir", "x"]
    assert main([*again, "--use_cpu=true"]) != 0
    assert "compiled for its router as it is" in capsys.readouterr().err
