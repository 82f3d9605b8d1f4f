"""The mechanism within a mechanism that communicates."""

from .._mechanism import AbstractMechanism, Request


def as_inner(inner: str | AbstractMechanism) -> AbstractMechanism:
    from .table import MECHANISMS  # which has those that ask

    return MECHANISMS[inner]() if isinstance(inner, str) else inner


def check_inner(name: str, inner: str | AbstractMechanism) -> None:
    from .table import check_name, MECHANISMS

    if isinstance(inner, str):
        check_name(f"{name}(inner)", inner)
    elif not isinstance(inner, AbstractMechanism):
        names, got = ", ".join(map(repr, MECHANISMS)), type(inner).__name__
        raise TypeError(f"{name}(inner): expected one of {names}, or a module; got {got}.")


def not_split(request: Request) -> tuple[str, ...]:
    """Why a mechanism that communicates refuses a request, if there is nothing to do."""
    if request.split.key:
        return ()
    return ("it needs a sharding of the sequence, of queries and keys alike",)
