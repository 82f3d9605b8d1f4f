"""Which mechanism is the fastest here, how exact it is, and what memory it takes.

    python -m eqx_attention.benchmark
    python -m eqx_attention.benchmark --sequence-length 1024,8192 --masks causal,window:1023
    python -m eqx_attention.benchmark --help

The same as a function: [`eqx_attention.benchmark.run`][].
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from beartype import beartype as typechecker
from jaxtyping import jaxtyped

from ._benchmark.places import AXIS_NAMES as _AXIS_NAMES, places as _places
from ._benchmark.report import Report as Report, Row as Row
from ._benchmark.running import Files as _Files, run_all as _run_all
from ._benchmark.settings import settings_of as _settings_of
from ._distributed import Sharding
from ._mask import AbstractMask


_Path = str | os.PathLike[str] | None


@jaxtyped(typechecker=typechecker)
def run(
    *,
    axis_dims: Sequence[int] | Sequence[Sequence[int]] | None = None,
    axis_names: Sequence[str] = _AXIS_NAMES,
    sequence_length: int | Sequence[int] | None = None,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
    batch: int | None = None,
    dtype: Any = None,
    chunk_size: int | None = None,
    masks: Sequence[str] | Mapping[str, AbstractMask | Callable[[int], AbstractMask]] = (
        "full",
        "causal",
        "window",
    ),
    mechanisms: Sequence[str] | None = None,
    compare: Sequence[str] = (),
    mesh: Any = None,
    sharding: Sharding | None = None,
    rounds: int = 5,
    json: _Path = None,
    csv: _Path = None,
    plot: _Path = None,
    save_table: _Path = None,
    progress: bool = False,
) -> Report:
    r"""Measures all mechanisms on this machine, at some lengths, with some masks.

    ```python
    report = eqa.benchmark.run(sequence_length=(64, 128), masks=("causal",), head_dim=16)
    print(report)
    ```

    Of each: errors of the output and of the gradients, against a reference in float64 that
    shares nothing with the mechanisms; the norm of the gradients relative to that of the
    right ones, and the largest gradient; medians of the time of the forward pass, and of
    both passes; operations a second, on those pairs that the mask sees; their share of
    those of a matrix product, measured in the same run; and peak memory, by the compiler's
    plan. All mechanisms are timed in turn, so that whatever else the machine does falls on
    all of them alike.

    What a mechanism does not support, or does not fit into memory, or fails, is a row that
    says so. Stopped by Ctrl-C, it returns what was measured until then.

    **Arguments:**

    - `axis_dims`: the sizes of a mesh of devices, one for each of `axis_names`; -1 is as
        many as there are left. A list of these measures each mesh, and the report ranks
        them. Default: one device, and no mesh. Where a mesh splits the sequence, those
        mechanisms are measured that communicate.
    - `axis_names`: the names of the mesh's axes. `"dp"` and `"fsdp"` split the batch,
        `"tp"` the heads and `"sp"` the sequence. Default: these four.
    - `sequence_length`: the number of queries, and of keys; or several, each of which is
        measured. Default: 256, 1024 and 4096 on a CPU, and 1024, 4096 and 16384 elsewhere.
    - `num_attention_heads`: the number of query heads. Default: 8 on a CPU, 16 elsewhere.
    - `num_key_value_heads`: that of key heads, which divides it. Default: the same.
    - `head_dim`: the channels of a head. Default: 64 on a CPU, 128 elsewhere.
    - `batch`: the batch size. Default: 1, and with meshes the least that each of them
        can split.
    - `dtype`: `"float32"`, `"bfloat16"`, `"float16"` or `"float64"`. Default: the first on
        a CPU, the second elsewhere.
    - `chunk_size`: how many queries and how many keys the tiles of `Blockwise` have, alone
        or within a mechanism that communicates. Default: chosen from the shapes.
    - `masks`: names, or one, of `"full"`, `"causal"`, `"window"`, `"documents"`,
        `"prefix_lm"`, `"chunked"` and `"padding"`; all but the first two may have a number,
        as in `"window:1023"`. Or a dictionary from names of your own to masks, or to
        functions from a length to a mask. Default: `"full"`, `"causal"`, `"window"`.
    - `mechanisms`: their names, or one. Default: all that may do it.
    - `compare`: other libraries to measure on the same, `"jax"` (`jax.nn`), `"tokamax"`
        and `"torch"` (PyTorch), where they can be imported. Default: none.
    - `mesh`: another way to say `axis_dims` and `axis_names`: `"dp=2,sp=4"`, a dictionary
        `{"dp": 2, "sp": 4}`, or a `jax.sharding.Mesh`; or a list of these.
    - `sharding`: what the axes of the mesh split, if by other names. Default: as
        `axis_names` says.
    - `rounds`: the number of rounds in which all are timed in turn. Default 5.
    - `json`, `csv`: files to write, anew after each row. They are whole at any time.
    - `plot`: a picture to draw: speed and memory over length. Needs matplotlib.
    - `save_table`: a table for [`eqx_attention.Auto`][] to choose by on this machine, if
        the environment variable `EQX_ATTENTION_TABLE` names it. An existing one is added
        to.
    - `progress`: whether to show a progress bar. Needs rich.

    **Returns:**

    A [`eqx_attention.benchmark.Report`][]. A file that could not be written after all, as
    on a full disk, is named there.

    **Raises:** `TypeError` or `ValueError` if an argument is wrong, naming it, or if a file
    cannot be written; and
    `ImportError` if what `plot` or `progress` needs is not installed. All of this comes
    before anything is measured.
    """
    settings = _settings_of(
        places=_places(axis_dims, axis_names, mesh, sharding),
        sequence_length=sequence_length,
        masks=masks,
        mechanisms=mechanisms,
        compare=compare,
        batch=batch,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        dtype=dtype,
        chunk_size=chunk_size,
        rounds=rounds,
    )
    return _run_all(settings, _Files(json, csv, plot, save_table), progress)


if __name__ == "__main__":
    import sys

    from ._benchmark.extras import needed as _needed

    try:
        _needed("typer", "the command line")
        _needed("rich", "the command line")
    except ImportError as error:
        sys.exit(f"eqx_attention.benchmark: {error}")
    from ._benchmark.cli import main as _main

    _main()
