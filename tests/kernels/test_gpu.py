"""What only a GPU can show: real shapes, CUDA graphs replayed on mutated inputs, streams, Inductor, launch counts.

The exactness suite itself (test_exact, test_logprob, test_sample, test_lm_head) runs on the GPU's kernels too when
there is one. To look for illegal accesses run this file once under ``compute-sanitizer``.
"""

from __future__ import annotations

import gc

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("no GPU: the kernels are checked in Triton's interpreter instead", allow_module_level=True)

from kernels_cases import INF, NAN, padded, ragged  # noqa: E402

from ebpo_core.kernels import (  # noqa: E402
    select_add,
    select_add_argmax,
    select_add_logprob,
    select_add_sample,
    warmup,
)
from ebpo_core.kernels.noise import gumbel_noise  # noqa: E402


def inputs(B, V, n=3, dtype=torch.bfloat16, seed=0, width=None):
    g = torch.Generator("cuda").manual_seed(seed)
    make = lambda: padded(torch.randn(B, V, generator=g, device="cuda").to(dtype).cpu(), width or V).cuda()  # noqa: E731
    return make(), torch.randn(B, n, generator=g, device="cuda"), [make() for _ in range(n)]


def expected(router, weights, experts, V, alpha=1.0):
    ids = weights.argmax(-1)
    chosen = torch.stack([x[:, :V] for x in experts])[ids, torch.arange(len(ids), device="cuda")]
    fused = router[:, :V].float() + chosen.float() * alpha
    return fused.argmax(-1), ids, fused


@pytest.mark.parametrize("V", [1, 127, 4095, 4097, 32000, 32001, 50257, 128256, 151936, 256000, 262144])
@pytest.mark.parametrize("B", [1, 7, 64])
def test_real_shapes(B, V):
    router, weights, experts = inputs(B, V, width=V + 24)
    tokens, ids, fused = expected(router, weights, experts, V, alpha=0.7)
    for form in (experts, torch.stack(experts), ragged(experts, ids)):
        out = select_add_argmax(router, weights, form, alpha=0.7, vocab_size=V)
        assert torch.equal(out.token_ids, tokens)
        assert torch.equal(out.expert_ids, ids)
    assert torch.equal(select_add(router, weights, experts, alpha=0.7, vocab_size=V), fused)


def test_offsets_beyond_31_bits():
    B, V, n = 512, 262144, 17
    stacked = torch.zeros(n, B, V, dtype=torch.bfloat16, device="cuda")  # 4.6 GB, 2.3e9 elements
    stacked[n - 1, :, 5] = 1.0
    stacked[n - 1, B - 1, V - 1] = 2.0
    out = select_add_argmax(stacked[0], torch.full((B,), n - 1, device="cuda"), stacked)
    assert out.token_ids[:-1].eq(5).all()
    assert out.token_ids[-1] == V - 1


def capture(call):
    call()  # compiles and loads before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    gc.disable()  # a collected kernel would unload its module during the capture
    try:
        with torch.cuda.graph(graph):
            out = call()
    finally:
        gc.enable()
    return graph, out


def test_graph_replays_on_mutated_inputs():
    B, V = 8, 50257
    router, weights, experts = inputs(B, V)
    graph, out = capture(lambda: select_add_argmax(router, weights, experts, return_logprobs=True))
    before = torch.cuda.memory_allocated()

    def random():
        weights.normal_()
        for x in (router, *experts):
            x.normal_()

    contents = [
        random,
        lambda: router.fill_(0) + sum(x.fill_(0) for x in experts),  # ties everywhere
        lambda: router.fill_(-INF),
        lambda: router.fill_(NAN),
        lambda: weights.fill_(NAN),
        random,
    ]
    for mutate in contents:
        mutate()
        graph.replay()
        tokens, ids, fused = expected(router, weights, experts, V)
        assert torch.equal(out.token_ids, tokens)
        assert torch.equal(out.expert_ids, ids)
        picked = fused.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(out.logprobs, picked, rtol=1e-5, atol=1e-5, equal_nan=True)
        del tokens, ids, fused, picked
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_graph_draws_anew_when_the_step_moves():
    B, V = 16, 32000
    router, weights, experts = inputs(B, V)
    seed, step = torch.arange(B, device="cuda"), torch.zeros(B, dtype=torch.int64, device="cuda")
    temperature = torch.full((B,), 1.5, device="cuda")
    call = lambda: select_add_sample(  # noqa: E731
        router, weights, experts, seed=seed, step=step, temperature=temperature, top_k=500, top_p=0.9
    )
    graph, out = capture(call)
    draws = []
    for _ in range(3):
        step += 1
        graph.replay()
        assert torch.equal(out.token_ids, call().token_ids)
        draws.append(out.token_ids.clone())
    assert not torch.equal(draws[0], draws[1])


