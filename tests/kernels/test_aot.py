"""Ahead-of-time compilation for GPUs that are not there: wide loads, no spills, few registers, no contraction."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from ebpo_core.kernels import launch  # noqa: E402
from ebpo_core.kernels.argmax_triton import add, tokens  # noqa: E402
from ebpo_core.kernels.arguments import check_step  # noqa: E402
from ebpo_core.kernels.lm_head_triton import lm_head  # noqa: E402
from ebpo_core.kernels.reference import Draw  # noqa: E402
from ebpo_core.kernels.sample_triton import sample  # noqa: E402

aot = pytest.importorskip("kernels_aot")

V = 128256


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory):
    """Nothing compiled by another version of these kernels is reused."""
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    yield
    if before is None:
        del os.environ["TRITON_CACHE_DIR"]
    else:
        os.environ["TRITON_CACHE_DIR"] = before


def matrix(*shape, dtype=torch.bfloat16, stride=None):
    full = torch.empty(*shape[:-1], stride or shape[-1], dtype=dtype, device="meta")
    return full[..., : shape[-1]]


def step(form="listed", B=64, n=3, V=V, dtype=torch.bfloat16, stride=None, round_sum=False):
    ids = matrix(B, dtype=torch.int64)
    rows = {"listed": [B] * n, "ragged": [B - n + 1, *[1] * (n - 1)]}.get(form)
    if rows is not None:
        experts = [matrix(k, V, dtype=dtype, stride=stride) for k in rows]
    else:
        experts = matrix(*((n, B, V) if form == "stacked" else (B, V)), dtype=dtype, stride=stride)
    weights = ids if form == "ragged" else matrix(B, n, dtype=torch.float32)
    return check_step(matrix(B, V, dtype=dtype, stride=stride), weights, experts, 0.7, V, round_sum)


def tile(target, B, V):
    return launch.tile_for(B, V, 64 if target.startswith("gfx") else 32)


def compiled(target, launches):
    return [aot.compile_for(target, x) for x in launches]


CASES = {
    "batch 1": dict(B=1),
    "batch 16": dict(B=16),
    "batch 256": dict(B=256),
    "stacked": dict(form="stacked"),
    "gathered": dict(form="gathered"),
    "ragged": dict(form="ragged"),
    "float16": dict(dtype=torch.float16),
    "float32": dict(dtype=torch.float32),
    "odd vocabulary": dict(V=V - 3, stride=V),
    "multiple of 8": dict(V=V + 8),
    "eager rounding": dict(round_sum=True),
}


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_argmax(target, case):
    options = CASES[case]
    checked = step(**options)
    partial, finish = compiled(target, tokens(checked, None, False, tile(target, checked.batch, checked.vocab_size))[1])
    # Router and each listed expert are read 16 bytes at a time; the odd vocabulary's last tile alone is not.
    assert partial.wide >= (2 if options.get("form") in ("stacked", "gathered") else 4)
    if case != "odd vocabulary":
        assert partial.narrow == 0
    assert partial.registers <= 80
    assert (partial.spilled, finish.spilled) == (0, 0)
    assert partial.contracted() == []


@pytest.mark.parametrize("target", aot.TARGETS)
def test_the_other_kernels(target):
    checked, seed = step(B=64), matrix(64, dtype=torch.int64)
    number = matrix(64, dtype=torch.float32)
    chosen = tile(target, 64, V)
    partial, finish = compiled(target, tokens(checked, None, True, chosen)[1])
    (summed,) = compiled(target, add(checked, chosen)[1])
    plain, _ = compiled(target, sample(checked, Draw(0.8, seed=seed, position=3), chosen)[1])
    filters = Draw(number, matrix(64, dtype=torch.int64), number, number, seed, seed)
    divide, threshold, draw, _ = compiled(target, sample(checked, filters, chosen)[1])
    for machine in (partial, summed, plain, divide, draw):
        assert machine.wide >= 2
        assert machine.narrow == 0
    for machine, registers in (
        (partial, 128),
        (finish, 64),
        (summed, 80),
        (plain, 96),
        (divide, 80),
        (threshold, 128),
        (draw, 96),
    ):
        assert machine.registers <= registers
        assert machine.spilled == 0
    assert partial.contracted() == []  # the exponentials are not polynomials here
    assert summed.contracted() == []


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lm_heads(target, dtype):
    hidden, heads = matrix(32, 2048, dtype=dtype), [matrix(V, 2048, dtype=dtype) for _ in range(3)]
    kernel, finish = compiled(
        target, lm_head(hidden, heads[0], matrix(32, dtype=torch.int64), hidden, heads, 1.0, V)[1]
    )
    assert (kernel.spilled, finish.spilled) == (0, 0)
    assert kernel.registers <= 255


def test_the_checks_can_fail():
    """An odd row stride forbids wide loads; contraction shows when it is allowed."""
    (partial, _) = compiled("sm_90", tokens(step(V=V - 3, form="gathered"), None, False)[1])
    assert partial.wide == 0
    assert partial.narrow > 0
    launches = tokens(step(form="gathered"), None, False)[1]
    fused = type("Fused", (launch.Launch,), {"options": {"num_warps": 4, "enable_fp_fusion": True}})(*launches[0])
    assert aot.compile_for("sm_90", fused).contracted()
    assert aot.compile_for("gfx942", fused).contracted()


def test_one_binary_serves_every_batch_and_ragged_split():
    """How many rows chose each expert changes at every step of lazy decoding; it must not compile anything."""
    seen = []
    for B in (16, 17, 18):
        checked = step("ragged", B=B)
        given = matrix(B, dtype=torch.int64)
        seen.append([aot.specialized("sm_90", x)[1:] for x in tokens(checked, given, True, launch.Tile(1024, 4))[1]])
    assert seen[0] == seen[1] == seen[2]
