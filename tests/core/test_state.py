"""State: exact round trips, merging, replays, threads, forks, and real processes that merge to one prior."""

from __future__ import annotations

import copy
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ebpo_core
from ebpo_core import reference
from oracle import Case, cases

OPTIONS = dict(sigma2="within", tau2="debiased", normalize="scale", decay=0.9)
R = [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.1]]


def trained(**options: Any) -> ebpo_core.EBPO:
    ebpo = ebpo_core.EBPO(**options)
    rng = np.random.default_rng(0)
    for step in range(5):
        ebpo(rng.random((3, 4)), step=step)
    return ebpo


@pytest.mark.parametrize("options", [{}, OPTIONS])
def test_round_trips_are_exact(options: dict[str, Any]) -> None:
    ebpo = trained(**options)
    through_json = ebpo_core.EBPO(**options)
    through_json.load_state_dict(json.loads(json.dumps(ebpo.state_dict(), allow_nan=False)))
    copies = [
        through_json,
        pickle.loads(pickle.dumps(ebpo)),
        cloudpickle.loads(cloudpickle.dumps(ebpo)),
        copy.copy(ebpo),
        copy.deepcopy(ebpo),
    ]
    expected = copy.deepcopy(ebpo)(R)
    for same in copies:
        assert same == ebpo
        assert same.state_dict() == ebpo.state_dict()
        assert same.options == ebpo.options
        assert same(R) == expected  # bit for bit
        assert same != ebpo  # a copy shares nothing: ebpo has not seen R


@given(case=cases())
def test_prior_round_trips_are_exact_at_any_scale(case: Case) -> None:
    prior = ebpo_core.Prior()
    prior.update(case.rewards, case.groups, mask=case.mask)
    other = ebpo_core.Prior()
    other.load_state_dict(json.loads(json.dumps(prior.state_dict(), allow_nan=False)))
    assert other == prior == pickle.loads(pickle.dumps(prior)) == copy.deepcopy(prior)


def corrupt(state: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    state = json.loads(json.dumps(state))
    *parents, last = path.split(".")
    node = state
    for name in parents:
        node = node[name]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return state


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("version", 4, "version=4.*upgrade"),
        ("version", "1", "version='1'"),
        ("version", None, "version=None"),
        ("prior.rewards.count", -1.0, "count=-1"),
        ("prior.rewards.m2", float("nan"), "m2=NaN"),
        ("prior.rewards.mean", 1e200, "mean=.*1e140"),
        ("prior.rewards.mean", "0.5", "prior.*|'rewards.mean' is '0.5'"),
        ("prior.group_means", None, "group_means.count"),
        ("prior.group_means.count", 0.0, "mean=.*expected 0, since the count is 0"),
        ("prior.group_means.count", 1e9, "at most rewards.count"),
        ("prior.ssw", -0.1, "ssw=-0.1"),
        ("prior.ssw", 1e9, "ssw=1000000000.*at most rewards.m2"),
        ("prior.dof", 1.0, "dof=1.*rewards.count - group_means.count"),
        ("prior.inv_n", 1e9, "at most group_means.count"),
        ("prior.ssw", 10**400, "'prior.ssw' is 1000"),
        ("prior.dof", True, "'prior.dof' is True"),
        ("options.decay", 2.0, "options that no estimator has.*decay=2"),
        ("options.eps", "small", "options that no estimator has.*not str"),
        ("options.norm_ddof", 10**30, "options that no estimator has"),
        ("options.leave_one_out", None, "leave_one_out='missing'"),
        ("options.tau2", None, "tau2='missing'"),
        ("options.extra", 1, "unknown option 'extra'"),
        ("options", None, "'options' and 'prior'"),
        ("step", -3, "step=-3"),
        ("step", 1.5, "step=1.5"),
    ],
)
def test_garbage_is_refused_and_nothing_changes(path: str, value: Any, message: str) -> None:
    ebpo = trained()
    before = ebpo.state_dict()
    with pytest.raises((ValueError, TypeError), match=message):
        ebpo.load_state_dict(corrupt(before, path, value))
    assert ebpo.state_dict() == before


