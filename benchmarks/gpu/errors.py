"""How far a result is from what it should be, and from itself."""

import numpy as np


def errors_of(part: str, got, again, want, left_out) -> dict[str, float]:
    """Of one part of the results: the error, and the difference between two runs, relative
    to the norm of what is right; without what is `left_out`."""
    got, again, want = (np.where(left_out, 0, x) for x in (got, again, want))
    norm = max(np.linalg.norm(want), 1e-1 * np.sqrt(want.size))  # 0 is no measure
    return {
        part: float(np.linalg.norm(got - want) / norm),
        f"{part} twice": float(np.linalg.norm(got - again) / norm),
    }
