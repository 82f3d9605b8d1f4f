from typing import Any

import equinox as eqx
from jaxtyping import Array, Float

from ._describe import config_from_json, config_to_json
from ._distributed import as_sharding, Sharding
from ._mask import AbstractMask, Full
from ._mechanism import AbstractMechanism
from ._options import (
    as_dropout,
    as_dtype,
    as_mask,
    as_precision,
    as_scale,
    as_scores,
    check_options,
)
from ._score import AbstractScore
from ._static import pdoc, unwrap


class AttentionConfig(eqx.Module):
    """The options of attention, as a value: frozen, comparable, and written as JSON.

    ```python
    config = eqa.AttentionConfig(mask=eqa.Causal() & eqa.SlidingWindow(255))
    assert eqa.AttentionConfig.from_json(config.to_json()) == config
    attention = eqa.Attention.from_config(config)
    ```

    `dataclasses.replace(config, dropout=0.1)` is one that differs in a field.
    """

    mechanism: str | AbstractMechanism = eqx.field(static=True)
    mask: AbstractMask
    score: tuple[AbstractScore, ...]
    scale: float | int | Float[Array, "..."] | None
    dropout: float = eqx.field(static=True)
    precision: str | None = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)
    sharding: Sharding | None = eqx.field(static=True)

    def __init__(
        self,
        mechanism: str | AbstractMechanism = "auto",
        mask: Any = Full(),
        score: Any = (),
        scale: Any = None,
        dropout: float | int = 0.0,
        precision: Any = None,
        dtype: Any = None,
        sharding: Sharding | None = None,
    ):
        """**Arguments:** as [`eqx_attention.Attention`][], with the same defaults and the
        same errors, which come here, not later."""
        self.mechanism = mechanism
        self.mask = as_mask(mask)
        self.score = as_scores(score)
        self.scale = unwrap(as_scale(scale))
        self.dropout = as_dropout(dropout)
        self.precision = as_precision(precision)
        self.dtype = as_dtype(dtype)
        self.sharding = as_sharding(sharding)

    def __check_init__(self):
        check_options(self)

    def to_json(self) -> str:
        """The configuration as JSON, on several lines, to be read and changed by people.

        **Raises:** `ValueError` if it holds arrays or functions, naming the field.
        """
        return config_to_json(self)

    @staticmethod
    def from_json(text: str) -> "AttentionConfig":
        """Reads what `to_json` wrote.

        **Raises:** `ValueError` if it is not JSON, was written by a newer version, or has
            an unknown, missing or wrong field, naming it.
        """
        return config_from_json(text)

    __pdoc__ = pdoc
