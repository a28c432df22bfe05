"""Lists, arrays and tensors to what the Rust core reads, and its answer back to what the caller passed.

The core reads flat, C-contiguous float32 or float64. Everything else (float16, ints, strides, byte order, tensors) is
converted here, in f64 where float32 would round, and the result is rounded once, to the caller's own dtype.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray

from ebpo_core import _core

if TYPE_CHECKING:
    import torch

Groups: TypeAlias = "int | tuple[NDArray[np.uint32], int]"

MAX_REWARD = 1e140
"""Largest magnitude of a reward, or of a sum of rewards: what the core takes, and what can be squared."""


class Batch(NamedTuple):
    """A call's arrays as the core reads them, and how to give its flat result the caller's container and dtype."""

    rewards: NDArray[Any]
    groups: Groups
    mask: NDArray[np.bool_] | None
    restore: Callable[[NDArray[Any]], Any]


def read_batch(rewards: Any, groups: Any = None, mask: Any = None) -> Batch:
    """Check and convert a call's arguments. Raises TypeError or ValueError naming the argument and the remedy."""
    array, restore = read_rewards(rewards)
    if array.ndim == 2 and groups is not None:
        raise ValueError(
            f"groups was given with rewards of shape {array.shape}: rows of a 2-D array are groups already; "
            "pass 1-D rewards to name groups yourself, or weights= of ebpo_core.advantages where columns are several "
            "rewards of each completion"
        )
    if array.ndim == 1 and groups is None:
        raise ValueError(
            f"rewards has shape {array.shape} and groups is None: pass rewards of shape (M, G), one row per group, "
            "or name each reward's group with groups="
        )
    if array.ndim not in (1, 2):
        raise ValueError(f"rewards has shape {array.shape}: expected (M, G), or (N,) with groups=")
    if array.size == 0:
        raise ValueError(f"rewards has shape {array.shape}, which holds no reward: pass at least one")
    coded: Groups = array.shape[1] if groups is None else group_codes(groups, array.size)
    return Batch(_flat(array), coded, _read_mask(mask, array.shape), restore)


def on_memory(rewards: Any, call: Callable[[NDArray[Any]], NDArray[Any] | None]) -> torch.Tensor | None:
    """What ``call`` makes of a tensor's memory, as a tensor; None for what is no tensor that can be read as it is."""
    if not is_tensor(rewards):
        return None
    import torch

    plain = rewards.is_cpu and rewards.layout is torch.strided and rewards.dtype in (torch.float32, torch.float64)
    if not plain or rewards.requires_grad or rewards.is_neg() or rewards.is_nested:
        return None
    result = call(rewards.numpy())
    return None if result is None else torch.from_numpy(result)


def read_group(rewards: Any, mask: Any = None) -> Batch:
    """As :func:`read_batch`, for the rewards ``(n,)`` of one group."""
    array, restore = read_rewards(rewards)
    if array.ndim != 1:
        raise ValueError(f"rewards has shape {array.shape}: expected the rewards of one group, (n,)")
    if array.size == 0:
        raise ValueError("rewards has shape (0,), which holds no reward: pass at least one")
    return Batch(_flat(array), array.size, _read_mask(mask, array.shape), restore)


def _flat(array: NDArray[Any]) -> NDArray[Any]:
    flat = array.reshape(-1)
    flags = flat.flags
    return flat if flags.c_contiguous and flags.aligned else np.require(flat, requirements=["C", "A"])


