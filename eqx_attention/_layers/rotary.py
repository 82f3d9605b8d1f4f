import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from beartype import beartype
from jaxtyping import Array, Float, Int, jaxtyped

from .._dtype import accumulation_dtype
from .checks import check_positive
from .rotary_scaling import AbstractRotaryScaling, unscaled


# The angle is the sum of those of the position's four bytes, each reduced to one turn.
# In float32 it then is right to about 1e-4 radians even a million tokens in, where
# the product of a float32 position and a float32 frequency is wrong by 0.06.
_NUM_BYTES = 4


def _cos_sin(
    positions: Int[Array, "*batch seq"], frequencies: np.ndarray, dtype
) -> tuple[Float[Array, "*batch seq half_dim"], Float[Array, "*batch seq half_dim"]]:
    positions = positions.astype(jnp.int32)[..., None]
    turns = jnp.zeros((*positions.shape[:-1], frequencies.size), dtype)
    for i in range(_NUM_BYTES):
        byte = positions >> (8 * i)
        if i != _NUM_BYTES - 1:  # The last one keeps the sign.
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
        self.head_dim = head_dim
        self.theta = float(theta)
        self.scaling = scaling
        self.interleaved = interleaved
        self.fraction = float(fraction)

    def __check_init__(self):
        check_positive(self, "head_dim")
        if not 1 < self.theta < math.inf:
            raise ValueError(
                f"RotaryEmbedding: theta must be greater than 1; got {self.theta}."
            )
        if not 0 < self.fraction <= 1:
            raise ValueError(
                f"RotaryEmbedding: fraction must be in (0, 1]; got {self.fraction}."
            )
        exact = math.isclose(self.rotary_dim, self.head_dim * self.fraction)
        if self.rotary_dim == 0 or self.rotary_dim % 2 != 0 or not exact:
            raise ValueError(
                "RotaryEmbedding: head_dim * fraction must be a positive even whole "
                f"number; got head_dim={self.head_dim} and fraction={self.fraction}."
            )

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
        dtype = accumulation_dtype(x.dtype)
        if self.scaling is None:
            frequencies, magnitude = unscaled(self.rotary_dim, self.theta), 1.0
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
