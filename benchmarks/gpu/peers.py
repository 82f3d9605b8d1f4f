"""What is timed beside our mechanisms, and which module each needs."""

import importlib.util

from .cases import Timed


# The name on the command line -> (the name in the tables, what is imported).
PEERS = {
    "jax": ("jax.nn cudnn", "jax"),
    "torch": ("flex", "torch"),
    "tokamax": ("tokamax", "tokamax"),
}
_NAMES = tuple(name for name, _ in PEERS.values())


def importable(asked: str | None) -> set[str]:
    """Names in the tables of those that are asked for (all, by default) and importable."""
    found = set()
    for peer in PEERS if asked is None else filter(None, asked.split(",")):
        name, module = PEERS[peer]
        if importlib.util.find_spec(module) is None:
            print(f"not timed: {name}, as {module} cannot be imported", flush=True)
        else:
            found.add(name)
    return found


def names(timed: Timed, peers: set[str]) -> list[str]:
    """Our mechanisms, and those of its peers that are to be timed."""
    return [name for name in timed.by if name not in _NAMES or name in peers]


def group(name: str) -> str:
    """Peers are in processes of their own, so that one that dies takes no other along."""
    return name if name in ("flex", "tokamax") else "jax"