def is_tensor(value: Any) -> TypeGuard[torch.Tensor]:
    """True for a torch tensor; torch is not imported for it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def array_of(name: str, values: Any, remedy: str = "pass one entry per reward") -> NDArray[Any]:
    """Anything array-like as an array; a float tensor as float64, since NumPy lacks the narrow dtypes of torch.

    Raises:
        ValueError: the lengths of nested lists differ; ``remedy`` says what to do.
        TypeError: tensors without data, or that NumPy cannot read.
    """
    if is_tensor(values):
        _check_dense(name, values)
        values = values.detach().cpu().resolve_conj().resolve_neg()
        values = (values.double() if values.is_floating_point() else values).numpy()
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} is not rectangular ({error}): {remedy}") from None
    except (TypeError, RuntimeError) as error:  # of torch, for tensors in a list
        raise TypeError(f"{name} cannot be read ({error}): pass one tensor, or plain numbers") from None


def _check_dense(name: str, tensor: torch.Tensor) -> None:
    import torch

    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"{name} is {kind} on device {tensor.device}: expected a dense tensor with data")


def read_rewards(rewards: Any) -> tuple[NDArray[Any], Callable[[NDArray[Any]], Any]]:
    """Rewards of any shape as float32 or float64, and the way back to the caller's container and dtype."""
    if is_tensor(rewards):
        return _read_tensor(rewards)
    # Looked up, not imported: an import under way in one thread would block the child that another thread forks.
    masked = sys.modules.get("numpy.ma")
    if masked is not None and isinstance(rewards, masked.MaskedArray):
        raise TypeError(
            "rewards is a masked array, whose mask means the opposite: pass rewards.data and mask=~rewards.mask"
        )
    array = array_of("rewards", rewards, "for groups of uneven size pass 1-D rewards and groups=")
    if array.dtype.kind not in "fiub":
        raise TypeError(
            f"rewards has dtype {array.dtype}: expected real numbers (floats, ints or bools); "
            "use NaN, not None, for a completion that could not be scored"
        )
    dtype = array.dtype if array.dtype.kind == "f" else np.dtype(np.float64)
    work = np.float32 if dtype == np.float32 else np.float64
    as_list = isinstance(rewards, (list, tuple))

    def restore(flat: NDArray[Any]) -> Any:
        shaped = flat.reshape(array.shape)
        if as_list:
            return shaped.tolist()
        return shaped if shaped.dtype == dtype and dtype.isnative else round_to(shaped, dtype)

    return _finite_cast(array, work), restore


def _finite_cast(array: NDArray[Any], work: type[np.floating[Any]]) -> NDArray[Any]:
    if array.dtype.itemsize <= 8:
        return array.astype(work, copy=False)
    with np.errstate(over="ignore"):  # a long double beyond float64 becomes inf, which the core refuses by name
        return array.astype(work)