def test_draws_equal_the_cpu_reference():
    """Up to the last bits of a logarithm: at most one row in a thousand may differ."""
    B, V = 2000, 1000
    router, weights, experts = inputs(B, V)
    seed = torch.arange(B, device="cuda")
    gpu = select_add_sample(router, weights, experts, seed=seed, step=7, top_p=0.95)
    cpu = select_add_sample(
        router.cpu(), weights.cpu(), [x.cpu() for x in experts], seed=seed.cpu(), step=7, top_p=0.95
    )
    assert (gpu.token_ids.cpu() != cpu.token_ids).sum() <= 2
    noise = gumbel_noise(seed, seed, V)
    gpu = select_add_sample(router, weights, experts, noise=noise)
    cpu = select_add_sample(router.cpu(), weights.cpu(), [x.cpu() for x in experts], noise=noise.cpu())
    assert torch.equal(gpu.token_ids.cpu(), cpu.token_ids)


def test_streams_do_not_disturb_each_other():
    cases = [inputs(8, 128256, seed=i) for i in range(4)]
    wanted = [expected(*case, 128256)[0] for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(20):
        outs = []
        for stream, case in zip(streams, cases, strict=True):
            with torch.cuda.stream(stream):
                outs.append(select_add_argmax(*case).token_ids)
        torch.cuda.synchronize()
        for out, tokens in zip(outs, wanted, strict=True):
            assert torch.equal(out, tokens)


def test_two_launches_and_no_wait_for_the_device():
    router, weights, experts = inputs(8, 128256)
    select_add_argmax(router, weights, experts)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            select_add_argmax(router, weights, experts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    kernels = [
        e.name for e in profile.events() if "kernel" in e.name and e.device_type == torch.autograd.DeviceType.CUDA
    ]
    assert sorted(kernels) == ["finish_kernel", "partial_kernel"]


def test_inductor_with_graphs():
    router, weights, experts = inputs(8, 32000)
    call = lambda r, w, e: select_add_argmax(r * 1.0, w, e)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        router.normal_()
        torch.compiler.cudagraph_mark_step_begin()
        assert torch.equal(compiled(router, weights, experts).token_ids, call(router, weights, experts).token_ids)


def test_gradients_take_the_reference():
    router, weights, experts = inputs(4, 1000, dtype=torch.float32)
    router.requires_grad_()
    select_add_logprob(router, weights, experts, torch.arange(4, device="cuda")).logprobs.sum().backward()
    assert router.grad.abs().sum() > 0


def test_warmup_leaves_nothing_to_compile():
    import triton

    operations = ("argmax", "logprobs", "add", "sample", "filtered_sample")
    assert warmup([1, 8], 32000, operations=operations) == 10
    router, weights, experts = inputs(8, 32000)
    compiled = []
    triton.knobs.runtime.jit_post_compile_hook = lambda *args, **_: compiled.append(args)
    try:
        select_add_argmax(router, weights, experts)
        select_add_argmax(router, weights, experts, return_logprobs=True)
        select_add(router, weights, experts)
        select_add_sample(router, weights, experts, seed=torch.arange(8, device="cuda"), temperature=0.7)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None
    assert compiled == []
