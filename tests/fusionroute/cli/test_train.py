"""`fusionroute train`: both stages on tiny models from files and flags, resuming, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("rich")

import torch
from fusionroute_tiny import save_tiny, tiny_tokenizer
from safetensors.torch import load_file
from transformers import AutoTokenizer

from ebpo_core.data.rows import load_rows
from ebpo_core.fusionroute import FusionRouteForCausalLM
from ebpo_core.fusionroute.cli import main
from ebpo_core.fusionroute.cli.arguments import parse
from ebpo_core.fusionroute.cli.train import load_model
from ebpo_core.fusionroute.training import FusionRouteCDPOConfig, FusionRouteSFTConfig
from ebpo_core.fusionroute.training.base import FusionRouteTrainer

# transformers renamed what TRL 1.16 still sets; see ebpo_core.fusionroute.cli.main for the command itself.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:(transformers|trl)")

SMALL = """
use_cpu: true
max_steps: 2
per_device_train_batch_size: 4
learning_rate: 1.0e-2
logging_steps: 1
save_strategy: "no"
report_to: none
disable_tqdm: true
beta: 0.2
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A router, two experts of other families, sixteen SFT rows and eight preference rows."""
    root = tmp_path_factory.mktemp("train")
    for seed, (name, family) in enumerate([("router", "llama"), ("math", "llama"), ("code", "qwen3")]):
        save_tiny(root / name, family, seed=seed, hidden_size=32, layers=1)
    samples = [{"prompt": f"w{10 + n} w{20 + n}", "completion": f" w{30 + n} w{40 + n}"} for n in range(16)]
    pairs = [
        {"prompt": f"w{10 + n} w{20 + n}", "chosen": f" w{30 + n}", "rejected": f" w{60 + n} w{70 + n}"}
        for n in range(8)
    ]
    for name, rows in (("samples", samples), ("pairs", pairs)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "recipe.yaml").write_text(
        f"model_name_or_path: {root}/router\nexperts:\n  math: {root}/math\n  code: {root}/code\n"
        f"data: {root}/samples.jsonl\n{SMALL}"
    )
    return root


def train(folder: Path, *flags: str) -> int:
    return main(["train", "--config", str(folder / "recipe.yaml"), *flags])


def read_log(output: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


@pytest.mark.slow
def test_sft_then_mix_from_one_recipe(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file serves both stages: the second starts from the first's checkpoint, whose experts it finds there."""
    first, second = tmp_path / "sft", tmp_path / "mix"
    held_out = f"--eval_data={folder}/samples.jsonl"
    assert train(folder, "--output_dir", str(first), held_out) == 0
    assert str(first) in capsys.readouterr().out.splitlines()[-1]
    assert [record["step"] for record in read_log(first)] == [1, 2]
    result = json.loads((first / "result.json").read_text())
    assert (result["stage"], result["steps"]) == ("sft", 2)
    assert result["evaluation"]["eval_loss"] > 0

    second_recipe = tmp_path / "mix.yaml"
    second_recipe.write_text(
        f"model_name_or_path: {first}\nstage: mix\ndata: {folder}/samples.jsonl\n"
        f"preferences: {folder}/pairs.jsonl\n{SMALL}"
    )
    command = ["train", f"--config={second_recipe}", "--output_dir", str(second), "--train_size=6", "--max_steps=3"]
    assert main(command) == 0
    log = read_log(second)
    assert [record["step"] for record in log] == [1, 2, 3]
    assert "rewards/margins" in log[0]
    assert "routing/accuracy" in log[0]
    for before, after in [(folder / "router", first), (first, second)]:
        old, new = weights(before), weights(after)
        old = old if before == first else {f"router.{name}": value for name, value in old.items()}
        changed = [name for name in new if name in old and not torch.equal(old[name], new[name])]
        assert any(name.startswith("router.") for name in changed)
        assert before != first or "route_head.weight" in changed
    model = FusionRouteForCausalLM.from_pretrained(second)
    assert list(model.experts.names) == ["math", "code"]
    assert main(["generate", str(second), "--prompt", "w10 w20", "--max-new-tokens", "3", "--device", "cpu"]) == 0


