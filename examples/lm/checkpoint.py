"""Files that survive a crash: written whole or not at all, and checked when read.

A checkpoint is a line with a checksum of all that follows, a line of JSON, and the arrays
in NumPy's format, as `equinox.tree_serialise_leaves` writes them. None of it is executed.
"""

import hashlib
import io
import json
import os
import pathlib
from typing import Any, NamedTuple

import equinox as eqx
from jaxtyping import PyTree


_MAGIC = b"train_lm checkpoint 1 "


class CheckpointError(ValueError):
    """A file is no checkpoint, or not a whole one."""


class Checkpoint(NamedTuple):
    header: dict[str, Any]
    leaves: bytes

    def restore(self, like: PyTree) -> PyTree:
        """The saved pytree.

        **Arguments:**

        - `like`: A pytree of the same structure, shapes and dtypes.
        """
        return eqx.tree_deserialise_leaves(io.BytesIO(self.leaves), like)


def save(path: pathlib.Path, header: dict[str, Any], tree: PyTree) -> None:
    """Writes a JSON-able header and the leaves of a pytree."""
    body = io.BytesIO()
    body.write(json.dumps(header).encode() + b"\n")
    eqx.tree_serialise_leaves(body, tree)
    digest = hashlib.sha256(body.getbuffer()).hexdigest()
    _write_atomically(path, _MAGIC + digest.encode() + b"\n" + body.getvalue())


def read(path: pathlib.Path) -> Checkpoint:
    """Reads what `save` wrote.

    **Raises:** a `CheckpointError` if there is no file, or if not all of it is as written.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint at {path}") from None
    first, _, body = content.partition(b"\n")
    if not first.startswith(_MAGIC):
        raise CheckpointError(f"{path} is not a checkpoint of this program")
    if first.removeprefix(_MAGIC) != hashlib.sha256(body).hexdigest().encode():
        raise CheckpointError(
            f"{path} is truncated or corrupted: its checksum is not that of its contents"
        )
    header, _, leaves = body.partition(b"\n")
    return Checkpoint(json.loads(header), leaves)


def _write_atomically(path: pathlib.Path, content: bytes) -> None:
    """At every moment, `path` is either the old file or the new one."""
    # In the same directory, since a rename between file systems is a copy. What a killed
    # program leaves there is overwritten by the next one.
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it gets its name
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere, directories cannot be opened
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # the name, too
        finally:
            os.close(directory)
