"""EBPOConfig: what it refuses, its defaults in both modes, command line and YAML, and the error without TRL."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("trl")

import trainer_worker as tiny
from transformers import HfArgumentParser
from trl import GRPOConfig, TrlParser

import ebpo_core
from ebpo_core.trainer import EBPOConfig

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


def config(tmp_path: Path, **settings: Any) -> EBPOConfig:
    built = tiny.config(EBPOConfig, tmp_path, **settings)
    assert isinstance(built, EBPOConfig)
    return built


def test_defaults_are_the_papers(tmp_path: Path) -> None:
    built = config(tmp_path)
    assert ebpo_core.EBPO(**built.ebpo_options()).options == ebpo_core.EBPO().options
    assert built.scale_rewards == "none"
    assert not built.ebpo_shadow


def test_everything_else_is_grpos(tmp_path: Path) -> None:
    ours, theirs = config(tmp_path), tiny.config(GRPOConfig, tmp_path)
    same = {name: value for name, value in vars(theirs).items() if name not in {"scale_rewards", "logging_dir"}}
    assert {name: str(getattr(ours, name)) for name in same} == {name: str(value) for name, value in same.items()}


@pytest.mark.parametrize("value", ["group", "batch", True])
def test_scaling_of_rewards_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match=r"scale_rewards='(group|batch)'.*leave scale_rewards unset.*ebpo_shadow"):
        config(tmp_path, scale_rewards=value)


@pytest.mark.parametrize("value", ["none", False, None])
def test_no_scaling_is_accepted(tmp_path: Path, value: Any) -> None:
    assert config(tmp_path, scale_rewards=value).scale_rewards == "none"


def test_normalize_then_sum_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"multi_objective_aggregation='normalize_then_sum'.*use 'sum_then_normalize'"):
        config(tmp_path, multi_objective_aggregation="normalize_then_sum")


@pytest.mark.parametrize(
    ("value", "expected"), [(None, "group"), ("batch", "batch"), ("none", "none"), (True, "group")]
)
def test_shadow_mode_keeps_trls_scaling(tmp_path: Path, value: Any, expected: str) -> None:
    built = config(tmp_path, ebpo_shadow=True, scale_rewards=value, multi_objective_aggregation="normalize_then_sum")
    assert built.scale_rewards == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ebpo_normalize": "group"}, "normalize.*group"),
        ({"ebpo_decay": 0.0}, "decay"),
        ({"ebpo_kappa": -1.0}, "kappa"),
        ({"ebpo_shrinkage": 2.0}, "shrinkage=2"),
        ({"ebpo_shrinkage": 0.5, "ebpo_sigma2": "within"}, "shrinkage=0.5.*within"),
        ({"ebpo_max_keys": -1}, "max_keys"),
        ({"ebpo_score": "before", "ebpo_leave_one_out": True}, "leave_one_out"),
    ],
)
def test_options_are_checked_when_the_config_is_made(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}.*`ebpo_` field of EBPOConfig"):
        config(tmp_path, **settings)


def test_command_line(tmp_path: Path) -> None:
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--ebpo_tau2", "debiased"]
    arguments += ["--ebpo_decay", "0.99", "--ebpo_shadow", "--ebpo_prior", "somewhere", "--scale_rewards", "batch"]
    (built,) = HfArgumentParser(EBPOConfig).parse_args_into_dataclasses(arguments)
    assert (built.ebpo_tau2, built.ebpo_decay, built.ebpo_prior) == ("debiased", 0.99, "somewhere")
    assert built.ebpo_shadow
    assert built.ebpo_shrinkage is None
    given = [*arguments, "--ebpo_shrinkage", "0.5", "--ebpo_tau2", "raw"]
    assert HfArgumentParser(EBPOConfig).parse_args_into_dataclasses(given)[0].ebpo_shrinkage == 0.5
    assert built.scale_rewards == "batch"
    with pytest.raises(SystemExit):
        HfArgumentParser(EBPOConfig).parse_args_into_dataclasses([*arguments, "--ebpo_tau2", "biased"])


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        HfArgumentParser(EBPOConfig).parse_args(["--help"])
    printed = capsys.readouterr().out
    fields = {name: field for name, field in EBPOConfig.__dataclass_fields__.items() if name.startswith("ebpo_")}
    assert len(fields) == 21
    for name, field in fields.items():
        assert f"--{name}" in printed
        assert len(field.metadata["help"]) > 30


def test_yaml(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\nebpo_normalize: scale\nebpo_leave_one_out: true\n"
        "scale_rewards: none\n",
        encoding="utf-8",
    )
    (built,) = TrlParser([EBPOConfig]).parse_args_and_config(["--config", str(recipe), "--ebpo_decay", "0.5"])
    assert built.ebpo_key_columns() == []
    assert (built.ebpo_normalize, built.ebpo_leave_one_out, built.ebpo_decay) == ("scale", True, 0.5)
    assert built.scale_rewards == "none"


@pytest.mark.parametrize(
    ("line", "columns"),
    [("[topic, level]", ["topic", "level"]), ("topic", ["topic"]), ("\n- topic\n- level", ["topic", "level"])],
)
def test_keys_in_yaml_and_on_the_command_line(tmp_path: Path, line: str, columns: list[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\nebpo_keys: {line}\n", encoding="utf-8")
    (built,) = TrlParser([EBPOConfig]).parse_args_and_config(["--config", str(recipe)])
    assert built.ebpo_key_columns() == columns
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--ebpo_keys", *columns]
    (built,) = HfArgumentParser(EBPOConfig).parse_args_into_dataclasses([*arguments, "--ebpo_per_reward"])
    assert built.ebpo_key_columns() == columns
    assert built.ebpo_per_reward


def test_without_trl_the_error_says_what_to_install() -> None:
    # A real interpreter in which TRL cannot be found; reading a prior must still work there.
    script = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"trl", "transformers", "torch"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from ebpo_core.trainer import last_complete_checkpoint, read_prior
assert last_complete_checkpoint("nowhere") is None
try:
    from ebpo_core.trainer import EBPOTrainer
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert 'pip install "ebpo-core[train]"' in result.stdout


def test_a_wrong_name_is_an_attribute_error() -> None:
    import ebpo_core.trainer

    with pytest.raises(AttributeError, match="NoSuchTrainer"):
        _ = ebpo_core.trainer.NoSuchTrainer
