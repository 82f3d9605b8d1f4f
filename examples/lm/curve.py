"""The picture: loss against steps."""

import pathlib

import numpy as np
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw(
    path: pathlib.Path,
    train_loss: Float[np.ndarray, " steps"],
    validation_loss: Float[np.ndarray, " steps"],
    ngram_loss: float,
) -> None:
    """Writes a PNG. NaNs are left out."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    axes = figure.add_subplot()
    steps = 1 + np.arange(len(train_loss))
    axes.plot(steps, train_loss, color="C0", alpha=0.3, linewidth=0.5)
    width = max(len(train_loss) // 50, 1)
    smooth = np.convolve(train_loss, np.ones(width) / width, mode="valid")
    axes.plot(steps[width - 1 :], smooth, color="C0", label=f"training, mean of {width}")
    known = ~np.isnan(validation_loss)
    axes.plot(
        steps[known], validation_loss[known], color="C1", marker="o", label="held out"
    )
    axes.axhline(ngram_loss, color="C7", linestyle="--", label="n-gram, held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a byte)")
    # The first losses are far above all others.
    lowest = min(ngram_loss, np.nanmin(train_loss), np.nanmin(validation_loss))
    axes.set_ylim(0.9 * lowest, np.nanpercentile(train_loss, 98))
    axes.legend()
    figure.savefig(path, dpi=150)
