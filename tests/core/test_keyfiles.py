"""Priors with many keys in checkpoints: exact, whole or refused, and no file left behind."""

from __future__ import annotations

import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ebpo_core
from ebpo_core import checkpoint
from ebpo_core.checkpoint import MANY_KEYS, PRIOR_NAME, prior_files, read_prior, write_prior


def tracker(prompts: int = 1500, seed: int = 0, decay_by: Any = "update") -> ebpo_core.EBPO:
    ebpo = ebpo_core.EBPO(decay=0.9, decay_by=decay_by, max_keys=10_000)
    rng = np.random.default_rng(seed)
    for start in range(0, prompts, 300):
        r = rng.random((300, 2))
        ebpo(r, keys=[(("even", "ö\ud800")[i % 2], f"prompt {i}") if i % 7 else i for i in range(start, start + 300)])
    return ebpo


def loaded(path: Path) -> ebpo_core.EBPO:
    state = read_prior(path)["ebpo"]
    ebpo = ebpo_core.EBPO(**state["options"])
    ebpo.load_state_dict(state)
    return ebpo


@pytest.mark.parametrize("decay_by", ["update", "visit"])
def test_many_keys_go_into_a_file_of_their_own_and_come_back_to_the_bit(tmp_path: Path, decay_by: str) -> None:
    ebpo = tracker(decay_by=decay_by)
    assert ebpo.key_count > MANY_KEYS
    write_prior(tmp_path, ebpo, global_step=3)
    names = prior_files(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names)
    assert names[0] == PRIOR_NAME
    assert len(names) == 2
    same = loaded(tmp_path)
    assert same == ebpo
    assert same.state_dict() == ebpo.state_dict()
    assert read_prior(tmp_path)["global_step"] == 3
    # Smaller than the same in JSON, and plain NumPy.
    write_prior(tmp_path / "plain.json", ebpo.state_dict())
    assert loaded(tmp_path / "plain.json") == ebpo
    assert (tmp_path / names[1]).stat().st_size * 4 < (tmp_path / "plain.json").stat().st_size
    with np.load(tmp_path / names[1], allow_pickle=False) as arrays:
        assert arrays["statistics"].shape == (ebpo.key_count, 9)


def test_few_keys_stay_in_the_json(tmp_path: Path) -> None:
    ebpo = ebpo_core.EBPO()
    ebpo([[1.0, 0.0]] * 3, keys=["a", ("a", 1), None])
    write_prior(tmp_path, ebpo)
    assert prior_files(tmp_path) == [PRIOR_NAME]
    assert json.loads((tmp_path / PRIOR_NAME).read_text())["ebpo"] == ebpo.state_dict()
    assert loaded(tmp_path) == ebpo
    assert prior_files(tmp_path / "none") == ["none"]
    (tmp_path / "cut.json").write_text("{")
    assert prior_files(tmp_path / "cut.json") == ["cut.json"]


def test_a_later_prior_leaves_no_file_of_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "weights-12345678.npz").write_bytes(b"another's")
    other = write_prior(tmp_path / "other.json", tracker(seed=5))
    for seed in (0, 1):
        write_prior(tmp_path, tracker(seed=seed))
        assert loaded(tmp_path) == tracker(seed=seed)
    write_prior(tmp_path, [{"reward": name, "ebpo": tracker(seed=seed)} for name, seed in (("a", 2), ("b", 3))])
    assert len(prior_files(tmp_path)) == 3
    kept = {*prior_files(tmp_path), *prior_files(other), "weights-12345678.npz"}
    assert {file.name for file in tmp_path.iterdir()} == kept
    states = [entry["ebpo"] for entry in read_prior(tmp_path)["ebpo_per_reward"]]
    for state, seed in zip(states, (2, 3), strict=True):
        ebpo = ebpo_core.EBPO(**state["options"])
        ebpo.load_state_dict(state)
        assert ebpo == tracker(seed=seed)
    write_prior(tmp_path, ebpo_core.EBPO())
    assert prior_files(tmp_path) == [PRIOR_NAME]
    assert loaded(other) == tracker(seed=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _, file: file.unlink(), "keeps its keys in 'ebpo_prior-.*which is not beside it: copy both"),
        (lambda _, file: file.write_bytes(file.read_bytes()[:-1]), "has .* bytes .*damaged, use another checkpoint"),
        (lambda _, file: file.write_bytes(b""), "has 0 bytes"),
        (lambda keys, _: keys.update(version=2), "keys of version 2 and this ebpo_core reads 1: upgrade"),
        (lambda keys, file: keys.update(file=f"../{file.name}"), "no reference of this package"),
        (lambda keys, _: keys.update(format="x"), "no reference of this package"),
        (lambda keys, _: keys.update(crc32=0), "expects .* with 0: it is damaged"),
    ],
)
def test_what_is_damaged_is_named(tmp_path: Path, change: Any, message: str) -> None:
    write_prior(tmp_path, tracker())
    content = json.loads((tmp_path / PRIOR_NAME).read_text())
    change(content["ebpo"]["keys"], tmp_path / prior_files(tmp_path)[1])
    (tmp_path / PRIOR_NAME).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_prior(tmp_path)


@settings(max_examples=60)
@given(data=st.data())
def test_any_changed_byte_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("prior")
    write_prior(folder, tracker().state_dict(arrays=True))
    file = folder / prior_files(folder)[1]
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(content)))
    for damaged in (bytes(content), bytes(content[:cut])):
        file.write_bytes(damaged)
        if cut == len(content) and damaged == bytes(content[:cut]):
            continue
        with pytest.raises(ValueError, match="damaged"):
            read_prior(folder)


def test_a_file_of_another_kind_with_the_right_checksum_is_refused(tmp_path: Path) -> None:
    """The reference may be made to fit; what it leads to is checked all the same."""
    write_prior(tmp_path, tracker())
    content = json.loads((tmp_path / PRIOR_NAME).read_text())
    keys = content["ebpo"]["keys"]
    buffer = io.BytesIO()
    np.savez(buffer, names=np.zeros(3, np.uint8))
    pickled = io.BytesIO()
    np.savez(pickled, names=np.array([{}], dtype=object))
    for made in (buffer.getvalue(), b"no zip", pickled.getvalue()):
        (tmp_path / keys["file"]).write_bytes(made)
        keys.update(bytes=len(made), crc32=zlib.crc32(made))
        (tmp_path / PRIOR_NAME).write_text(json.dumps(content))
        with pytest.raises(ValueError, match="damaged|keys.lengths' is None"):
            ebpo_core.EBPO(decay=0.9, max_keys=10_000).load_state_dict(read_prior(tmp_path)["ebpo"])


def test_a_reader_sees_the_new_files_where_the_old_ones_went_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tracker(seed=0), tracker(seed=1)
    write_prior(tmp_path, old)
    read_json = checkpoint._read_json
    writes = iter([new])

    def overtaken(file: Path) -> dict[str, Any]:
        content = read_json(file)
        for ebpo in writes:  # once: between the two files of a reader comes a writer
            write_prior(tmp_path, ebpo)
        return content

    monkeypatch.setattr(checkpoint, "_read_json", overtaken)
    assert loaded(tmp_path) == new
    (tmp_path / prior_files(tmp_path)[1]).unlink()
    with pytest.raises(ValueError, match="copy both files"):
        read_prior(tmp_path)


def test_a_field_that_is_not_json_leaves_no_file(tmp_path: Path) -> None:
    write_prior(tmp_path, tracker(seed=1))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(TypeError, match="set is not JSON serializable"):
        write_prior(tmp_path, tracker(seed=2), tags={"a"})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
