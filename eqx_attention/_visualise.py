from typing import Any

import numpy as np
from beartype import beartype as typechecker
from jaxtyping import Int, jaxtyped

from ._block_mask import Bound
from ._options import as_mask
from ._static import AnyArray


@jaxtyped(typechecker=typechecker)
def visualise(
    mask: Any,
    q_len: int,
    kv_len: int,
    *,
    num_heads: int | None = None,
    batch: int = 0,
    head: int = 0,
    q_positions: str | Int[AnyArray, " q_len"] = "start",
    kv_positions: Int[AnyArray, " kv_len"] | None = None,
    width: int = 64,
    ax: Any = None,
) -> Any:
    """Draws which keys (columns) each query (rows) sees.

    ```python
    print(eqa.visualise(eqa.Causal() & eqa.SlidingWindow(2), 6, 6))
    # █·····
    # ██····
    # ███···
    # ·███··
    # ··███·
    # ···███
    ```

    **Arguments:**

    - `mask`: any mask, or a boolean array.
    - `q_len`, `kv_len`: the lengths.
    - `num_heads`: the number of query heads, if a function in the mask looks at the head.
    - `batch`, `head`: which batch element (counted over all batch axes) and head to draw,
        if the mask has several.
    - `q_positions`, `kv_positions`: as for [`eqx_attention.attend`][].
    - `width`: the most columns of text. Longer sequences are drawn in cells of several
        tokens: `█` all of whose pairs are visible, `▒` some, `·` none.
    - `ax`: matplotlib `Axes` to draw into, instead of text.

    **Returns:**

    The text; or `ax`.

    **Raises:** `IndexError` if there is no such batch element or head.
    """
    bound = Bound(as_mask(mask), q_len, kv_len, num_heads, q_positions, kv_positions)
    seen = np.asarray(bound.whole())
    seen = seen[batch if len(seen) > 1 else 0]
    seen = seen[head if len(seen) > 1 else 0]
    return _text(seen, width) if ax is None else _picture(seen, ax)


def _text(seen: np.ndarray, width: int) -> str:
    if width < 1:
        raise ValueError(f"width: expected at least 1, got {width}.")
    cell = -(-max(seen.shape) // width)
    lines = []
    for i in range(0, seen.shape[0], cell):
        row = seen[i : i + cell]
        cells = (row[:, j : j + cell] for j in range(0, seen.shape[1], cell))
        lines.append("".join("█" if c.all() else "▒" if c.any() else "·" for c in cells))
    return "\n".join(lines)


def _picture(seen: np.ndarray, ax: Any) -> Any:
    ax.imshow(seen, cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest", aspect="equal")
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    ax.xaxis.set_label_position("top")
    ax.xaxis.tick_top()
    return ax
