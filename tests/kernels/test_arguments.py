"""Bad arguments of ``ebpo_core.kernels``: the error names the argument, its value and the remedy, on any device."""

from __future__ import annotations

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from ebpo_core.kernels import (  # noqa: E402
    lm_head_select_add_argmax,
    select_add,
    select_add_argmax,
    select_add_logprob,
    select_add_sample,
    warmup,
)

R, W, E = torch.zeros(2, 4), torch.zeros(2, 3), torch.zeros(3, 2, 4)
IDS = torch.zeros(2, dtype=torch.int64)
NAN = float("nan")


@pytest.mark.parametrize("function", [select_add_argmax, select_add])
@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((R.numpy(), W, E), {}, TypeError, r"router_logits is a ndarray: pass a torch.Tensor \[B, V\]"),
        ((R, W.tolist(), E), {}, TypeError, r"weights is a list: pass a torch.Tensor \[B, n\], or expert ids"),
        ((R, W, E.numpy()), {}, TypeError, r"expert_logits is a ndarray"),
        ((R, W, [R, R, None]), {}, TypeError, r"expert_logits\[2\] is a NoneType"),
        ((R, None, E), {}, TypeError, r"weights is None: pass routing weights"),
        ((R.double(), W, E), {}, TypeError, r"router_logits has dtype torch.float64: pass bfloat16"),
        ((R, W, E.long()), {}, TypeError, r"expert_logits has dtype torch.int64"),
        ((R, W, [R, R.long(), R]), {}, TypeError, r"expert_logits\[1\] has dtype torch.int64"),
        ((R, W.long(), E), {}, TypeError, r"weights has dtype torch.int64"),
        ((R, W[:, 0], E), {}, TypeError, r"weights has shape \[2\] and dtype torch.float32: pass routing weights"),
        ((R[0], W, E), {}, ValueError, r"router_logits has shape \[4\]"),
        ((R, IDS[:1], E), {}, ValueError, r"weights has 1 rows"),
        ((R, W, E[0, 0]), {}, ValueError, r"expert_logits has shape \[4\]: pass one tensor \[n, B, V\]"),
        ((R, W, [R, R, R[0]]), {}, ValueError, r"expert_logits\[2\] has shape \[4\]"),
        ((R, W, E[:2]), {}, ValueError, r"weights has shape \[2, 3\].*holds 2 experts"),
        ((R, W[:, :0], []), {}, ValueError, r"expert_logits is an empty list"),
        ((R, W, E[:0]), {}, ValueError, r"expert_logits holds 0 experts"),
        ((R, W[:1], E), {}, ValueError, r"weights has 1 rows, router_logits has 2"),
        ((R, W, [R, R, R[:1]]), {}, ValueError, r"expert_logits\[2\] has 1 rows.*together as many as the batch"),
        ((R, W, E.to("meta")), {}, ValueError, r"expert_logits is on meta, router_logits on cpu"),
        ((R, W.to("meta"), E), {}, ValueError, r"weights is on meta, router_logits on cpu"),
        ((torch.zeros(4, 2).T, W, E), {}, ValueError, r"router_logits has strides \(1, 2\): the last must be 1"),
        ((R, W, torch.zeros(3, 2, 8)[:, :, ::2]), {}, ValueError, r"expert_logits has strides \(16, 8, 2\)"),
        ((R[:, :0], W, E), {}, ValueError, r"each needs at least one column"),
        ((R, W, E), {"vocab_size": 5}, ValueError, r"vocab_size is 5: pass 1 to 4"),
        ((R, W, E), {"vocab_size": 0}, ValueError, r"vocab_size is 0"),
        ((R, W, E), {"vocab_size": 2.0}, TypeError, r"vocab_size is 2.0"),
        ((R, W, E), {"alpha": NAN}, ValueError, r"alpha is nan: pass a finite number"),
        ((R, W, E), {"alpha": "1"}, TypeError, r"alpha is '1': pass a real number"),
        ((R, W, E), {"layout": "dense"}, ValueError, r"layout is 'dense': pass one of \['listed', 'stacked'"),
        ((R, W, E), {"layout": "gathered"}, ValueError, r"is 'gathered' and expert_logits has shape \[3, 2, 4\]"),
        ((R, W, E), {"layout": "listed"}, ValueError, r"is 'listed' and .*: pass a list of n tensors \[B, V_i\]"),
        ((R, W, [R] * 3), {"layout": "stacked"}, ValueError, r"is 'stacked' and .*: pass one tensor \[n, B, V\]"),
        ((R, W, [R] * 3), {"layout": "ragged"}, ValueError, r"is 'ragged' and .*\[2, 4\]\] for a batch of 2"),
        ((R, IDS, [R[:1], R[:1], R[:0]]), {"layout": "listed"}, ValueError, r"expert_logits\[0\] has 1 rows"),
    ],
)
def test_shared_arguments(function, args, options, error, message):
    with pytest.raises(error, match=message):
        function(*args, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, TypeError, r"seed is None: pass int64 seeds \[B\]"),
        ({"seed": 7}, TypeError, r"seed is a int"),
        ({"seed": W[:, 0]}, TypeError, r"seed has dtype torch.float32: pass int64"),
        ({"seed": IDS[:1]}, ValueError, r"seed has shape \[1\]: pass \[2\]"),
        ({"seed": IDS, "step": 1.5}, TypeError, r"step is 1.5: pass an int"),
        ({"seed": IDS, "step": IDS[:1]}, ValueError, r"step has shape \[1\]: pass \[2\]"),
        ({"seed": IDS, "temperature": -0.1}, ValueError, r"temperature is -0.1: pass a finite number from 0"),
        ({"seed": IDS, "temperature": float("inf")}, ValueError, r"temperature is inf"),
        ({"seed": IDS, "temperature": IDS}, TypeError, r"temperature has dtype torch.int64: pass a floating dtype"),
        ({"seed": IDS, "top_k": -1}, ValueError, r"top_k is -1: pass 0 or more"),
        ({"seed": IDS, "top_k": True}, TypeError, r"top_k is True"),
        ({"seed": IDS, "top_p": 1.1}, ValueError, r"top_p is 1.1: pass a finite number from 0 to 1"),
        ({"seed": IDS, "min_p": "a"}, TypeError, r"min_p is 'a'"),
        ({"noise": R[:, :3]}, ValueError, r"noise has shape \[2, 3\].*pass float32 \[2, 4\] or wider"),
        ({"noise": R.half()}, ValueError, r"noise has shape \[2, 4\] and dtype torch.float16"),
    ],
)
def test_sampling_arguments(options, error, message):
    with pytest.raises(error, match=message):
        select_add_sample(R, W, E, **options)