def round_to(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """A copy in another float dtype; a value beyond the range of a narrower one saturates."""
    if dtype.itemsize < values.dtype.itemsize:
        bound = float(np.finfo(dtype).max)
        values = np.clip(values, -bound, bound)
    return values.astype(dtype)


def _read_tensor(rewards: torch.Tensor) -> tuple[NDArray[Any], Callable[[NDArray[Any]], Any]]:
    import torch

    if rewards.is_complex():
        raise TypeError(f"rewards has dtype {rewards.dtype}: expected real numbers (floats, ints or bools)")
    _check_dense("rewards", rewards)
    dtype = rewards.dtype if rewards.is_floating_point() else torch.get_default_dtype()
    if torch.finfo(dtype).min >= 0:
        raise TypeError(f"rewards has dtype {dtype}, which holds no negative number: pass float32")
    work = torch.float32 if dtype == torch.float32 and rewards.dtype == dtype else torch.float64
    # One copy from the device and one back to it; the CPU copy of a float32 or float64 tensor shares its memory. The
    # place for the copy back is taken now, so that a device out of memory fails before any state changes.
    array = rewards.detach().cpu().resolve_neg().to(work).numpy()
    on_device = None if rewards.is_cpu else torch.empty(rewards.shape, dtype=dtype, device=rewards.device)

    def restore(flat: NDArray[Any]) -> Any:
        values = tensor_of(flat, dtype).reshape(rewards.shape)
        return values if on_device is None else on_device.copy_(values)

    return array, restore


def tensor_of(values: NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    """A CPU tensor of float values, each rounded once; one beyond the range of the dtype saturates."""
    import torch

    if dtype not in (torch.float32, torch.float64):
        values = _round_to_torch(values, dtype)
    elif dtype == torch.float32:
        values = values if values.dtype == np.float32 else round_to(values, np.dtype(np.float32))
    return torch.from_numpy(values).to(dtype)


def _round_to_torch(values: NDArray[np.float64], dtype: torch.dtype) -> NDArray[np.float64]:
    """Values of a narrow torch dtype, still as f64: torch itself would round twice, by way of float32."""
    import torch

    info = torch.finfo(dtype)
    exponent = np.frexp(values)[1] - 1  # values = m * 2**exponent with 1 <= |m| < 2
    quantum = np.ldexp(info.eps, np.maximum(exponent, np.frexp(info.tiny)[1] - 1))
    return np.asarray(np.clip(np.rint(values / quantum) * quantum, info.min, info.max))


def _read_mask(mask: Any, shape: tuple[int, ...]) -> NDArray[np.bool_] | None:
    if mask is None:
        return None
    array = array_of("mask", mask)
    if array.shape != shape:
        raise ValueError(f"mask has shape {array.shape}, rewards {shape}: pass one entry per reward")
    if array.dtype == np.bool_:
        array = array.view(np.uint8)  # a view of other bytes as booleans may hold more than 0 and 1
    elif array.dtype.kind not in "iuf" or not bool(np.isin(array, (0, 1)).all()):  # attention masks are often integers
        raise TypeError(
            f"mask has dtype {array.dtype}: expected booleans (True where a reward counts) or zeros and ones"
        )
    return np.asarray(np.ascontiguousarray(array).reshape(-1) != 0)


def integers(name: str, values: Any, rows: int) -> NDArray[np.int64]:
    """``rows`` whole numbers, at least 0, as int64 ``(rows,)``."""
    array = array_of(name, values)
    if array.shape != (rows,):
        raise ValueError(f"{name} has shape {array.shape}, rewards ({rows},): pass one entry per reward")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {array.dtype}: expected integers")
    bad = np.flatnonzero((array < 0) | (array >= 2**31))
    if bad.size:
        raise ValueError(f"{name}[{bad[0]}] is {array[bad[0]]}: expected an integer of at least 0 and below 2**31")
    return array.astype(np.int64)


def group_codes(groups: Any, rows: int, name: str = "groups") -> tuple[NDArray[np.uint32], int]:
    """Dense codes, in order of first appearance, of ``rows`` ids of any hashable kind, and how many there are.

    ``name`` is the argument that they were passed as, for the errors.
    """
    ids: Any = groups if isinstance(groups, (np.ndarray, list, tuple)) else array_of(name, groups)
    shape = ids.shape if isinstance(ids, np.ndarray) else (len(ids),)
    if shape != (rows,):
        raise ValueError(f"{name} has shape {shape}, rewards ({rows},): pass one id per reward")
    kind = ids.dtype.kind if isinstance(ids, np.ndarray) else "O"
    if kind in "iub":
        return _core.codes_of_ints(_flat(ids.astype(np.int64)))  # uint64 wraps around, one to one
    if kind in "US":
        return _core.codes_of_bytes(np.ascontiguousarray(ids).view(np.uint8).reshape(rows, ids.dtype.itemsize))
    objects = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
    torch = sys.modules.get("torch")
    if torch is not None and torch.Tensor in set(map(type, objects)):
        # Tensors hash by identity: each would be a group of its own.
        try:
            objects = [one.item() if isinstance(one, torch.Tensor) else one for one in objects]
        except RuntimeError as error:
            raise TypeError(f"{name} holds a tensor that is no single number ({error}): pass ints or strings") from None
    return _core.codes_of_objects(objects, name)