# Another value of every option than the default's.
OTHERS: dict[str, Any] = {
    "normalize": "scale",
    "sigma2": "within",
    "tau2": "debiased",
    "score": "before",
    "leave_one_out": True,
    "shrinkage": 0.5,
    "decay": 0.5,
    "decay_by": "visit",
    "eps": 1e-3,
    "ddof": 1,
    "norm_ddof": 0,
    "kappa": 3.0,
    "max_keys": 2,
}


@pytest.mark.parametrize("name", list(ebpo_core.EBPO().options))
def test_a_run_goes_on_under_other_options(name: str, caplog: pytest.LogCaptureFixture) -> None:
    keys, twin = ["a", "b", "a"], reference.EBPO()
    rng = np.random.default_rng(1)
    first, second = rng.random((3, 4)), rng.random((3, 4))
    before = ebpo_core.EBPO()
    before(first, keys=keys, step=4)
    twin(first, keys=keys, step=4)
    after = ebpo_core.EBPO(**{name: OTHERS[name]})
    with caplog.at_level("INFO"):
        after.load_state_dict(before.state_dict())
    (line,) = caplog.messages
    saved = before.options[name]  # type: ignore[literal-required]
    assert line.endswith(f"with its own: {name}={OTHERS[name]!r} (saved: {saved!r})")
    assert after.priors == before.priors  # `decay` and the others act from the next update on
    assert (after.step, after.options[name]) == (4, OTHERS[name])  # type: ignore[literal-required]
    setattr(twin, name, OTHERS[name])
    np.testing.assert_allclose(after(second, keys=keys), twin(second, keys=keys), rtol=1e-12, atol=1e-12)
    assert after.prior.count == pytest.approx(twin.prior.rewards.count)
    # It is saved as it is now, and a resume under the same options has nothing to say.
    caplog.clear()
    ebpo_core.EBPO(**{name: OTHERS[name]}).load_state_dict(after.state_dict())
    assert not caplog.messages


def test_one_line_names_all_the_options_that_differ(caplog: pytest.LogCaptureFixture) -> None:
    together = OTHERS | {"leave_one_out": False, "shrinkage": None}  # which do not go with some of the others
    ebpo_core.EBPO(**together).load_state_dict(ebpo_core.EBPO().state_dict())
    (line,) = caplog.messages
    assert line.count("(saved: ") == len(OTHERS) - 2
    few, many = ebpo_core.EBPO(max_keys=1), ebpo_core.EBPO()
    many(R, keys=["a", "b"])
    with pytest.raises(ValueError, match="max_keys=1"):
        few.load_state_dict(many.state_dict())
    assert few == ebpo_core.EBPO(max_keys=1)