def test_logprob_arguments():
    with pytest.raises(TypeError, match=r"token_ids has dtype torch.float32"):
        select_add_logprob(R, W, E, W[:, 0])
    with pytest.raises(ValueError, match=r"token_ids has shape \[2, 1\]: pass \[2\]"):
        select_add_logprob(R, W, E, IDS[:, None])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"router_head": torch.zeros(9, 5)}, ValueError, r"router_head has shape \[9, 5\].*must agree"),
        ({"expert_heads": [torch.zeros(9, 6).half()] * 3}, ValueError, r"expert_heads\[0\].*the dtypes must agree"),
        ({"expert_heads": []}, ValueError, r"expert_heads is empty"),
        ({"expert_hidden": torch.zeros(1, 6)}, ValueError, r"expert_hidden has 1 rows, router_hidden has 2"),
        ({"weights": W[:, :2]}, ValueError, r"weights has shape \[2, 2\]"),
        ({"vocab_size": 10}, ValueError, r"vocab_size is 10: pass 1 to 9"),
    ],
)
def test_lm_head_arguments(change, error, message):
    arguments = {
        "router_hidden": R,
        "router_head": torch.zeros(9, 4),
        "weights": W,
        "expert_hidden": torch.zeros(2, 6),
        "expert_heads": [torch.zeros(9, 6)] * 3,
    }
    with pytest.raises(error, match=message):
        lm_head_select_add_argmax(**{**arguments, **change})


def test_warmup_arguments():
    assert warmup([1, 8], 100, device="cpu") == 0  # nothing to compile
    with pytest.raises(ValueError, match=r"operations holds \['beam'\]: pass some of"):
        warmup([1], 100, operations=["beam"])
    with pytest.raises(ValueError, match=r"layout is 'sparse'"):
        warmup([1], 100, layout="sparse")


@pytest.mark.parametrize("layout", ["listed", "stacked", "gathered", "ragged"])
def test_warmup_calls_every_operation_on_inputs_of_the_layout(layout, monkeypatch):
    module = sys.modules[warmup.__module__]
    monkeypatch.setattr(module, "fuses_on", lambda _: True)  # the operations themselves take the reference
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda _: None)
    operations = ["argmax", "logprobs", "add", "sample", "filtered_sample"]
    for weights in (torch.float32, torch.int64):
        done = warmup([1, 2], 30, layout=layout, weights_dtype=weights, operations=operations, device="cpu")
        assert done == 10


def test_triton_is_imported_by_the_first_gpu_call_only():
    code = (
        "import sys, torch, ebpo_core.kernels as k;"
        "k.select_add_argmax(torch.zeros(1, 4), None, torch.zeros(1, 4));"
        "assert 'triton' not in sys.modules, 'triton was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_triton_a_gpu_call_says_what_to_install(monkeypatch):
    from ebpo_core.kernels import dispatch

    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("argmax_triton", "logprob_triton", "tiles"):
        monkeypatch.delitem(sys.modules, f"ebpo_core.kernels.{name}", raising=False)
    monkeypatch.setattr(dispatch, "fuses_on", lambda _: True)
    with pytest.raises(ImportError, match=r'pip install "ebpo-core\[kernels\]"'):
        select_add_argmax(R, W, E)
