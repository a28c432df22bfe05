"""Checkpoints on the hub: experts and adapters are fetched as the router is, with its token, through its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from fusionroute_compiled import load_compiled, save_compiled
from fusionroute_tiny import put_in_hub_cache, save_tiny

from ebpo_core.fusionroute import FusionRouteForCausalLM

IDS = torch.arange(3, 12)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS).logits
    return out


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `snapshot_download` was asked for; it finds its files in the cache, offline."""
    asked: list[dict[str, Any]] = []
    real = huggingface_hub.snapshot_download

    def snapshot_download(repository: str, **how: Any) -> str:
        asked.append(how)
        found: str = real(repository, **how)
        return found

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize("subfolder", ["", "last"])
@pytest.mark.parametrize("compiled", [True, False])
def test_experts_come_from_where_the_router_comes_from(
    tmp_path: Path, fetched: list[dict[str, Any]], compiled: bool, subfolder: str
) -> None:
    repository = tmp_path / "repository"
    if compiled:
        save_compiled(repository / subfolder, "llama")
        expected = logits(load_compiled(repository / subfolder))
    else:
        router, expert = (save_tiny(tmp_path / name, "llama", seed) for seed, name in enumerate(("router", "expert")))
        model = FusionRouteForCausalLM.from_experts(router, [expert])
        model.save_pretrained(repository / subfolder, save_experts=True)
        expected = logits(model)
    cache = tmp_path / "a cache of its own"
    put_in_hub_cache(cache, "owner/routed", repository)
    given: dict[str, Any] = {"cache_dir": cache, "token": "hf_mine", "local_files_only": True}
    found = FusionRouteForCausalLM.from_pretrained("owner/routed", subfolder=subfolder, **given)
    assert torch.equal(logits(found), expected)
    (how,) = fetched
    assert {name: how[name] for name in given} == given
    found.save_pretrained(tmp_path / "elsewhere")
    assert torch.equal(logits(FusionRouteForCausalLM.from_pretrained(tmp_path / "elsewhere")), expected)


def test_the_router_alone_fetches_no_experts(tmp_path: Path, fetched: list[dict[str, Any]]) -> None:
    save_compiled(tmp_path / "repository", "llama")
    put_in_hub_cache(tmp_path / "cache", "owner/routed", tmp_path / "repository")
    where: dict[str, Any] = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    found = FusionRouteForCausalLM.from_pretrained("owner/routed", load_experts=False, **where)
    assert len(found.experts) == 0
    assert fetched == []
