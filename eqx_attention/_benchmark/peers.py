"""What is measured beside our mechanisms, where it can be imported."""

import functools as ft
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from .._mask import AbstractMask, And, Causal, Full, SlidingWindow
from .masks import visible_rows
from .programs import Candidate, of_jax, Operands, Program
from .settings import Case


def of_peer(peer: str, case: Case, operands: Operands) -> list[Candidate]:
    """What a library has: one candidate, or on a GPU several.

    **Raises:** `NotImplementedError` if it cannot be measured here.
    """
    if case.place.mesh is not None:
        raise NotImplementedError("it is measured on one device, without a mesh")
    if importlib.util.find_spec(peer) is None:
        raise NotImplementedError(f"{peer} cannot be imported")
    return {"jax": _jax, "tokamax": _tokamax, "torch": _torch}[peer](case, operands)


def _words(mask: AbstractMask) -> dict[str, Any] | None:
    """A mask in the words of `jax.nn`, which are tokamax's too, if it has any for it."""
    match mask:
        case Full():
            return {}
        case Causal(offset=0):
            return {"is_causal": True}
        case And(masks=(Causal(offset=0), SlidingWindow(left=int(left), right=0))):
            return {"is_causal": True, "local_window_size": (left, 0)}
    return None


def _seen(case: Case) -> np.ndarray:
    """A mask as a matrix, which is what these take of a mask that they have no word for."""
    s, rows = case.settings, np.arange(case.length)
    return np.array(visible_rows(case.mask, s.batch, s.num_heads, case.length, rows))


def _candidate(
    name: str, attend: Callable[..., Any], case: Case, operands: Operands
) -> Candidate:
    def with_matrix(q, k, v, mask):
        return attend(q, k, v, mask=mask)

    def program(which: str) -> Program:
        words = _words(case.mask)
        if words is not None:
            return of_jax(ft.partial(attend, **words), operands, which)
        seen = jax.device_put(_seen(case), case.place.devices[0])
        return of_jax(with_matrix, operands, which, seen)

    return Candidate(name, program, lambda: "")


def _jax(case: Case, operands: Operands) -> list[Candidate]:
    attend = jax.nn.dot_product_attention
    found = [_candidate("jax.nn", attend, case, operands)]
    if case.place.devices[0].platform == "gpu":
        cudnn = ft.partial(attend, implementation="cudnn")
        found.append(_candidate("jax.nn cudnn", cudnn, case, operands))
    return found


def _tokamax(case: Case, operands: Operands) -> list[Candidate]:
    import tokamax  # pyright: ignore[reportMissingImports]

    # It warns, at length, of each shape that its authors did not tune it for.
    logging.getLogger("absl").setLevel(logging.ERROR)
    return [_candidate("tokamax", tokamax.dot_product_attention, case, operands)]


def _torch(case: Case, operands: Operands) -> list[Candidate]:
    platform = case.place.devices[0].platform
    if platform not in ("cpu", "gpu"):
        raise NotImplementedError(f"PyTorch is not measured on a {platform}")
    if platform == "gpu":
        import torch  # pyright: ignore[reportMissingImports]

        if not torch.cuda.is_available():
            raise NotImplementedError("this PyTorch has no CUDA")
    make = ft.partial(_torch_program, case, operands)
    return [Candidate("torch", make, lambda: "")]


def _torch_program(case: Case, operands: Operands, which: str) -> Program:
    """`scaled_dot_product_attention`, whose memory nothing tells beforehand."""
    import torch  # pyright: ignore[reportMissingImports]

    device = "cuda" if case.place.devices[0].platform == "gpu" else "cpu"
    dtype = getattr(torch, case.settings.dtype)

    def tensor(x: Any) -> Any:
        wide = np.array(x).astype(np.float64 if dtype == torch.float64 else np.float32)
        return torch.from_numpy(wide).to(device, dtype).transpose(1, 2).contiguous()

    q, k, v, dout = (tensor(x) for x in operands.arrays)
    other = tensor(operands.dout_of_part)
    both = which == "both"
    for x in (q, k, v):
        x.requires_grad_(both)
    options: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]}
    words = _words(case.mask)
    if words is None or "local_window_size" in words:
        options["attn_mask"] = torch.from_numpy(_seen(case)).to(device)
    else:
        options |= words

    def call(dout: Any = dout) -> list[Any]:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
        return [out, *torch.autograd.grad(out, (q, k, v), dout)] if both else [out]

    def results() -> list[np.ndarray]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        found = [x.detach().transpose(1, 2).to("cpu", wide) for x in call(other)]
        return [x.numpy() for x in found]

    wait = (lambda _: torch.cuda.synchronize()) if device == "cuda" else (lambda _: None)
    return Program(call, wait, results, None)