@pytest.mark.slow
def test_cdpo_alone_loads_no_expert_and_leaves_the_route_head(folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "sft", tmp_path / "cdpo"
    assert train(folder, "--output_dir", str(first), "--routing_loss", "softmax") == 0
    flags = [f"--model_name_or_path={first}", "--stage=cdpo", f"--preferences={folder}/pairs.jsonl", "--use_cpu=true"]
    flags += [f"--output_dir={second}", "--max_steps=2", "--report_to=none", "--save_strategy=no"]
    model, _ = load_model(*parse(flags))
    assert len(model.experts) == 0
    assert main(["train", *flags]) == 0
    old, new = weights(first), weights(second)
    assert torch.equal(old["route_head.weight"], new["route_head.weight"])
    assert any(not torch.equal(old[name], new[name]) for name in old)


@pytest.mark.slow
def test_an_adapter_is_merged_into_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    flags = ["--use_peft", "--lora_r=2", "--lora_target_modules", "q_proj", "v_proj"]
    assert train(folder, f"--output_dir={tmp_path}/run", *flags) == 0
    model = FusionRouteForCausalLM.from_pretrained(tmp_path / "run")
    router = load_file(folder / "router" / "model.safetensors")
    merged = weights(tmp_path / "run")
    changed = [name for name, value in router.items() if not torch.equal(value, merged[f"router.{name}"])]
    assert sorted(changed) == [name for name in sorted(router) if "q_proj" in name or "v_proj" in name]
    assert AutoTokenizer.from_pretrained(tmp_path / "run").get_vocab() == tiny_tokenizer().get_vocab()
    assert len(model.experts) == 2


@pytest.mark.slow
@pytest.mark.parametrize("targets", [[], ["lm_head"], ["q_proj", "embed_tokens"], ["all-linear"]])
def test_an_adapter_of_a_tied_router_is_merged_as_it_was_trained(
    folder: Path, tmp_path: Path, targets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without targets those of the router's family, as the recipe advises."""
    pytest.importorskip("peft")
    save_tiny(tmp_path / "router", "llama", seed=0, hidden_size=32, layers=1, tie_word_embeddings=True)
    ids, expected = torch.tensor([[1, 7, 8, 9]]), []

    def recorded(trainer: Any, output: Any) -> None:
        expected.append(trainer.model.eval()(input_ids=ids).logits)
        save_merged(trainer, output)

    save_merged = FusionRouteTrainer.save_merged
    monkeypatch.setattr(FusionRouteTrainer, "save_merged", recorded)
    flags = ["--use_peft", "--lora_r=2", *(["--lora_target_modules", *targets] if targets else [])]
    assert train(folder, f"--model_name_or_path={tmp_path}/router", f"--output_dir={tmp_path}/run", *flags) == 0
    model = FusionRouteForCausalLM.from_pretrained(tmp_path / "run")
    torch.testing.assert_close(model(input_ids=ids).logits, expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_run_resumes_as_if_never_stopped(folder: Path, tmp_path: Path) -> None:
    saving = ("--save_strategy=steps", "--save_steps=1", "--max_steps=3")
    assert train(folder, f"--output_dir={tmp_path}/whole", *saving) == 0
    cut = tmp_path / "cut"
    assert train(folder, f"--output_dir={cut}", *saving) == 0
    # As a kill during the third step would leave it.
    (cut / "checkpoint-3" / "trainer_state.json").write_text('{"global_step": 3, "ep')
    (cut / "model.safetensors").unlink()
    assert train(folder, f"--output_dir={cut}", *saving, "--resume_from_checkpoint=auto") == 0
    whole, resumed = weights(tmp_path / "whole"), weights(cut)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [record["step"] for record in read_log(cut)] == [1, 2, 3]


# ---------------------------------------------------------------------------------------------------------- options


def test_experts_from_flags_and_files(folder: Path) -> None:
    flags = ["--model_name_or_path=m", "--data=d.jsonl", "--experts", "math=a", "code=b=c", "--use_cpu=true"]
    arguments, config, model = parse(flags)
    assert arguments.named_experts() == {"math": "a", "code": "b=c"}
    assert type(config) is FusionRouteSFTConfig
    assert model.model_name_or_path == "m"
    arguments, config, _ = parse(["--config", str(folder / "recipe.yaml"), "--learning_rate=3e-4"])
    assert arguments.named_experts() == {"math": f"{folder}/math", "code": f"{folder}/code"}
    assert (config.learning_rate, config.max_steps) == (3e-4, 2)
    arguments, config, _ = parse(
        ["--config", str(folder / "recipe.yaml"), "--stage", "mix", f"--preferences={folder}/pairs.jsonl"]
    )
    assert type(config) is FusionRouteCDPOConfig
    assert config.beta == 0.2


def test_rows_from_every_kind_of_file(folder: Path, tmp_path: Path) -> None:
    rows = load_rows("data", str(folder / "samples.jsonl"), "train")
    rows.to_parquet(tmp_path / "a.parquet")
    rows.save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "saved"):
        assert load_rows("data", str(tmp_path / name), "train").to_list() == rows.to_list()
    assert len(load_rows("data", str(folder / "samples.jsonl"), "train", 5)) == 5


@pytest.mark.parametrize("odd", [7, [{"role": "user", "content": "w7"}], {"role": "user"}])
def test_a_column_of_several_kinds_is_named(tmp_path: Path, odd: Any) -> None:
    file = tmp_path / "rows.jsonl"
    lines = [{"prompt": "w7", "weight": 1}, {"prompt": None, "weight": 0.5}, {"prompt": odd, "weight": 1}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    message = (
        rf"^data='.*rows.jsonl': column 'prompt' holds .* kinds, str \(row 0\), {type(odd).__name__} \(row 2\): give"
    )
    with pytest.raises(ValueError, match=message):
        load_rows("data", str(file))
    file.write_text("".join(json.dumps({**line, "prompt": "w7"}) + "\n" for line in lines))
    assert load_rows("data", str(file))["weight"] == [1, 0.5, 1]
    file.write_text(json.dumps({"input_ids": [1, 2**70]}) + "\n")
    with pytest.raises(ValueError, match=r"^data='.*rows.jsonl': values that no column can hold"):
        load_rows("data", str(file))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--no_such_option=1"], "no_such_option"),
        (["--stage=sft", "--beta=0.5"], "--beta (stage sft does not have it, mix and cdpo do)"),
        (["--stage=mix"], "preferences is missing"),
        (["--stage=cdpo", "--preferences=p.jsonl"], "stage cdpo does not use it"),
        (["--eval_preferences=p.jsonl"], "stage sft does not use it"),
        (["--experts", "math"], "experts='math': expected NAME=PATH"),
        (["--experts", "a=x", "a=y"], "'a' is there twice"),
        (["--train_size=0"], "train_size=0"),
        (["--config=second.yaml"], "--config"),
        (["--data=nowhere.jsonl"], "data='nowhere.jsonl': no such file"),
        (["--data=/nowhere/at/all"], "data='/nowhere/at/all': no such file"),
        (["--resume_from_checkpoint=nowhere"], "no such directory"),
        (["--alpha=nan"], "alpha is nan"),
        (["--expert_paths", "math=x"], "expert_paths and experts"),
        (["--cpu_threads=0"], "cpu_threads=0"),
    ],
)
def test_wrong_input_is_one_line(
    more: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(folder, f"--output_dir={tmp_path}/run", *more) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fusionroute train: ")
    assert message in error


def test_experts_typed_for_a_checkpoint_are_refused_before_anything_is_loaded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "fusionroute", "router_config": {"model_type": "llama"}}')
    assert train(folder, f"--model_name_or_path={tmp_path}", "--experts", "math=x", f"--output_dir={tmp_path}/run") == 1
    assert capsys.readouterr().err == (
        f"fusionroute train: experts=['math=x']: {str(tmp_path)!r} is a FusionRoute checkpoint and has its experts; "
        "leave them out, or say with expert_paths where they are now\n"
    )
    assert train(folder, f"--model_name_or_path={tmp_path}", f"--output_dir={tmp_path}/run") == 1
    assert "experts=" not in capsys.readouterr().err, "those of the file are ignored: what is missing is the weights"


def test_a_file_with_an_unknown_name_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content, message in [
        ("learning_rat: 0.1\n", "learning_rat"),
        ("- a\n", "expected a mapping"),
        ("a: [\n", "not YAML"),
    ]:
        file = tmp_path / "typo.yaml"
        file.write_text(content)
        assert main(["train", "--config", str(file), "--model_name_or_path=m", "--data=d"]) == 1
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_plain_model_needs_experts_and_a_model_is_needed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--model_name_or_path={folder}/router", f"--data={folder}/samples.jsonl", "--use_cpu=true"]
    assert main(["train", *flags, f"--output_dir={tmp_path}"]) == 1
    assert "a llama model has no experts" in capsys.readouterr().err
    with pytest.raises(ValueError, match="model_name_or_path is missing"):
        parse(["--data=d"])
    for flags in (["--config=nowhere.yaml"], ["--config"]):
        with pytest.raises(FileNotFoundError, match="no such YAML"):
            parse(flags)


@pytest.mark.slow
def test_qlora_trains_and_saves_plain_weights(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    flags = ["--use_peft", "--lora_r=2", "--load_in_4bit=true", "--bnb_4bit_quant_type=nf4"]
    assert train(folder, f"--output_dir={tmp_path}/sft", *flags, f"--eval_data={folder}/samples.jsonl") == 0
    model = FusionRouteForCausalLM.from_pretrained(tmp_path / "sft")
    assert "Linear4bit" not in {type(module).__name__ for module in model.router.modules()}
    # From the checkpoint too, which has its experts.
    flags += [f"--model_name_or_path={tmp_path}/sft", f"--preferences={folder}/pairs.jsonl", "--stage=mix"]
    assert train(folder, f"--output_dir={tmp_path}/mix", *flags) == 0
    found, before = weights(tmp_path / "mix"), weights(tmp_path / "sft")
    assert found.keys() == before.keys()
    name = "router.model.layers.0.self_attn.q_proj.weight"
    assert len(before[name].unique()) > 100 < len(found[name].unique())
    assert not torch.equal(found[name], before[name]), "rounded to four bits"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--load_in_4bit=true"], "load_in_4bit=True: quantised weights do not train, an adapter does; add use_peft"),
        (["--load_in_8bit=true"], "load_in_8bit=True: quantised weights do not train"),
        (["--load_in_4bit=true", "--use_peft", "--dtype=auto"], "dtype='auto' with load_in_4bit"),
        (["--load_in_4bit=true", "--load_in_8bit=true"], "8 bit and 4 bit precision at the same time"),
        (["--bnb_4bit_quant_type=fp4"], "bnb_4bit_quant_type='fp4': is of load_in_4bit"),
        (["--bnb_4bit_quant_storage=uint8", "--use_peft"], "bnb_4bit_quant_storage='uint8': is of load_in_4bit"),
        (["--use_bnb_nested_quant=true", "--load_in_8bit=true", "--use_peft"], "use_bnb_nested_quant=True: is of"),
        (["--lora_r=4"], "lora_r=4: is of use_peft, which is not set"),
        (["--lora_target_modules", "q_proj", "v_proj"], "lora_target_modules=['q_proj', 'v_proj']: is of use_peft"),
        (["--use_dora=true"], "use_dora=True: is of use_peft"),
        (["--use_peft", "--lora_task_type=SEQ_CLS"], "lora_task_type='SEQ_CLS'"),
    ],
)
def test_options_without_effect_are_refused(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is loaded: there is nothing where these paths lead."""
    flags = [f"--model_name_or_path={tmp_path}/none", f"--data={tmp_path}/none.jsonl", "--use_cpu=true"]
    assert main(["train", *flags, "--experts", f"a={tmp_path}/a", f"--output_dir={tmp_path}/run", *more]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
