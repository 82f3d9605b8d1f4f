from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from beartype import beartype
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Int32, jaxtyped

from .._axes import ceil_div
from .._keys import EightBits, flat, Keys, Paged
from .._mask import AbstractMask, Padding
from .base import AbstractCache
from .checks import (
    CacheFull,
    check_buffers,
    check_fits,
    check_int32,
    check_new,
    check_sizes,
    is_full,
    Messages,
    num_added,
)
from .pages import (
    allocate,
    copy_pages,
    count_references,
    flat_rows,
    OutOfPages,
    write_tokens,
)
from .write import along


_NO_PAGE = "PagedCache: table names no page for tokens that length says are there."


class PagedCache(AbstractCache):
    """A cache whose sequences take memory by the page, from a pool that they share.

    A sequence is given a page when it has filled the one before, so that memory is for
    the tokens there are and not for `capacity`. Sequences that `fork` made from one share
    its pages, and one that appends to a page that others hold too gets a copy of it first.

    All shapes are fixed, and the pool belongs to all sequences of the batch: give `append`
    and `attend` whole batches. (Under `jax.vmap`, each element that is mapped over has a
    pool of its own, as if by `jax.vmap` of `init` too.)

    !!! Example

        ```python
        import eqx_attention as eqa
        import jax.numpy as jnp

        # Room for 16 pages, of the 3 * 64 that three full sequences would take.
        cache = eqa.PagedCache.init(
            1024, num_kv_heads=2, head_dim=64, page_size=16, num_pages=16, batch=(1,)
        )
        cache = cache.append(jnp.ones((1, 40, 2, 64)), jnp.ones((1, 40, 2, 64)))
        cache = cache.fork(jnp.array([0, 0, 0]))  # Three samples of one prompt.
        cache = cache.append(jnp.ones((3, 1, 2, 64)), jnp.ones((3, 1, 2, 64)))
        cache = cache.free(jnp.array([False, True, False]))  # One of them is done.
        ```

    ??? cite

        [Efficient Memory Management for Large Language Model Serving with
        PagedAttention](https://arxiv.org/abs/2309.06180)

        ```bibtex
        @inproceedings{kwon2023pagedattention,
            author={Kwon, Woosuk and Li, Zhuohan and Zhuang, Siyuan and Sheng, Ying and
                    Zheng, Lianmin and Yu, Cody Hao and Gonzalez, Joseph E. and
                    Zhang, Hao and Stoica, Ion},
            title={Efficient Memory Management for Large Language Model Serving with
                   {PagedAttention}},
            booktitle={ACM Symposium on Operating Systems Principles},
            year={2023},
        }
        ```
    """

    key_: Float[Array, "pages page_size kv_heads head_dim"] | EightBits
    value: Float[Array, "pages page_size kv_heads value_dim"] | EightBits
    table: Int32[Array, "*batch blocks"]
    """The page of each run of `page_size` tokens; -1 if it has none."""
    length: Int32[Array, "*batch"]
    references: Int32[Array, " pages"]
    """How many places of `table` name each page. A page of none is free."""

    def __check_init__(self):
        check_buffers(self, "pages, page_size")
        batch = tuple(self.length.shape)
        check_int32(self, "length", batch)
        check_int32(self, "table", (*batch, *self.table.shape[-1:]))
        check_int32(self, "references", (self.key_.shape[0],))

    @classmethod
    @jaxtyped(typechecker=beartype)
    def init(
        cls,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        page_size: int = 64,
        num_pages: int | None = None,
        batch: tuple[int, ...] = (),
        dtype: DTypeLike = jnp.float32,
    ) -> "PagedCache":
        """Makes an empty cache.

        **Arguments:** as [`eqx_attention.AbstractCache.init`][] (where `capacity` is
        rounded up to whole pages), and:

        - `page_size`: How many tokens a page holds. Defaults to 64. (Keyword only
            argument.)
        - `num_pages`: How many pages there are, for all sequences. Defaults to as many as
            they can ever fill. (Keyword only argument.)

        **Raises:** a `ValueError` if a size is not positive.
        """
        value_dim = head_dim if value_dim is None else value_dim
        blocks = ceil_div(capacity, max(page_size, 1))
        if num_pages is None:
            num_pages = blocks
            for size in batch:
                num_pages = num_pages * size
        check_sizes(
            "PagedCache",
            dtype,
            batch,
            capacity=capacity,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            page_size=page_size,
        )
        check_sizes("PagedCache", dtype, (), num_pages=num_pages)
        shape = (num_pages, page_size, num_kv_heads)
        return cls(
            key_=jnp.zeros((*shape, head_dim), dtype),
            value=jnp.zeros((*shape, value_dim), dtype),
            table=jnp.full((*batch, blocks), -1, jnp.int32),
            length=jnp.zeros(batch, jnp.int32),
            references=jnp.zeros(num_pages, jnp.int32),
        )

    @property
    def page_size(self) -> int:
        return self.key_.shape[1]

    @property
    def capacity(self) -> int:
        """How many tokens of each sequence it can hold, if there are pages."""
        return self.table.shape[-1] * self.page_size

    @property
    def recent(self) -> None:
        return None

    @jax.named_scope("eqa.PagedCache.append")
    @jaxtyped(typechecker=beartype)
    def append(
        self,
        key_: Float[Keys, "*batch n kv_heads head_dim"],
        value: Float[Keys, "*batch n kv_heads value_dim"],
        *,
        lengths: Int[Array, "*#batch"] | None = None,
    ) -> "PagedCache":
        """As [`eqx_attention.AbstractCache.append`][]. If there are too few free pages,
        that is an error at run time too."""
        self._check_unmapped()
        check_new(self, key_, value)
        n = key_.shape[-3]
        check_fits(self.capacity, n)
        length, added = num_added(self, n, lengths)
        if n == 0:
            return self
        full, longest = is_full(self.capacity, length, added)
        start, added = length.reshape(-1), added.reshape(-1)
        plan = allocate(
            flat_rows(self.table), start, added, self.references, self.page_size, n
        )
        # One check of all that may be wrong: on a GPU, each makes the host wait.
        room = CacheFull(self.capacity, n, lengths is not None)
        pages = OutOfPages(self.references.shape[0])
        messages = Messages((room, (_NO_PAGE,), pages))
        missing = self._missing().any()
        numbers = (longest, jnp.zeros_like(longest), plan.num_free)
        wrong = (full, missing, plan.num_needed > plan.num_free)
        table = messages.check(plan.table, wrong, numbers)
        plan = plan._replace(table=table)
        buffers = []
        for pool, new in ((self.key_, key_), (self.value, value)):
            pool = copy_pages(pool, plan)
            buffers.append(write_tokens(pool, flat(new), plan.table, start, added))
        return PagedCache(
            key_=buffers[0],
            value=buffers[1],
            table=plan.table.reshape(self.table.shape),
            length=(start + added).reshape(self.length.shape),
            references=plan.references,
        )

    def keys_values(self) -> tuple[Any, Any, None, AbstractMask]:
        self._check_unmapped()
        missing = self._missing()
        # A new array, which an error that might be need not copy. (On a GPU it makes the
        # host wait for the device, and all that it then has to do takes time.)
        length = jnp.where(missing.any(axis=-1), 0, self.length)
        length = eqx.error_if(length, missing, _NO_PAGE)
        return (
            Paged(self.key_, self.table),
            Paged(self.value, self.table),
            None,
            Padding(length),
        )

    @jaxtyped(typechecker=beartype)
    def fork(self, rows: Int[Array, " new_batch"]) -> "PagedCache":
        """Makes sequences out of those there are: `n` samples that continue one prompt,
        or the beams that a search goes on with. They share pages, and copy none.

        **Arguments:**

        - `rows`: For each new sequence, the number of the old one that it continues. The
            pages of old ones that none continues become free.

        **Returns:**

        A cache of the same pool, with a batch of `len(rows)`.

        **Raises:**

        A `ValueError` if the cache has more than one batch axis (one of none counts as a
        batch of one); an error at run time if there is no such sequence.
        """
        self._check_unmapped()
        if self.length.ndim > 1:
            raise ValueError(
                "PagedCache.fork: expected a cache of one batch axis, got one of batch "
                f"{self.length.shape}."
            )
        table, length = flat_rows(self.table), self.length.reshape(-1)
        size = length.shape[0]
        rows = eqx.error_if(
            rows.astype(jnp.int32),
            (rows < 0) | (rows >= size),
            f"PagedCache.fork: rows must be in [0, {size}), the number of sequences.",
        )
        return self._of(table[rows], length[rows])

    @jaxtyped(typechecker=beartype)
    def free(self, where: Bool[Array, "*batch"]) -> "PagedCache":
        """Empties sequences, and frees those of their pages that no other holds.

        **Arguments:**

        - `where`: Which sequences.

        **Returns:**

        A cache of the same shapes, in which these sequences have a length of zero.
        """
        self._check_unmapped()
        table = jnp.where(where[..., None], -1, self.table)
        return self._of(table, jnp.where(where, 0, self.length))

    def _of(self, table: Array, length: Array) -> "PagedCache":
        references = count_references(table, self.references.shape[0])
        return PagedCache(self.key_, self.value, table, length, references)

    def _missing(self) -> Bool[Array, "*batch blocks"]:
        """Where a token that there is would be on a page that there is not."""
        first = along(jnp.zeros_like(self.length), self.table.shape[-1], self.page_size)
        unknown = (self.table < 0) | (self.table >= self.references.shape[0])
        return (first < self.length[..., None]) & unknown

    def _check_unmapped(self) -> None:
        if self.key_.ndim != 4 or self.references.ndim != 1:
            raise TypeError(
                "PagedCache: the pool of pages must not be mapped over as if it had the "
                "batch axes: use a cache whose leaves all have the mapped axis (of "
                "`jax.vmap` of `init`), or append to whole batches."
            )
