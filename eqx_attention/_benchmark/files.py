"""Files that are whole at any time."""

import json
import os
import pathlib
from typing import Any


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file beside its place, and then puts it there."""
    write_bytes(path, text.encode())


def check_writable(name: str, path: str | os.PathLike[str]) -> None:
    """That a file can be written there, which the argument `name` asks for."""
    place = pathlib.Path(path)
    try:
        if place.is_dir():
            raise IsADirectoryError("it is a folder")
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished = _unfinished(place)
        unfinished.touch()
        unfinished.unlink()
    except OSError as error:
        why = error.strerror or str(error)
        raise ValueError(f"{name}: cannot be written: {os.fspath(path)}: {why}.") from None


def _unfinished(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.part")


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(path)
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
