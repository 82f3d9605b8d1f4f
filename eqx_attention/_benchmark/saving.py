"""The table by which `Auto` chooses on this machine."""

import os
import warnings

from .._device import device_name
from .._mask import Causal, Full
from .._mechanism.saved_table import read, Row as Saved, text_of
from .files import write_text
from .masks import MASK_ERRORS, MaskOf
from .places import STRATEGIES
from .report import Report
from .settings import Settings


_NOT_CHOSEN = ("auto", "decode", *STRATEGIES)


def check_table(path: str | os.PathLike[str], settings: Settings) -> None:
    """That what will be measured can be saved there."""
    if os.path.exists(path):
        read(path)
    known = (_is_masked(x, settings.lengths[0]) for x in settings.masks.values())
    named = {"masks": any(x is not None for x in known)}
    named["axis_dims or mesh"] = any(place.mesh is None for place in settings.places)
    for name, fits in named.items():
        if not fits:
            wanted = "None" if "mesh" in name else "Full() or Causal() among them"
            raise ValueError(
                f"{name}: expected {wanted}, as save_table is of these alone; got others."
            )
    if settings.chunk_size is not None:
        raise ValueError(
            "chunk_size: expected None, as save_table is for tiles that are chosen; got "
            f"{settings.chunk_size}."
        )


def _is_masked(mask_of: MaskOf, length: int) -> bool | None:
    """What the table knows of a mask; None if it is not one that it is made of, or cannot
    be made."""
    try:
        mask = mask_of(length)
    except MASK_ERRORS:
        return None
    match mask:
        case Full():
            return False
        case Causal(offset=0):
            return True
    return None


def save_table(report: Report, settings: Settings, path: str | os.PathLike[str]) -> None:
    """Adds what was measured to a file, in place of what it says of the same."""
    device = device_name(settings.places[0].devices[0].platform)
    times: dict[tuple[int, bool], dict[str, float]] = {}
    for row in report.rows:
        timed = row.both_ms is not None and row.status == "ok" and not row.mesh
        ours = timed and row.explain and row.mechanism not in _NOT_CHOSEN
        masked = _is_masked(settings.masks[row.mask], row.sequence_length)
        if ours and masked is not None and row.both_ms is not None:
            case = (row.sequence_length, masked)
            times.setdefault(case, {})[row.mechanism] = round(row.both_ms, 4)
    if device is None or not times:
        warnings.warn("save_table: nothing was measured that it could hold.")
        return
    sizes = (settings.num_heads, settings.num_kv_heads, settings.head_dim)
    new = [
        Saved(device, settings.dtype, (settings.batch, length, *sizes), masked, ms)
        for (length, masked), ms in times.items()
    ]
    old = read(path) if os.path.exists(path) else ()
    # All fields but the times, which come last.
    again = {row[:-1] for row in new}
    write_text(path, text_of([*(row for row in old if row[:-1] not in again), *new]))
