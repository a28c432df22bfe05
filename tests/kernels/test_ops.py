"""The registered operators: opcheck, fake implementations, torch.compile without graph breaks, the eager bypass."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from kernels_cases import ragged, random_step  # noqa: E402

from ebpo_core.kernels import dispatch, select_add, select_add_argmax, select_add_logprob, select_add_sample  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUTER, WEIGHTS, EXPERTS = random_step(4, 2, 30)
IDS = WEIGHTS.argmax(-1)
FORMS = {
    "listed": (0, WEIGHTS, EXPERTS),
    "stacked": (1, IDS, [torch.stack(EXPERTS)]),
    "gathered": (2, None, EXPERTS[:1]),
    "ragged": (3, IDS, ragged(EXPERTS, IDS)),
}
PARAMETERS = (torch.ones(4), torch.full((4,), 5), torch.full((4,), 0.9), torch.full((4,), -3.0))


def moved(x):
    if isinstance(x, torch.Tensor):
        return x.to(DEVICE)
    return [moved(y) for y in x] if isinstance(x, list) else x


def arguments(form):
    code, selection, experts = FORMS[form]
    return tuple(moved(x) for x in (ROUTER, selection, experts, code, 0.5, 30, False))


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form):
    check = torch.library.opcheck
    for tokens, logprobs in ((None, False), (None, True), (moved(IDS), True)):
        check(torch.ops.ebpo_core.select_add_tokens.default, (*arguments(form), tokens, logprobs))
    check(torch.ops.ebpo_core.select_add.default, arguments(form))
    seed = torch.arange(4, device=DEVICE)
    check(torch.ops.ebpo_core.select_add_sample.default, (*arguments(form), *moved(list(PARAMETERS)), seed, seed, None))


CALLS = {
    "argmax": lambda r, w, e: select_add_argmax(r, w, e, alpha=0.5),
    "argmax with logprobs": lambda r, w, e: select_add_argmax(r, w, e, return_logits=True, return_logprobs=True),
    "logprob": lambda r, w, e: select_add_logprob(r, w, e, torch.zeros(r.shape[0], dtype=torch.int64, device=r.device)),
    "add": lambda r, w, e: select_add(r, w, e, round_sum=True),
    "sample": lambda r, w, e: select_add_sample(
        r, w, e, seed=torch.arange(r.shape[0], device=r.device), step=3, temperature=0.8, top_k=5, top_p=0.9, min_p=0.01
    ),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_compiles_without_graph_breaks(name, dynamic):
    torch.compiler.reset()
    call = CALLS[name]
    router, weights, experts = moved(ROUTER), moved(WEIGHTS), moved(EXPERTS)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows in (4, 3):
        inputs = router[:rows], weights[:rows], [x[:rows] for x in experts]
        for ours, expected in zip(compiled(*inputs), call(*inputs), strict=True):
            if expected is not None:
                torch.testing.assert_close(ours, expected)
    targets = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert any("ebpo_core" in target for target in targets), targets


def test_an_eager_call_skips_the_dispatcher():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    with Seen() as seen:
        select_add_argmax(ROUTER, WEIGHTS, EXPERTS)
    assert seen.names
    assert not any("ebpo_core" in name for name in seen.names)


def test_fake_tensors_take_the_operator():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = lambda x: mode.from_tensor(x)  # noqa: E731
        out = select_add_argmax(fake(ROUTER), fake(WEIGHTS), [fake(x) for x in EXPERTS], return_logprobs=True)
    assert [tuple(x.shape) for x in (out.token_ids, out.logprobs)] == [(4,), (4,)]
    assert (out.token_ids.dtype, out.logprobs.dtype) == (torch.int64, torch.float32)


def test_operators_do_not_return_their_arguments():
    _, ids, *_ = torch.ops.ebpo_core.select_add_tokens(*arguments("stacked"), None, False)
    ids += 1
    assert torch.equal(FORMS["stacked"][1], IDS)


def test_the_dispatch_table_of_devices():
    assert not dispatch.fuses_on(torch.device("cpu"))
    assert dispatch.fuses_on(torch.device("cuda", 0))
