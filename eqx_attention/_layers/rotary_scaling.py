import math
from abc import abstractmethod

import equinox as eqx
import numpy as np

from .checks import check_positive


class AbstractRotaryScaling(eqx.Module):
    """How the frequencies of a [`eqx_attention.RotaryEmbedding`][] are changed, so that
    a model reads contexts longer than those it was trained on.

    All numbers are static and positive. What a scaling returns is computed on the host,
    in double precision, while the program is traced.
    """

    @abstractmethod
    def frequencies(self, rotary_dim: int, theta: float) -> np.ndarray:
        """The `rotary_dim / 2` angular frequencies, in radians a position, in float64.

        **Arguments:**

        - `rotary_dim`: How many channels of a head are rotated (an even number).
        - `theta`: The base of the unscaled frequencies.
        """

    @abstractmethod
    def magnitude(self) -> float:
        """By what rotated channels are multiplied, in queries and in keys alike."""


def unscaled(rotary_dim: int, theta: float) -> np.ndarray:
    """The angular frequencies of the paper, as `AbstractRotaryScaling.frequencies`."""
    return theta ** -(np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)


class LinearScaling(AbstractRotaryScaling):
    r"""Position interpolation: every frequency is divided by `factor`, as if all
    positions were.

    $$\omega_i' = \omega_i / s$$

    ??? cite

        [Extending Context Window of Large Language Models via Positional
        Interpolation](https://arxiv.org/abs/2306.15595)

        ```bibtex
        @article{chen2023extending,
            author={Chen, Shouyuan and Wong, Sherman and Chen, Liangjian and
                    Tian, Yuandong},
            title={Extending Context Window of Large Language Models via Positional
                   Interpolation},
            journal={arXiv:2306.15595},
            year={2023},
        }
        ```
    """

    factor: float | int = eqx.field(static=True)

    def __check_init__(self):
        check_positive(self, "factor")

    def frequencies(self, rotary_dim: int, theta: float) -> np.ndarray:
        return unscaled(rotary_dim, theta) / self.factor

    def magnitude(self) -> float:
        return 1.0


LinearScaling.__init__.__doc__ = """**Arguments:**

- `factor`: How many times longer the context becomes.

**Raises:** a `ValueError` if it is not a positive number.
"""


class NTKScaling(AbstractRotaryScaling):
    r"""NTK-aware interpolation: the base grows, so that the highest frequency stays and
    the lowest is divided by `factor`.

    $$\theta' = \theta s^{d / (d - 2)}$$

    ??? cite

        Proposed by the user bloc97 as "NTK-Aware Scaled RoPE" (2023); described in
        section 3.1 of [YaRN: Efficient Context Window Extension of Large Language
        Models](https://arxiv.org/abs/2309.00071).
    """

    factor: float | int = eqx.field(static=True)

    def __check_init__(self):
        check_positive(self, "factor")

    def frequencies(self, rotary_dim: int, theta: float) -> np.ndarray:
        if rotary_dim == 2:
            # The one frequency is the highest.
            return unscaled(rotary_dim, theta)
        growth = self.factor ** (rotary_dim / (rotary_dim - 2))
        return unscaled(rotary_dim, theta * growth)

    def magnitude(self) -> float:
        return 1.0


NTKScaling.__init__.__doc__ = """**Arguments:**

- `factor`: By how much the lowest frequency is divided.

**Raises:** a `ValueError` if it is not a positive number.
"""


