"""What a checkpoint is made of, from its config alone: for ``fusionroute show CHECKPOINT``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def description(folder: Path) -> str:
    """Lines that name the router's architecture, the experts, and whether they are compiled.

    Raises:
        ValueError: no FusionRoute checkpoint, or a report on compiled experts that is broken.
    """
    file = folder / "config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if config.get("model_type") != "fusionroute":
        raise ValueError(f"{str(folder)!r} is no FusionRoute checkpoint: give its folder, or files of routing traces")
    experts = config.get("experts") or []
    compiled = config.get("compiled")
    lines = [
        str(folder),
        f"router: {config['router_config'].get('model_type')}, {config.get('vocab_size')} tokens",
        f"experts: {', '.join(expert['name'] for expert in experts)}",
    ]
    if compiled:
        lines.append(f"compiled, rank {compiled['rank']}: adapters of the router, two forwards a token")
        from ebpo_core.fusionroute.compiled.files import read_report  # with torch, which nothing else here needs

        report = read_report(folder)
        if report is not None:
            fused = report["fused"]
            lines.append(f"held out: agreement {fused['agreement']:.1%}, KL {fused['kl']:.4f} of the fused policy")
    else:
        lines += [
            f"  {expert['name']}: {expert.get('path') or 'a live model, never saved'}"
            + (f" with adapter {expert['adapter']}" if expert.get("adapter") else "")
            for expert in experts
        ]
    return "\n".join(lines)
