"""Numbers of any trainer as NumPy arrays: tensors of libraries that this package does not import, lists of unequal
length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def to_array(given: Any) -> Array:
    """`given` as a NumPy array, without a copy where it is one.

    Tensors with a gradient, on a device or in a type that NumPy lacks (bfloat16) are told by their methods, so that no
    library has to be imported for them; bfloat16 becomes float32, which holds it exactly.
    """
    if hasattr(given, "detach"):  # a torch tensor
        given = given.detach()
        given = (given.float() if "bfloat16" in str(given.dtype) else given).cpu()
        return np.asarray(given.numpy())
    array = np.asarray(given)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def padded(rows: Sequence[Sequence[Any]], *, fill: Any = 0, width: int | None = None, left: bool = False) -> Array:
    """[B, T] array of lists of unequal length, with `fill` behind them, or before them with `left`.

    T is `width`, or the longest list's length. The type is that of the entries and `fill` together.
    """
    arrays = [to_array(row) for row in rows]
    longest = max((len(row) for row in arrays), default=0)
    width = longest if width is None else width
    if longest > width:
        raise ValueError(f"a list of {longest} does not fit into {width} positions")
    kind = np.result_type(np.asarray(fill), *(row.dtype for row in arrays if len(row)))
    dense = np.full((len(arrays), width), fill, dtype=kind)
    for index, row in enumerate(arrays):
        dense[index, slice(width - len(row), None) if left else slice(len(row))] = row
    return dense
