"""Experts that share a base model through LoRA adapters, offloaded ones, and quantised ones."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("peft")

import torch
from fusionroute_tiny import put_in_hub_cache, save_tiny, save_tiny_adapter, tiny_model
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from ebpo_core.fusionroute.experts.experts import Experts
from ebpo_core.fusionroute.experts.files import ADAPTER_WEIGHTS
from ebpo_core.fusionroute.experts.offload import OffloadPool, exact_device

if TYPE_CHECKING:
    from pathlib import Path

IDS = torch.tensor([[1, 9, 30, 77, 150, 8, 199, 44, 23, 12, 101, 57]])
TOLERANCE = {"atol": 1e-4, "rtol": 0.0}  # PEFT's own model adds in another order


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


def resident(pool: OffloadPool, device: torch.device) -> Any:
    """The model whose turn it is on a device; None at first."""
    hook = pool._resident.get(device)
    return None if hook is None else hook.model


class Family:
    """A base model, three adapters of different kinds, and what PEFT's own models compute."""

    def __init__(self, root: Path) -> None:
        self.base = save_tiny(root / "base", "llama")
        settings: dict[str, dict[str, Any]] = {
            "math": {},
            "code": {"r": 8, "target_modules": ["q_proj", "v_proj"], "use_dora": True},
            "chat.v1": {"modules_to_save": ["lm_head"]},
        }
        self.experts: dict[str, Any] = {"base": str(self.base)}
        self.expected = {"base": logits(tiny_model("llama"))}
        for seed, (name, options) in enumerate(settings.items()):
            adapted: Any = save_tiny_adapter(root / name, tiny_model("llama"), seed, **options)
            if name == "chat.v1":  # a copy of the base's head until it is trained
                with torch.no_grad():
                    adapted.base_model.model.lm_head.modules_to_save["default"].weight.mul_(-1)
                adapted.save_pretrained(root / name)
            self.experts[name] = {"path": str(self.base), "adapter": str(root / name)}
            self.expected[name] = logits(adapted)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("family"))


def test_adapters_share_their_base(family: Family) -> None:
    experts = Experts.load(family.experts)
    assert len({id(expert.model) for expert in experts}) == 1
    assert experts[0].model.num_parameters() < 2 * tiny_model("llama").num_parameters()
    assert len({expert.hash for expert in experts}) == 4
    # Every order of two: what an expert computes does not depend on which one ran before it.
    for before in experts.names:
        for name in experts.names:
            experts[before](input_ids=IDS)
            torch.testing.assert_close(logits(experts[name]), family.expected[name], **TOLERANCE)
            model = experts[name].model
            assert not any(parameter.requires_grad for parameter in model.parameters())
            assert not model.training
    spread = [(family.expected["base"] - out).abs().max() for name, out in family.expected.items() if name != "base"]
    assert min(spread) > 1, "the test could not tell adapters apart"


def test_an_adapter_alone_and_without_its_base_as_an_expert(family: Family) -> None:
    names = ["code", "math"]
    experts = Experts.load({name: family.experts[name] for name in names})
    for name in [*names, *names]:
        torch.testing.assert_close(logits(experts[name]), family.expected[name], **TOLERANCE)


def test_base_models_of_other_dtypes_are_not_shared(family: Family) -> None:
    other = {**family.experts["math"], "dtype": "bfloat16"}
    experts = Experts.load({"math": family.experts["math"], "half": other})
    assert experts[0].model is not experts[1].model
    assert {parameter.dtype for parameter in experts["half"].model.parameters()} == {torch.bfloat16}
    assert (experts["half"](input_ids=IDS).logits.float() - family.expected["math"]).abs().mean() < 0.2


