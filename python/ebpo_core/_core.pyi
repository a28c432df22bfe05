from collections.abc import Sequence
from typing import Any, Final, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "DEBUG_BUILD",
    "Call",
    "Options",
    "State",
    "__version__",
    "baseline_advantages",
    "codes_of_bytes",
    "codes_of_ints",
    "codes_of_keys",
    "codes_of_objects",
    "equal_advantages",
]

__version__: Final[str]
DEBUG_BUILD: Final[bool]

_Rewards: TypeAlias = NDArray[np.float32] | NDArray[np.float64]
_Groups: TypeAlias = int | tuple[NDArray[np.uint32], int]
_Mask: TypeAlias = NDArray[np.bool_] | None
_Vector: TypeAlias = NDArray[np.float64]
_Parts: TypeAlias = list[float]
_Path: TypeAlias = tuple[str | int, ...]
_KeyArrays: TypeAlias = tuple[
    NDArray[np.uint8], NDArray[np.uintp], NDArray[np.intp], NDArray[np.float64], NDArray[np.int64]
]
_Keys: TypeAlias = tuple[list[_Path], NDArray[np.uint32], NDArray[np.uint32] | None] | None
_Vectors: TypeAlias = tuple[_Vector, _Vector, _Vector, tuple[_Vector, _Vector, _Vector] | None]
_Scalars: TypeAlias = tuple[float, float, float, float, float, float, float]

@final
class Options:
    def __new__(
        cls,
        *,
        normalize: str,
        sigma2: str,
        tau2: str,
        score: str,
        leave_one_out: bool | str,
        shrinkage: float | None,
        decay: float,
        decay_by: str,
        eps: float,
        ddof: int,
        norm_ddof: int,
        kappa: float,
        max_keys: int,
    ) -> Options: ...

@final
class Call:
    def prompts(self) -> int: ...
    def diagnostics(self) -> tuple[_Vectors, _Scalars]: ...

@final
class State:
    def __new__(cls) -> State: ...
    def advance(
        self,
        options: Options,
        rewards: _Rewards,
        groups: _Groups,
        mask: _Mask,
        update: bool,
        step: int | None,
        keys: _Keys,
        stream: bool,
    ) -> tuple[NDArray[Any], Call]: ...
    def advance_matrix(
        self, options: Options, rewards: object, keys: tuple[Any, ...] | None, update: bool, step: int | None, /
    ) -> tuple[NDArray[Any], Call] | None: ...
    def observe(self, rewards: _Rewards, groups: _Groups, mask: _Mask) -> None: ...
    def merge(self, other: State, max_keys: int) -> None: ...
    def decay(self, rho: float) -> None: ...
    def parts(self) -> tuple[_Parts, int | None]: ...
    def stored(self, as_arrays: bool) -> tuple[_Parts, Any, tuple[float, int], int | None]: ...
    def key_count(self) -> int: ...
    def priors(self) -> list[tuple[_Path, _Parts]]: ...
    def load(
        self,
        root: _Parts,
        keys: list[tuple[_Path, _Parts, int]] | _KeyArrays,
        clock: tuple[float, int],
        step: int | None,
        max_keys: int,
    ) -> None: ...
    def before_update(self) -> State: ...
    def same(self, other: State) -> bool: ...
    def digest(self) -> int: ...
    def shrunken(self, options: Options, path: _Path) -> tuple[float, float, float]: ...
    def sigma2(self, kind: str, ddof: int) -> float: ...
    def tau2(self, kind: str, ddof: int) -> float: ...

def equal_advantages(rewards: object, /) -> NDArray[Any] | None: ...
def baseline_advantages(
    method: str, parameter: float, rewards: _Rewards, groups: _Groups, mask: _Mask
) -> NDArray[Any]: ...
def codes_of_ints(ids: NDArray[np.int64], /) -> tuple[NDArray[np.uint32], int]: ...
def codes_of_bytes(ids: NDArray[np.uint8], /) -> tuple[NDArray[np.uint32], int]: ...
def codes_of_objects(ids: Sequence[object], name: str, /) -> tuple[NDArray[np.uint32], int]: ...
def codes_of_keys(keys: Sequence[Any], /) -> tuple[list[int], NDArray[np.uint32]]: ...
