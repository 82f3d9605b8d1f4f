class UnsupportedError(NotImplementedError):
    """A mechanism was asked for something it does not do.

    The message lists the reasons and the mechanisms that can. Nothing is ever dropped
    in silence: the alternative to this error is the right answer.
    """


class SerialisationError(ValueError):
    """A file given to [`eqx_attention.load`][] is not one that can be read.

    The message says which: truncated, corrupted, foreign, or written by a newer
    version.
    """


class ShapeError(TypeError, ValueError):
    """Two arguments that are each well-formed disagree about an axis or a dtype.

    It is a `TypeError`, as every wrong rank, axis or dtype is; and a `ValueError`, as
    failed broadcasting is throughout JAX and NumPy.
    """
