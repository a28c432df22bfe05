"""Compiles launches for devices that are not there, exactly as a launch on them would, and reads the machine code.

The arguments are specialised by Triton's own launcher code, so that alignment hints, folded ones and constants are
those of a real call. Nothing here needs a driver.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Machine(NamedTuple):
    """Facts of the machine code. ``wide`` and ``narrow``: global loads of 16 bytes, and of 2 bytes or fewer."""

    assembly: str
    registers: int
    spilled: int
    wide: int
    narrow: int

    def contracted(self) -> list[str]:
        """Fused multiply-adds of float32."""
        return re.findall(r"\bfma\.rn(?:\.ftz)?\.f32\b|\bv_(?:pk_)?(?:fma|fmac|mad|mac)_f32\w*", self.assembly)


def specialized(target: str, launch):
    """Compiler options, signature, constants and attributes of a launch: what decides which binary serves it."""
    function, backend = launch.kernel, make_backend(TARGETS[target])
    kwargs = {**launch.arguments, **launch.options}
    bound, specialization, options = create_function_from_signature(function.signature, function.params, backend)(
        **kwargs
    )
    return function._pack_args(backend, kwargs, bound, specialization, options)


def compile_for(target: str, launch) -> Machine:
    """Compile one ``ebpo_core.kernels.launch.Launch``; its tensors may be on the meta device."""
    options, *description = specialized(target, launch)
    source = ASTSource(launch.kernel, *description)
    compiled = triton.compile(source, target=TARGETS[target], options=options.__dict__)
    return _amd(compiled.asm["amdgcn"]) if target.startswith("gfx") else _nvidia(compiled.asm)


def _nvidia(asm) -> Machine:
    ptx = asm["ptx"]
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        usage = subprocess.run([tool, "-res-usage", cubin.name], check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+)\s+STACK:(\d+)", usage).groups()
    local = re.search(r"LOCAL:(\d+)", usage)
    return Machine(
        ptx,
        int(registers),
        int(stack) + int(local.group(1) if local else 0),
        len(re.findall(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64", ptx)),
        len(re.findall(r"ld\.global\S*\.b(?:8|16)\b", ptx)),
    )


def _amd(text: str) -> Machine:
    number = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))  # noqa: E731
    return Machine(
        text,
        number("vgpr_count"),
        number("vgpr_spill_count") + number("sgpr_spill_count"),
        len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
        len(re.findall(r"(?:global|buffer)_load_(?:ushort|ubyte|sbyte|sshort|short)\w*", text)),
    )
