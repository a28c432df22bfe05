"""References to experts: JSON round trips, where paths lead, what is stored, names, and changes to stored ones."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("transformers")

import torch
from fusionroute_tiny import save_tiny, save_tiny_adapter, save_tiny_gguf, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from transformers import BitsAndBytesConfig

from ebpo_core.fusionroute.experts.naming import named, overridden, parse_experts
from ebpo_core.fusionroute.experts.references import ExpertReference, is_hub_id

if TYPE_CHECKING:
    from pathlib import Path

_WORD = st.text("abcXYZ019._-+", min_size=1, max_size=12).map(lambda text: f"n{text}")
_OPTIONAL = st.none() | _WORD
_REFERENCES = st.builds(
    ExpertReference,
    name=_WORD | st.just(""),
    path=_WORD,
    revision=_OPTIONAL,
    subfolder=_OPTIONAL,
    dtype=st.sampled_from([None, "auto", "float32", "bfloat16", torch.float16]),
    device=st.sampled_from([None, "cpu", "cuda:1", 0, torch.device("cuda", 3)]),
    offload=st.booleans(),
    quantization_config=st.none()
    | st.just({"quant_method": "bitsandbytes", "load_in_8bit": True, "skip": [None, 1.5]}),
    adapter=_OPTIONAL,
    attn_implementation=st.sampled_from([None, "sdpa", "eager"]),
    hash=_OPTIONAL,
    vocab_size=st.none() | st.integers(1, 300_000),
)


@given(_REFERENCES)
def test_json_round_trip(reference: ExpertReference) -> None:
    values = json.loads(json.dumps(reference.to_dict()))
    assert ExpertReference.from_dict(values) == reference
    assert {"name", "path"} <= set(values)
    assert None not in {key: value for key, value in values.items() if key != "path"}.values()
    assert ExpertReference.parse(values) == ExpertReference.parse(reference) == reference


def test_quantization_config_objects_become_plain_values() -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    reference = ExpertReference(path="owner/name", quantization_config=config)  # type: ignore[arg-type]
    assert json.loads(json.dumps(reference.to_dict())) == reference.to_dict()
    assert reference.quantization_config is not None
    assert reference.quantization_config["bnb_4bit_compute_dtype"] == "bfloat16"
    assert BitsAndBytesConfig.from_dict(dict(reference.quantization_config)).load_in_4bit
    with pytest.raises(TypeError, match="JSON"):
        ExpertReference(path="a", quantization_config={"x": torch.float16})


def test_unknown_keys_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'math'.*\['torch_dtype'\]"):
        ExpertReference.from_dict({"name": "math", "path": "a", "torch_dtype": "float32"})


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"name": "a/b"}, ValueError, "named 'a/b'"),
        ({"name": ".."}, ValueError, "named"),
        ({"name": "-x"}, ValueError, "named"),
        ({"name": "a b"}, ValueError, "named"),
        ({"path": ""}, ValueError, "path is empty"),
        ({"dtype": "float31"}, ValueError, "float31"),
        ({"dtype": "nn"}, ValueError, "nn"),
        ({"device": "gpu"}, ValueError, "'gpu'"),
        ({"offload": 1}, TypeError, "offload"),
        ({"vocab_size": True}, TypeError, "vocab_size"),
        ({"revision": 3}, TypeError, "revision"),
        ({"path": None, "adapter": "b"}, ValueError, "path of the model"),
        ({"adapter_revision": "v1"}, ValueError, "without an adapter"),
        ({"gguf_file": "m.gguf", "quantization_config": {"load_in_8bit": True}}, ValueError, "GGUF"),
    ],
)
def test_values_that_do_not_fit(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ExpertReference(**{"path": "owner/name", **values})


def test_relative_paths_lead_into_the_checkpoint_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "checkpoint"
    for folder in (tmp_path / "own" / "math", checkpoint / "own" / "math", tmp_path / "own" / "code"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    math, code = ExpertReference(path="own/math"), ExpertReference(path="own/code")
    assert math.source(checkpoint).folder == checkpoint / "own" / "math"
    assert math.source().folder == tmp_path / "own" / "math"
    assert code.source(checkpoint).folder == tmp_path / "own" / "code"
    assert replace(math, path="own", subfolder="math").source().folder == tmp_path / "own" / "math"
    other = ExpertReference(path="own/other", revision="v2", subfolder="deep").source(checkpoint)
    assert other == ("own/other", None, "v2", "deep", None), "neither here nor there: a hub id"


def test_paths_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (str(tmp_path / "gone"), "./gone", "~/no/such/folder", "a/b/c", "experts/math"):
        with pytest.raises(FileNotFoundError, match=r"expert 'x'.*expert_paths"):
            ExpertReference(name="x", path=path).source(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expert 'x': there is no adapter '\./gone'"):
        ExpertReference(name="x", path="owner/name", adapter="./gone").adapter_source()
    with pytest.raises(ValueError, match="expert 'x': .*neither"):
        ExpertReference(name="x", path=str(folder)).source()
    with pytest.raises(FileNotFoundError, match=r"expert 'x': no file 'm\.gguf'"):
        ExpertReference(name="x", path=str(folder), gguf_file="m.gguf").source()
    with pytest.raises(FileNotFoundError, match="expert 'x': no subfolder 'deep'"):
        ExpertReference(name="x", path=str(folder), subfolder="deep").source()
    with pytest.raises(ValueError, match="expert 'x': revision is 'v1'"):
        ExpertReference(name="x", path=str(folder), revision="v1").source()
    with pytest.raises(ValueError, match="expert 'x': .*pip install"):
        ExpertReference(name="x", path="package:no_such_package").source()
    with pytest.raises(ValueError, match="expert 'x' was given as a live model"):
        ExpertReference(name="x").source()


def test_packages_and_gguf_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "weights_of_x"
    package.mkdir()
    save_tiny_gguf(package / "small-q4.gguf")
    (package / "__init__.py").write_text("raise RuntimeError('a package of weights must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = (str(package), "small-q4.gguf", None, "", package)
    by_package = ExpertReference(path="package:weights_of_x")
    by_file = ExpertReference(path=str(package / "small-q4.gguf"))
    assert by_package.source() == by_file.source() == ExpertReference(path=str(package)).source() == found
    assert by_package.anchored() == by_package.stored(tmp_path) == by_package
    assert by_file.anchored().source() == found
    assert [each.name for each in named([by_package, by_file])] == ["weights_of_x", "small-q4"]


def test_stored_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "checkpoint"
    inside, below, outside = checkpoint / "experts" / "math", checkpoint / "owner" / "name", tmp_path / "code"
    for folder in (inside, below, outside):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    for path, base, expected in (
        (str(inside), None, "experts/math"),
        ("experts/math", checkpoint, "experts/math"),
        (str(below), None, "./owner/name"),
        (str(outside), None, str(outside)),
        ("code", None, str(outside)),
        ("owner/hub-name", None, "owner/hub-name"),
    ):
        reference = ExpertReference(path=path, adapter=path, dtype="bfloat16", hash="h")
        stored = reference.anchored(base).stored(checkpoint)
        assert (stored.path, stored.adapter) == (expected, expected)
        assert stored == replace(reference, path=expected, adapter=expected)
        # Reading it back leads to the same place, from any working directory.
        monkeypatch.chdir("/")
        assert stored.source(checkpoint) == stored.anchored(checkpoint).source()
        monkeypatch.chdir(tmp_path)
        assert stored.source(checkpoint) == reference.source(base)
        assert is_hub_id(stored.path) == (path == "owner/hub-name")
    # A checkpoint that is saved elsewhere still leads to the experts in the first one.
    moved = ExpertReference(path="experts/math").anchored(checkpoint).stored(tmp_path / "second")
    assert moved.path == str(inside)
    gone = ExpertReference(path="experts/gone")
    assert gone.anchored(checkpoint, missing_ok=True) == gone


def test_what_parse_takes(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", "llama")
    adapter = tmp_path / "lora"
    save_tiny_adapter(adapter, tiny_model("llama"))
    with pytest.raises(ValueError, match="does not name its base"):
        ExpertReference.parse(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(folder)}))
    assert ExpertReference.parse(adapter) == ExpertReference(path=str(folder), adapter=str(adapter))
    assert ExpertReference.parse(folder) == ExpertReference(path=str(folder))
    live = tiny_model("llama", dtype=torch.bfloat16)
    assert ExpertReference.parse(live) == ExpertReference(dtype="bfloat16")
    live.name_or_path = str(tmp_path / "gone")
    assert ExpertReference.parse(live).path is None
    live.name_or_path = "owner/name"
    assert ExpertReference.parse(live).path == "owner/name"
    for wrong in (3, None, ["a"], torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="merge_and_unload"):
            ExpertReference.parse(wrong)


def test_names_are_unique() -> None:
    model = tiny_model("llama")
    experts: list[Any] = ["a/math", "b/math", {"path": "c/Math"}, {"name": "math-2", "path": "d"}, "e/x y", model]
    names = [reference.name for reference, _ in parse_experts(experts)]
    assert names == ["math", "math-3", "Math-4", "math-2", "x-y", "expert"]
    assert [live for _, live in parse_experts(experts)] == [None] * 5 + [model]
    by_name = parse_experts({"one": "a/math", "two": {"path": "b"}, "three": {"name": "three", "path": "c"}})
    assert [reference.name for reference, _ in by_name] == ["one", "two", "three"]
    with pytest.raises(ValueError, match="two experts are named 'Math'"):
        parse_experts([{"name": "math", "path": "a"}, {"name": "Math", "path": "b"}])
    with pytest.raises(ValueError, match="'one' has the name 'two'"):
        parse_experts({"one": {"name": "two", "path": "a"}})
    with pytest.raises(TypeError, match="list of experts"):
        parse_experts("a/math")


def test_stored_references_can_be_overridden() -> None:
    stored = [
        ExpertReference(name="math", path="owner/math", revision="v1", hash="sha256:files:1", dtype="bfloat16"),
        ExpertReference(name="code", path="/gone/code", gguf_file="m.gguf", hash="sha256:files:2"),
    ]
    assert list(overridden(stored, None).values()) == stored
    moved = overridden(stored, {"math": "/here/math", "code": {"device": "cuda:1"}})
    assert moved["math"] == replace(stored[0], path="/here/math", revision=None), "the hash stays, and is checked"
    assert moved["code"] == replace(stored[1], device="cuda:1")
    model = tiny_model("llama")
    replaced = overridden(stored, [ExpertReference(path="x/y"), model])
    assert replaced == {"math": ExpertReference(name="math", path="x/y"), "code": model}
    for wrong, message in (
        ({"maths": "x"}, r"names \['maths'\]: the checkpoint's experts are \['math', 'code'\]"),
        (["x"], "1 items for the 2 experts"),
        ({"math": {"where": "x"}}, r"no field \['where'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            overridden(stored, wrong)
    with pytest.raises(TypeError, match="pass a folder or hub id"):
        overridden(stored, {"math": 3})
