"""From equinox's layer to ours."""

import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from beartype import beartype
from jaxtyping import jaxtyped

from .checks import check_dropout, check_linear
from .multihead import MultiheadAttention


_PROJECTIONS = ("query_proj", "key_proj", "value_proj", "output_proj")


@jaxtyped(typechecker=beartype)
def from_equinox(module: eqx.nn.MultiheadAttention) -> MultiheadAttention:
    """Makes an [`eqx_attention.MultiheadAttention`][] of equinox's, with its parameters.

    JAX arrays of real floating-point numbers, and boolean masks, can be passed to both, and
    give the same output and gradients, but for the bits of dropout and for queries that see
    no key: these give 0 here, and the mean of the values there. Other inputs that equinox
    takes are a `TypeError` here: NumPy arrays (but for masks), integers, complex numbers.

    What is in the place of the parameters is taken as it is: arrays, those of layers that
    are stacked for a scan, `jax.ShapeDtypeStruct`s, or `None` where `equinox.filter` left
    it. So the state of an optimiser can be taken over in the same way as the model.

    !!! Example

        ```python
        import equinox as eqx
        import eqx_attention as eqa
        import jax
        import jax.numpy as jnp
        import jax.random as jr

        mha = eqx.nn.MultiheadAttention(num_heads=8, query_size=64, key=jr.key(0))
        ours = eqa.from_equinox(mha)
        x = jnp.ones((10, 64))
        assert jnp.allclose(ours(x, x, x), mha(x, x, x), atol=1e-6)

        # From here on it may attend as only ours does.
        config = eqa.AttentionConfig("blockwise", mask=eqa.Causal())
        ours = eqx.tree_at(lambda m: m.config, ours, config)
        ```

    **Arguments:**

    - `module`: An `equinox.nn.MultiheadAttention`. Its projections may have been
        replaced by other `equinox.nn.Linear`s of the same sizes.

    **Returns:**

    An [`eqx_attention.MultiheadAttention`][] that attends by the defaults of
    [`eqx_attention.AttentionConfig`][], with the module's sizes, parameters, rate of
    dropout, and whether that is off.

    **Raises:**

    A `TypeError` if it is something else, a subclass included, if a part of it was
    replaced by something else, or if a parameter is complex; a `ValueError` if a
    projection has not the sizes that the module says, or the rate of dropout is not in
    [0, 1). They name the part.
    """
    if type(module) is not eqx.nn.MultiheadAttention:
        _refuse("module", "an equinox.nn.MultiheadAttention, and no subclass", module)
    for name in _PROJECTIONS:
        _check_linear(f"module.{name}", getattr(module, name))
    check_linear(module, "query_proj", module.query_size, module.num_heads * module.qk_size)
    check_linear(module, "key_proj", module.key_size, module.num_heads * module.qk_size)
    check_linear(module, "value_proj", module.value_size, module.num_heads * module.vo_size)
    check_linear(
        module, "output_proj", module.num_heads * module.vo_size, module.output_size
    )
    if type(module.dropout) is not eqx.nn.Dropout:
        _refuse("module.dropout", "an equinox.nn.Dropout", module.dropout)
    if module.dropout.p is not None:
        check_dropout(module)

    # What is static there is an argument here, and what is not has the same name.
    fields = dataclasses.fields(module)
    static = [f.name for f in fields if f.metadata.get("static", False)]
    parts = [f.name for f in fields if f.name not in static]
    sizes = {name: getattr(module, name) for name in static}
    # No parameters are made, only their shapes.
    ours = eqx.filter_eval_shape(MultiheadAttention, **sizes, key=jr.key(0))
    return eqx.tree_at(
        lambda m: [getattr(m, name) for name in parts],
        ours,
        [getattr(module, name) for name in parts],
    )


def _check_linear(where: str, linear: Any) -> None:
    if not isinstance(linear, eqx.nn.Linear):
        _refuse(where, "an equinox.nn.Linear", linear)
    shapes = dict(weight=(linear.out_features, linear.in_features))
    shapes |= dict(bias=(linear.out_features,))
    for name, shape in shapes.items():
        leaf = getattr(linear, name)
        got = getattr(leaf, "shape", None)
        if got is not None and got[-len(shape) :] != shape:
            raise ValueError(f"{where}.{name}: expected shape {shape}, got {got}.")
        if jnp.issubdtype(getattr(leaf, "dtype", jnp.float32), jnp.complexfloating):
            raise TypeError(f"{where}.{name}: expected real numbers, got {leaf.dtype}.")


def _refuse(where: str, expected: str, got: Any) -> None:
    raise TypeError(f"{where}: expected {expected}; got {type(got).__name__}.")