def test_wrong_types_are_refused() -> None:
    ebpo, prior = trained(), ebpo_core.Prior()
    with pytest.raises(TypeError, match="list"):
        ebpo.load_state_dict([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="version=None"):
        prior.load_state_dict({})
    with pytest.raises(TypeError, match="dict.*ebpo_core.EBPO or ebpo_core.Prior"):
        ebpo.merge(prior.state_dict())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="EBPO"):
        prior.merge(ebpo)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="decay=1.0.*decay=0.9|sigma2|normalize"):
        ebpo.merge(trained(**OPTIONS))
    with pytest.raises(ValueError, match=r"rho=2.0.*\(0, 1\]"):
        prior.decay(2.0)
    with pytest.raises(TypeError, match="rho='x'"):
        prior.decay("x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='sigma2="x"'):
        prior.sigma2("x")
    with pytest.raises(ValueError, match="ddof=300"):
        prior.tau2(ddof=300)


def test_repr_eq_and_hash() -> None:
    ebpo = trained(decay=0.9)
    assert repr(ebpo).startswith("EBPO(decay=0.9) with Prior(count=")
    assert repr(ebpo_core.EBPO()) == "EBPO() with Prior(empty)"
    assert ebpo != ebpo_core.EBPO(decay=0.9)
    assert ebpo_core.EBPO() != ebpo_core.EBPO(eps=1e-4)
    assert ebpo != 3
    assert ebpo_core.Prior() != 3
    for mutable in (ebpo, ebpo.prior):
        with pytest.raises(TypeError, match="unhashable"):
            hash(mutable)


def test_reset_and_empty_prior() -> None:
    ebpo = trained()
    ebpo.reset()
    assert ebpo == ebpo_core.EBPO()
    assert ebpo.diagnostics is None
    assert ebpo.step is None
    prior = ebpo.prior
    assert np.isnan([prior.mean, prior.sigma2(), prior.tau2()]).all()
    assert prior.count == prior.group_count == 0.0


def test_prior_statistics() -> None:
    prior = ebpo_core.Prior()
    batches = [np.random.default_rng(i).random((4, 3 + i)) for i in range(3)]
    for r in batches:
        prior.update(r)
    flat = np.concatenate([r.ravel() for r in batches])
    means = np.concatenate([r.mean(1) for r in batches])
    assert (prior.count, prior.group_count) == (flat.size, means.size)
    assert prior.mean == pytest.approx(flat.mean(), rel=1e-13)
    for ddof in (0, 1):
        assert prior.sigma2(ddof=ddof) == pytest.approx(flat.var(ddof=ddof), rel=1e-12)
        assert prior.tau2(ddof=ddof) == pytest.approx(means.var(ddof=ddof), rel=1e-12)
    within = sum(r.shape[1] * r.var(1).sum() for r in batches) / sum(r.size - len(r) for r in batches)
    assert prior.sigma2("within") == pytest.approx(within, rel=1e-12)
    debiased = means.var(ddof=1) - within * np.mean([1 / r.shape[1] for r in batches])
    assert prior.tau2("debiased") == pytest.approx(max(0.0, debiased), rel=1e-10)
    prior.decay(0.5)
    assert prior.count == flat.size / 2
    assert prior.mean == pytest.approx(flat.mean(), rel=1e-13)
    assert prior.sigma2() == pytest.approx(flat.var(), rel=1e-12)


@given(parts=st.lists(cases(scale=1.0), min_size=2, max_size=5), data=st.data())
def test_merge_is_order_independent_and_equals_seeing_all(parts: list[Case], data: st.DataObject) -> None:
    whole = ebpo_core.Prior()
    priors = []
    for case in parts:
        priors.append(ebpo_core.Prior())
        priors[-1].update(case.rewards, case.groups, mask=case.mask)
        whole.update(case.rewards, case.groups, mask=case.mask)
    order = data.draw(st.permutations(range(len(priors))))
    cut = data.draw(st.integers(0, len(order)))
    left, right = ebpo_core.Prior(), ebpo_core.Prior()
    for i in order[:cut]:
        left.merge(priors[i])
    for i in order[cut:]:
        right.merge(priors[i])
    right.merge(left)
    assert_close(right, whole)


def assert_close(a: ebpo_core.Prior, b: ebpo_core.Prior) -> None:
    x, y = a.state_dict(), b.state_dict()
    largest = max(abs(y["rewards"]["mean"]), np.sqrt(y["rewards"]["m2"]))
    for left, right in ((x["rewards"], y["rewards"]), (x["group_means"], y["group_means"])):
        assert left["count"] == right["count"]
        assert left["mean"] == pytest.approx(right["mean"], rel=1e-12, abs=1e-12 * largest)
        assert left["m2"] == pytest.approx(right["m2"], rel=1e-12, abs=1e-12 * largest**2)
    for name in ("ssw", "dof", "inv_n"):
        assert x[name] == pytest.approx(y[name], rel=1e-12)


def test_loading_clears_the_diagnostics() -> None:
    ebpo = trained()
    assert ebpo.diagnostics is not None
    ebpo.load_state_dict(ebpo.state_dict())
    assert ebpo.diagnostics is None


def test_a_prior_can_be_merged_in_to_start_from() -> None:
    prior = trained().prior
    ebpo = ebpo_core.EBPO(decay=0.9)
    ebpo.merge(prior)
    assert ebpo.prior == prior
    assert ebpo.step is None
    ebpo.prior.decay(0.5)  # of a copy
    assert ebpo.prior == prior


@pytest.mark.parametrize("options", [{}, OPTIONS])
def test_a_batch_without_a_valid_row_leaves_the_prior_alone(options: dict[str, Any]) -> None:
    ebpo = trained(**options)
    before = ebpo.prior
    assert not np.any(ebpo(np.full((3, 4), np.nan)))
    assert not np.any(ebpo([[1.0, 0.0]], mask=[[False, False]]))
    assert ebpo.prior == before


def test_a_failed_copy_back_leaves_the_prior_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device out of memory must be noticed before the update; the allocation it would fail in is replaced here."""
    torch = pytest.importorskip("torch")

    class OnDevice(torch.Tensor):  # type: ignore[misc]
        is_cpu = False

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))

    def no_memory(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    r = torch.tensor(R).as_subclass(OnDevice)
    ebpo = trained()
    expected = np.array(trained()(R))
    before = ebpo.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            ebpo(r)
    assert ebpo.state_dict() == before
    np.testing.assert_allclose(ebpo(r).numpy(), expected, atol=1e-6)  # and with memory it goes through the same place


def test_merging_with_oneself_and_step() -> None:
    ebpo = trained()
    count = ebpo.prior.count
    ebpo.merge(ebpo)
    assert ebpo.prior.count == 2 * count
    newer = ebpo_core.EBPO()
    newer(R, step=99)
    ebpo.merge(newer)
    assert ebpo.step == 99


@pytest.mark.parametrize("updates", [1000, 1040, 1060, 1071, 1090])
def test_what_is_nearly_forgotten_can_still_be_saved(updates: int) -> None:
    """A count below the normal floats loses digits, and sums that no longer agree with it would be refused."""
    ebpo = ebpo_core.EBPO(decay=0.5)
    ebpo([[0.3, 0.1, 0.7], [0.1, 0.2, 0.9]], keys=["idle", "idle"])
    for _ in range(updates):
        ebpo([[1.0, 0.0], [0.0, 1.0]])
    other = ebpo_core.EBPO(decay=0.5)
    other([[1.0, 0.0]], keys=["idle"])
    merged = copy.deepcopy(other)
    merged.merge(ebpo)
    assert pickle.loads(pickle.dumps(merged)) == merged
    slower = ebpo_core.EBPO(decay=0.6)
    slower.load_state_dict(ebpo.state_dict())
    slower([[1.0, 0.0], [0.0, 1.0]])  # from here on by another rate: what was idle is discounted up to now
    assert pickle.loads(pickle.dumps(slower)) == slower
    assert pickle.loads(pickle.dumps(slower.priors["idle"])) == slower.priors["idle"]


@pytest.mark.parametrize("arrays", [False, True])
def test_clocks_of_any_age_are_read_and_none_runs_over(arrays: bool) -> None:
    ebpo = ebpo_core.EBPO(decay=0.9)
    for keys in ("ab", "aa"):
        ebpo(np.eye(2), keys=list(keys))
    state = ebpo.state_dict(arrays=arrays)
    state["updates"] = 2**40
    ebpo.load_state_dict(state)
    ebpo(np.eye(2), keys=["a", "a"])
    assert ebpo.state_dict()["updates"] == 2**40 + 1
    assert ebpo.state_dict()["keys"][1]["idle"] == 2
    before = ebpo.state_dict()
    for field, value in (("updates", 2**63 - 1), ("updates", -1), ("updates", True), ("idle", 2**63 - 1)):
        state = ebpo.state_dict(arrays=arrays)
        if field == "updates":
            state["updates"] = value
        elif arrays:
            state["keys"]["idle"][1] = value
        else:
            state["keys"][1]["idle"] = value
        with pytest.raises(ValueError, match=f"state field .*{field}"):
            ebpo.load_state_dict(state)
        assert ebpo.state_dict() == before


def test_replayed_steps_are_idempotent() -> None:
    ebpo = trained()
    first = ebpo(R, step=10)
    state = ebpo.state_dict()
    assert ebpo(R, step=10) == first  # a retry: the same advantages, bit for bit
    ebpo(R, step=3)
    assert ebpo.state_dict() == state
    ebpo(R, step=11)
    assert ebpo.prior.count == state["prior"]["rewards"]["count"] + 8
    for bad in (-1, 2**63):
        with pytest.raises(ValueError, match="step="):
            ebpo(R, step=bad)
    with pytest.raises(TypeError, match="step=1.0"):
        ebpo(R, step=1.0)  # type: ignore[arg-type]


def test_update_false_changes_nothing() -> None:
    ebpo = trained()
    before = ebpo.state_dict()
    assert ebpo(R, update=False) == ebpo(R, update=False)
    assert ebpo.state_dict() == before
    with pytest.raises(TypeError, match="update=0"):
        ebpo(R, update=0)  # type: ignore[arg-type]
    assert ebpo_core.EBPO(normalize="none")([[1.0, 0.0]], update=False) == [[0.5, -0.5]]  # an empty prior: S = 0


def test_threads_lose_no_update() -> None:
    ebpo = ebpo_core.EBPO()
    r = np.random.default_rng(0).random((64, 4096))  # large enough that the kernels release the interpreter
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        for _ in range(10):
            ebpo(r)
            assert ebpo.state_dict()["prior"]["rewards"]["count"] % r.size == 0
            assert ebpo.diagnostics is not None

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ebpo.prior.count == 40 * r.size
    assert ebpo.prior.mean == pytest.approx(r.mean(), rel=1e-12)


def test_a_snapshot_is_never_torn() -> None:
    """The step and the prior of a state dict belong together, whatever another thread does meanwhile."""
    ebpo, stop = ebpo_core.EBPO(), threading.Event()
    torn = []

    def read() -> None:
        while not stop.is_set():
            state = ebpo.state_dict()
            if state["step"] is not None and state["prior"]["rewards"]["count"] != 2 * (state["step"] + 1):
                torn.append(state)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    reader = threading.Thread(target=read)
    try:
        reader.start()
        for step in range(20_000):
            ebpo([[1.0, 0.0]], step=step)
    finally:
        stop.set()
        reader.join()
        sys.setswitchinterval(interval)
    assert not torn


def run(script: str, *args: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script, *args], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_nothing_is_left_to_be_made_at_the_first_call() -> None:
    """A child forked while another thread makes it would wait for ever; so it is made when the package is imported."""
    script = """
import sys, numpy as np, ebpo_core
multiarray = sys.modules.get("numpy._core.multiarray") or sys.modules["numpy.core.multiarray"]
assert hasattr(multiarray, "_RUST_NUMPY_BORROW_CHECKING_API")
del multiarray._ARRAY_API, np.empty  # what the first call would look up
ebpo_core.EBPO()([[1.0, 0.0]])
print(ebpo_core.advantages(np.zeros((1 << 15, 2), dtype=np.float32)).shape)
"""
    assert run(script).strip() == "(32768, 2)"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_child_can_go_on() -> None:
    """Fork while other threads are inside calls: the child must neither hang on a lock nor see a torn state."""
    script = """
import os, threading, numpy as np, ebpo_core
ebpo, r, stop = ebpo_core.EBPO(), np.random.default_rng(0).random((64, 4096)), threading.Event()
def work():
    while not stop.is_set():
        ebpo(r)
threads = [threading.Thread(target=work) for _ in range(3)]
[t.start() for t in threads]
for _ in range(20):
    child = os.fork()
    if child == 0:
        count = ebpo.prior.count
        ebpo(r)
        os._exit(0 if count % r.size == 0 and ebpo.prior.count == count + r.size else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
[t.join() for t in threads]
print("done")
"""
    assert run(script).strip() == "done"


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_merge_to_the_same_prior(ranks: int, tmp_path: Path) -> None:
    """Real gloo processes, each with its own shard, exchange state dicts and hold one prior afterwards."""
    pytest.importorskip("torch")
    script = """
import json, sys, numpy as np, torch.distributed as dist, ebpo_core
rank, ranks, port, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
r = np.random.default_rng(7).random((8, 4, 5))
mine = ebpo_core.Prior()
for batch in r[rank::ranks]:
    mine.update(batch)
states = [None] * ranks
dist.all_gather_object(states, mine.state_dict())
merged = ebpo_core.Prior()
for state in states:
    part = ebpo_core.Prior()
    part.load_state_dict(state)
    merged.merge(part)
json.dump(merged.state_dict(), open(f"{out}/{rank}.json", "w"))
dist.barrier()
dist.destroy_process_group()
"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-c", script]
    workers = [
        subprocess.Popen([*command, str(rank), str(ranks), port, str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * ranks, errors
    states = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]
    assert all(state == states[0] for state in states)  # the same order of merging: the same bits
    merged, whole = ebpo_core.Prior(), ebpo_core.Prior()
    merged.load_state_dict(states[0])
    for batch in np.random.default_rng(7).random((8, 4, 5)):
        whole.update(batch)
    assert_close(merged, whole)
