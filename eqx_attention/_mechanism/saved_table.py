"""Which mechanism is the fastest, from what `python -m eqx_attention.benchmark` measured on
this machine."""

import functools as ft
import json
import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from .._device import device_name
from .base import Request
from .measured import asked


# Names the table, if there is one. Nothing else does: no file is looked for, so that the
# processes of one program choose the same unless they are told otherwise.
VARIABLE = "EQX_ATTENTION_TABLE"
_FORMAT, _VERSION = "eqx_attention table", 1
_WRITER = "`python -m eqx_attention.benchmark --save-table`"


class Row(NamedTuple):
    """`shape` is (batch, length, heads, key heads, head_dim), and `ms` are those of the
    forward and the backward pass, by the name of the mechanism."""

    device: str
    dtype: str
    shape: tuple[int, int, int, int, int]
    masked: bool
    ms: dict[str, float]

    @property
    def weights(self) -> int:
        batch, length, heads, _, _ = self.shape
        return batch * heads * length**2


class Found(NamedTuple):
    row: Row
    path: str


def text_of(rows: Iterable[Row]) -> str:
    """The file that holds these rows."""
    lines = ",\n".join(f"  {json.dumps(row._asdict())}" for row in rows)
    head = f' "format": {json.dumps(_FORMAT)},\n "version": {_VERSION}'
    return f'{{\n{head},\n "rows": [\n{lines}\n ]\n}}\n'


def read(path: str | os.PathLike[str]) -> tuple[Row, ...]:
    """The rows of a file.

    **Raises:** `ValueError` if there is none, or it is not one that `text_of` wrote.
    """
    file = pathlib.Path(path)
    try:
        stat = file.stat()
        return _read(file, stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        raise _wrong(file, error.strerror or str(error)) from None


@ft.lru_cache(maxsize=8)
def _read(file: pathlib.Path, changed: int, size: int) -> tuple[Row, ...]:
    try:
        table = json.loads(file.read_text())
    except ValueError as error:  # Of the text, or of JSON.
        raise _wrong(file, str(error)) from None
    head = table.get("format") if isinstance(table, dict) else None
    if head != _FORMAT or table.get("version") != _VERSION:
        raise _wrong(file, f"its format is not {_FORMAT!r}, version {_VERSION}")
    rows = table.get("rows")
    if not isinstance(rows, list):
        raise _wrong(file, "it has no list of rows")
    return tuple(_row(file, row) for row in rows)


def _row(file: pathlib.Path, row: Any) -> Row:
    if not isinstance(row, dict) or set(row) != set(Row._fields):
        raise _wrong(file, f"a row is to have {', '.join(Row._fields)}, and one is {row}")
    shape, ms = row["shape"], row["ms"]
    texts = isinstance(row["device"], str) and isinstance(row["dtype"], str)
    sizes = isinstance(shape, list) and len(shape) == 5 and all(map(_is_size, shape))
    times = isinstance(ms, dict) and len(ms) > 0 and all(map(_is_time, ms.values()))
    if not (texts and sizes and times and isinstance(row["masked"], bool)):
        raise _wrong(file, f"a row is odd: {row}")
    return Row(row["device"], row["dtype"], tuple(shape), row["masked"], ms)


def _is_size(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x > 0


def _is_time(x: Any) -> bool:
    number = isinstance(x, int | float) and not isinstance(x, bool)
    return number and math.isfinite(x) and x > 0


def _wrong(file: pathlib.Path, why: str) -> ValueError:
    return ValueError(
        f"{VARIABLE}: expected a table that {_WRITER} wrote, got {str(file)!r}: {why}."
    )


def most_like(request: Request) -> Found | None:
    """The row for this device that is most like a request: in the dtype, then in the size
    of heads, then in whether there is a mask, then in length. None if there is no such
    row."""
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    rows = [row for row in read(path) if row.device == device_name(request.platform)]
    if not rows:
        return None
    call, dtype = asked(request), request.query.dtype.name

    def distance(row: Row):
        return row.dtype != dtype, *call.unlike(row.shape, row.masked)

    return Found(min(rows, key=distance), path)