@pytest.mark.parametrize("offload", [False, True])
def test_threads_on_one_base(family: Family, offload: bool) -> None:
    given = {name: {"path": each} if isinstance(each, str) else each for name, each in family.experts.items()}
    experts = Experts.load({name: {**each, "offload": offload} for name, each in given.items()})
    expected = {name: logits(experts[name]) for name in experts.names}
    wrong: list[str] = []

    def work(offset: int) -> None:
        for step in range(20):
            name = experts.names[(step * offset + step) % len(experts)]
            if not torch.equal(experts[name](input_ids=IDS).logits, expected[name]):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_save_into_copies_a_shared_base_once(family: Family, tmp_path: Path) -> None:
    experts = Experts.load(family.experts)
    references = experts.save_into(tmp_path)
    assert {reference.path for reference in references} == {"experts/base"}
    assert [reference.adapter for reference in references[1:]] == [f"experts/{name}" for name in experts.names[1:]]
    assert [reference.hash for reference in references] == [expert.hash for expert in experts]
    assert len(list(tmp_path.rglob("model.safetensors"))) == 1
    again = Experts.load(references, base_dir=tmp_path)
    for before, after in zip(experts, again, strict=True):
        assert torch.equal(logits(before), logits(after))
    # Without the base among the experts it gets a folder of its own name, beside an expert that is called so, too.
    named_so = {"base": family.experts["math"], "code": family.experts["code"]}
    references = Experts.load(named_so).save_into(tmp_path / "second")
    assert {reference.path for reference in references} == {"experts/base-2"}
    assert torch.equal(logits(Experts.load(references, base_dir=tmp_path / "second")["code"]), logits(experts["code"]))


def test_changed_or_unfit_adapters_are_refused(family: Family, tmp_path: Path) -> None:
    lora = tmp_path / "lora"
    save_tiny_adapter(lora, tiny_model("llama"))
    expert = {"path": str(family.base), "adapter": str(lora)}
    stored = Experts.load([expert]).stored(tmp_path)
    assert stored[0].adapter == "./lora"
    tensors = load_file(lora / ADAPTER_WEIGHTS)
    save_file({name: value * 2 for name, value in tensors.items()}, lora / ADAPTER_WEIGHTS)
    with pytest.raises(ValueError, match="expert 'lora'.*not those"):
        Experts.load(stored, base_dir=tmp_path)
    Experts.load(stored, base_dir=tmp_path, verify=False)
    del tensors[next(iter(tensors))]
    save_file(tensors, lora / ADAPTER_WEIGHTS)
    with pytest.raises(ValueError, match="expert 'lora'.*missing keys.*lora"):
        Experts.load([expert])
    save_file({**tensors, "base_model.model.other.weight": torch.zeros(2)}, lora / ADAPTER_WEIGHTS)
    with pytest.raises(ValueError, match="expert 'lora'.*(missing|unexpected) keys"):
        Experts.load([expert])
    (lora / ADAPTER_WEIGHTS).rename(lora / "adapter_model.bin")
    with pytest.raises(ValueError, match="expert 'lora'.*pickles"):
        Experts.load([expert])
    live = tiny_model("llama")
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), live)
    with pytest.raises(ValueError, match="expert 'x' is a live model with adapters"):
        Experts.load({"x": live})