class YaRNScaling(AbstractRotaryScaling):
    r"""YaRN: frequencies that turn more than `beta_fast` times within the original
    context stay, those that turn less than `beta_slow` times are divided by `factor`,
    and a linear ramp over the channels joins the two. Rotated channels are multiplied
    by $0.1 \ln s + 1$, which sharpens the softmax.

    The ends of the ramp are rounded outwards to whole channels, as in the authors' code
    and thus as released models were trained.

    ??? cite

        [YaRN: Efficient Context Window Extension of Large Language
        Models](https://arxiv.org/abs/2309.00071)

        ```bibtex
        @inproceedings{peng2024yarn,
            author={Peng, Bowen and Quesnelle, Jeffrey and Fan, Honglu and
                    Shippole, Enrico},
            title={{YaRN}: Efficient Context Window Extension of Large Language Models},
            booktitle={International Conference on Learning Representations},
            year={2024},
        }
        ```
    """

    factor: float | int = eqx.field(static=True)
    original_length: int = eqx.field(static=True)
    beta_fast: float | int = eqx.field(static=True, default=32.0)
    beta_slow: float | int = eqx.field(static=True, default=1.0)
    attention_factor: float | int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_positive(self, "factor", "original_length", "beta_fast", "beta_slow")
        if self.attention_factor is not None:
            check_positive(self, "attention_factor")
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                "YaRNScaling: beta_fast must be at least beta_slow; got "
                f"beta_fast={self.beta_fast} and beta_slow={self.beta_slow}."
            )

    def frequencies(self, rotary_dim: int, theta: float) -> np.ndarray:
        def channel(turns: float | int) -> float:
            # The one that turns so many times within the original context.
            length = self.original_length / (2 * math.pi * turns)
            return rotary_dim * math.log(length) / (2 * math.log(theta))

        low = max(math.floor(channel(self.beta_fast)), 0)
        high = min(math.ceil(channel(self.beta_slow)), rotary_dim - 1)
        # If low == high, then the ramp is a step.
        ramp = (np.arange(rotary_dim // 2) - low) / max(high - low, 0.001)
        ramp = np.clip(ramp, 0, 1)
        frequencies = unscaled(rotary_dim, theta)
        return frequencies * (1 - ramp) + frequencies / self.factor * ramp

    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return float(self.attention_factor)
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0


YaRNScaling.__init__.__doc__ = """**Arguments:**

- `factor`: How many times longer the context becomes.
- `original_length`: The length of context that the model was trained on.
- `beta_fast`: Frequencies that turn more often than this within the original context
    are kept.
- `beta_slow`: Frequencies that turn less often than this within the original context
    are divided by `factor`.
- `attention_factor`: By what rotated channels are multiplied. Defaults to
    `0.1 * log(factor) + 1`.

**Raises:** a `ValueError` if a number is not positive, or `beta_fast < beta_slow`.
"""


class Llama3Scaling(AbstractRotaryScaling):
    """The scaling of Llama 3.1: wavelengths above `original_length / low_freq_factor`
    are stretched by `factor`, those below `original_length / high_freq_factor` stay,
    and the frequencies in between are interpolated.

    ??? cite

        [The Llama 3 Herd of Models](https://arxiv.org/abs/2407.21783)

        ```bibtex
        @article{grattafiori2024llama,
            author={Grattafiori, Aaron and others},
            title={The {Llama} 3 Herd of Models},
            journal={arXiv:2407.21783},
            year={2024},
        }
        ```
    """

    factor: float | int = eqx.field(static=True, default=8.0)
    low_freq_factor: float | int = eqx.field(static=True, default=1.0)
    high_freq_factor: float | int = eqx.field(static=True, default=4.0)
    original_length: int = eqx.field(static=True, default=8192)

    def __check_init__(self):
        check_positive(self, "factor", "low_freq_factor", "high_freq_factor")
        check_positive(self, "original_length")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                "Llama3Scaling: high_freq_factor must be above low_freq_factor; got "
                f"high_freq_factor={self.high_freq_factor} and "
                f"low_freq_factor={self.low_freq_factor}."
            )

    def frequencies(self, rotary_dim: int, theta: float) -> np.ndarray:
        low, high = self.low_freq_factor, self.high_freq_factor
        frequencies = unscaled(rotary_dim, theta)
        turns = self.original_length * frequencies / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return frequencies * kept + frequencies / self.factor * (1 - kept)

    def magnitude(self) -> float:
        return 1.0


Llama3Scaling.__init__.__doc__ = """**Arguments:**

- `factor`: By how much the low frequencies are divided.
- `low_freq_factor`: Frequencies that turn less often than this within the original
    context are divided by `factor`.
- `high_freq_factor`: Frequencies that turn more often than this within the original
    context are kept.
- `original_length`: The length of context that the model was trained on.

**Raises:** a `ValueError` if a number is not positive, or
`high_freq_factor <= low_freq_factor`.
"""
