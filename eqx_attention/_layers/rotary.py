import math
from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from beartype import beartype
from jaxtyping import Array, Float, Int, jaxtyped


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


def _unscaled(rotary_dim: int, theta: float) -> np.ndarray:
    return theta ** -(np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)


def _check_positive(scaling: AbstractRotaryScaling, *names: str) -> None:
    for name in names:
        x = getattr(scaling, name)
        if not (math.isfinite(x) and x > 0):
            where = f"{type(scaling).__name__}: {name}"
            raise ValueError(f"{where} must be a positive number; got {x}.")


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
        _check_positive(self, "factor")

    def frequencies(self, rotary_dim: int, theta: float) -> np.ndarray:
        return _unscaled(rotary_dim, theta) / self.factor

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
        _check_positive(self, "factor")

    def frequencies(self, rotary_dim: int, theta: float) -> np.ndarray:
        if rotary_dim == 2:
            # The one frequency is the highest.
            return _unscaled(rotary_dim, theta)
        growth = self.factor ** (rotary_dim / (rotary_dim - 2))
        return _unscaled(rotary_dim, theta * growth)

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
        _check_positive(self, "factor", "original_length", "beta_fast", "beta_slow")
        if self.attention_factor is not None:
            _check_positive(self, "attention_factor")
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
        frequencies = _unscaled(rotary_dim, theta)
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
        _check_positive(self, "factor", "low_freq_factor", "high_freq_factor")
        _check_positive(self, "original_length")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                "Llama3Scaling: high_freq_factor must be above low_freq_factor; got "
                f"high_freq_factor={self.high_freq_factor} and "
                f"low_freq_factor={self.low_freq_factor}."
            )

    def frequencies(self, rotary_dim: int, theta: float) -> np.ndarray:
        low, high = self.low_freq_factor, self.high_freq_factor
        frequencies = _unscaled(rotary_dim, theta)
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


# The angle is the sum of those of the position's four bytes, each reduced to one turn.
# In float32 it then is right to about 1e-4 radians even a million tokens in, where
# the product of a float32 position and a float32 frequency is wrong by 0.06.
_num_bytes = 4


def _cos_sin(
    positions: Int[Array, "*batch seq"], frequencies: np.ndarray, dtype
) -> tuple[Float[Array, "*batch seq half_dim"], Float[Array, "*batch seq half_dim"]]:
    positions = positions.astype(jnp.int32)[..., None]
    turns = jnp.zeros((*positions.shape[:-1], frequencies.size), dtype)
    for i in range(_num_bytes):
        byte = positions >> (8 * i)
        if i != _num_bytes - 1:  # The last one keeps the sign.
            byte = byte & 255
        step = np.remainder(frequencies * (256.0**i / (2 * math.pi)), 1.0)
        step = jnp.asarray(np.where(step > 0.5, step - 1, step), dtype)
        step = step.reshape((1,) * (positions.ndim - 1) + step.shape)
        turn = byte.astype(dtype) * step
        turns = turns + (turn - jnp.round(turn))
    angles = (turns - jnp.round(turns)) * jnp.asarray(2 * math.pi, dtype)
    return jnp.cos(angles), jnp.sin(angles)