def test_adapters_from_the_hub_cache(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    put_in_hub_cache(tmp_path, "owner/base", family.base)
    save_tiny_adapter(tmp_path / "lora", tiny_model("llama"), seed=0)
    put_in_hub_cache(tmp_path, "owner/lora", tmp_path / "lora", commit="d" * 40)
    (expert,) = Experts.load([{"path": "owner/base", "adapter": "owner/lora", "adapter_revision": "d" * 40}])
    assert expert.name == "lora"
    torch.testing.assert_close(logits(expert), family.expected["math"], **TOLERANCE)
    assert expert.hash == Experts.load([{"path": str(family.base), "adapter": str(tmp_path / "lora")}])[0].hash
    with pytest.raises(OSError, match="expert 'gone' \\('owner/gone'"):
        Experts.load([{"path": "owner/base", "adapter": "owner/gone"}])


def test_an_offloaded_expert_stays_until_another_one_is_needed(family: Family, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", "gemma3", 4)
    experts = Experts.load(
        {
            "here": str(family.base),
            "first": {"path": str(family.base), "offload": True},
            "second": {"path": str(other), "offload": True},
            "adapted": {**family.experts["math"], "offload": True},
        }
    )
    pool, cpu = experts["first"]._pool, torch.device("cpu")
    assert pool is not None
    assert resident(pool, cpu) is None
    for name in ("first", "first", "here", "second", "first", "adapted", "second"):
        out = logits(experts[name])
        if name != "here":
            assert resident(pool, cpu) is experts[name].model
        expected = family.expected["math" if name == "adapted" else "base"] if name != "second" else None
        torch.testing.assert_close(out, logits(tiny_model("gemma3", 4)) if expected is None else expected, **TOLERANCE)
    assert experts["first"].model is experts["adapted"].model is not experts["here"].model


def test_the_hook_moves_a_model_when_it_runs_and_not_before() -> None:
    """On torch's meta device, the only other one that every machine has (nothing can come back from it)."""
    pool, cpu, meta = OffloadPool(), torch.device("cpu"), torch.device("meta")
    model, other = tiny_model("llama"), tiny_model("qwen2")
    for each in (model, other):
        pool.add(each, cpu)
    pool.bring(model)
    assert resident(pool, cpu) is model
    for each in (model, other):
        pool.move(each, meta)
    assert resident(pool, cpu) is resident(pool, meta) is None
    assert (pool.device(model), model.device) == (meta, cpu)
    with pool.lock, torch.no_grad():
        pool.bring(model)
        assert model.device == cpu
        out: Any = model(input_ids=IDS)
    assert out.logits.device == model.device == meta
    assert resident(pool, meta) is model
    pool.bring(model)  # its turn again: it stays
    with pytest.raises(NotImplementedError, match="meta tensor"):
        pool.bring(other)  # another one's turn: it goes back


def test_devices(family: Family) -> None:
    experts = Experts.load(
        {
            "follows": str(family.base),
            "stays": {"path": str(family.base), "device": "cpu"},
            "offloaded": {"path": str(family.base), "offload": True},
            "pinned": {"path": str(family.base), "offload": True, "device": "cpu"},
        }
    )
    assert experts.to("meta") is experts
    devices = {expert.name: (expert.device.type, expert.model.device.type) for expert in experts}
    assert devices == {
        "follows": ("meta", "meta"),
        "stays": ("cpu", "cpu"),
        "offloaded": ("meta", "cpu"),
        "pinned": ("cpu", "cpu"),
    }
    assert exact_device(None) == torch.device("cpu")


@pytest.mark.parametrize("values", [{"load_in_8bit": True}, {"quant_method": "bitsandbytes", "load_in_4bit": True}])
def test_quantised_experts(family: Family, tmp_path: Path, values: dict[str, Any]) -> None:
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    kind = Linear4bit if "load_in_4bit" in values else Linear8bitLt
    if kind is Linear4bit:
        values = {**values, "bnb_4bit_quant_type": "nf4"}
    given = {"path": str(family.base), "quantization_config": values}
    experts = Experts.load({"small": given, "adapted": {**given, "adapter": family.experts["math"]["adapter"]}})
    small = experts["small"]
    assert small.model is experts["adapted"].model
    assert any(isinstance(module, kind) for module in small.model.modules())
    assert not any(parameter.requires_grad for parameter in small.model.parameters())
    assert small.vocab_size == 200
    for name, expected in (("small", "base"), ("adapted", "math"), ("small", "base")):
        out = logits(experts[name]).float().flatten()
        correlations = {
            other: torch.corrcoef(torch.stack([out, family.expected[other].flatten()]))[0, 1].item()
            for other in ("base", "math")
        }
        assert max(correlations, key=correlations.__getitem__) == expected
        assert correlations[expected] > (0.9 if kind is Linear8bitLt else 0.5)
    stored = [json.loads(json.dumps(reference.to_dict())) for reference in experts.stored(tmp_path)]
    assert stored[0]["hash"] == Experts.load([family.base])[0].hash, "of the files, however they are loaded"
    again = Experts.load(stored, base_dir=tmp_path)
    assert torch.equal(logits(again["adapted"]), logits(experts["adapted"]))