class RotaryEmbedding(eqx.Module):
    r"""Rotary position embedding: pairs of channels of a head are rotated by an angle
    proportional to the token's position, so that the inner product of a query and a key
    depends on the difference of their positions alone.

    $$\begin{pmatrix} x_i \\ x_{i + d/2} \end{pmatrix} \mapsto
      \begin{pmatrix} \cos p\omega_i & -\sin p\omega_i \\
                      \sin p\omega_i & \cos p\omega_i \end{pmatrix}
      \begin{pmatrix} x_i \\ x_{i + d/2} \end{pmatrix}, \qquad
      \omega_i = \theta^{-2i/d}$$

    Positions are given explicitly, which makes caches, packed documents and permuted
    layouts right by construction. Nothing is cached: frequencies are constants of the
    traced program. Angles are computed in float32 (float64 for float64 input), and stay
    accurate at positions in the millions. There is nothing to train.

    !!! Example

        ```python
        import eqx_attention as eqa
        import jax.numpy as jnp

        scaling = eqa.Llama3Scaling(factor=8.0)
        rotary = eqa.RotaryEmbedding(64, theta=500_000.0, scaling=scaling)
        rotated = rotary(jnp.ones((16, 4, 64)), jnp.arange(16))
        ```

    ??? cite

        [RoFormer: Enhanced Transformer with Rotary Position
        Embedding](https://arxiv.org/abs/2104.09864)

        ```bibtex
        @article{su2021roformer,
            author={Su, Jianlin and Lu, Yu and Pan, Shengfeng and Murtadha, Ahmed and
                    Wen, Bo and Liu, Yunfeng},
            title={{RoFormer}: Enhanced Transformer with Rotary Position Embedding},
            journal={arXiv:2104.09864},
            year={2021},
        }
        ```
    """

    head_dim: int = eqx.field(static=True)
    theta: float = eqx.field(static=True)
    scaling: AbstractRotaryScaling | None
    interleaved: bool = eqx.field(static=True)
    fraction: float = eqx.field(static=True)

    @jaxtyped(typechecker=beartype)
    def __init__(
        self,
        head_dim: int,
        theta: float | int = 10_000.0,
        scaling: AbstractRotaryScaling | None = None,
        interleaved: bool = False,
        fraction: float | int = 1.0,
    ):
        """**Arguments:**

        - `head_dim`: The number of channels of a head.
        - `theta`: The base of the frequencies: the larger, the slower they turn.
        - `scaling`: Changes the frequencies for contexts longer than those of the
            training: [`eqx_attention.LinearScaling`][],
            [`eqx_attention.NTKScaling`][], [`eqx_attention.YaRNScaling`][] or
            [`eqx_attention.Llama3Scaling`][]. Defaults to none.
        - `interleaved`: If `False` then channel `i` is paired with channel
            `i + head_dim / 2` (as GPT-NeoX, Llama in Hugging Face's layout, and
            `equinox.nn.RotaryPositionalEmbedding`). If `True` then channel `2i` is
            paired with channel `2i + 1` (as the paper, GPT-J, and Llama in Meta's
            layout).
        - `fraction`: The fraction of the channels, from the first on, that is rotated.
            The others pass unchanged.

        **Raises:**

        A `ValueError` if `theta` is not greater than 1, if `fraction` is not in (0, 1],
        or if `head_dim * fraction` is not a positive even whole number.
        """
        if not (math.isfinite(theta) and theta > 1):
            raise ValueError(f"RotaryEmbedding: theta must be greater than 1; got {theta}.")
        if not 0 < fraction <= 1:
            raise ValueError(
                f"RotaryEmbedding: fraction must be in (0, 1]; got {fraction}."
            )
        rotary_dim = round(head_dim * fraction)
        exact = math.isclose(rotary_dim, head_dim * fraction)
        if rotary_dim <= 0 or rotary_dim % 2 != 0 or not exact:
            raise ValueError(
                "RotaryEmbedding: head_dim * fraction must be a positive even whole "
                f"number; got head_dim={head_dim} and fraction={fraction}."
            )
        self.head_dim = head_dim
        self.theta = float(theta)
        self.scaling = scaling
        self.interleaved = interleaved
        self.fraction = float(fraction)

    @property
    def rotary_dim(self) -> int:
        """How many channels are rotated."""
        return round(self.head_dim * self.fraction)

    @jax.named_scope("eqa.RotaryEmbedding")
    @jaxtyped(typechecker=beartype)
    def __call__(
        self,
        x: Float[Array, "*batch seq heads head_dim"],
        positions: Int[Array, "*#batch seq"],
    ) -> Float[Array, "*batch seq heads head_dim"]:
        """**Arguments:**

        - `x`: Query heads or key heads, of shape `(*batch, seq, heads, head_dim)`.
        - `positions`: The position of every token: integers, negative ones too, of a
            shape that broadcasts to `(*batch, seq)`.

        **Returns:**

        An array of the shape and dtype of `x`.

        **Raises:**

        A `TypeError` if `x` or `positions` has a wrong rank, axis or dtype, or if the
        last axis of `x` is not the module's `head_dim`.
        """
        if x.shape[-1] != self.head_dim:
            raise TypeError(
                "RotaryEmbedding: x must have shape "
                f"(*batch, seq, heads, {self.head_dim}); got {x.shape}."
            )
        dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
        if self.scaling is None:
            frequencies, magnitude = _unscaled(self.rotary_dim, self.theta), 1.0
        else:
            frequencies = self.scaling.frequencies(self.rotary_dim, self.theta)
            magnitude = self.scaling.magnitude()
        missing_axes = x.ndim - 2 - positions.ndim
        positions = positions.reshape((1,) * missing_axes + positions.shape)
        # [*batch, seq, 1, rotary_dim / 2]: the same for every head.
        cos, sin = _cos_sin(positions, frequencies, dtype)
        cos = cos[..., None, :] * jnp.asarray(magnitude, dtype)
        sin = sin[..., None, :] * jnp.asarray(magnitude, dtype)

        rotated = x[..., : self.rotary_dim].astype(dtype)
        unchanged = x[..., self.rotary_dim :]
        if self.interleaved:
            first, second = rotated[..., 0::2], rotated[..., 1::2]
        else:
            first, second = jnp.split(rotated, 2, axis=-1)
        pair = (first * cos - second * sin, second * cos + first * sin)
        if self.interleaved:
            rotated = jnp.stack(pair, axis=-1).reshape(rotated.shape)
        else:
            rotated = jnp.concatenate(pair, axis=-1)
        rotated = rotated.astype(x.dtype)
        return jnp.concatenate([rotated, unchanged], axis=-1)
