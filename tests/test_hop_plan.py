"""The plan of a ring's hops, against each pair of tokens; no device is needed."""

import eqx_attention as eqa
import jax.numpy as jnp
import numpy as np
import pytest
from eqx_attention._distributed.layout import chunks_of
from eqx_attention._distributed.plan import halves, level, parts, plan, Side, Step
from eqx_attention._tokens import Tile


# Left out on the newest jax: what this is about is our own.
pytestmark = pytest.mark.slow


MASKS = {
    "full": eqa.Full(),
    "causal": eqa.Causal(),
    "causal_offset": eqa.Causal(-3),
    "window": eqa.Causal() & eqa.SlidingWindow(5),
    "both_sides": eqa.SlidingWindow(3, 4),
    "chunked": eqa.Chunked(7),
    "prefix_lm": eqa.PrefixLM(9),
    "not": ~eqa.Causal(),
    "nothing": eqa.Prefix(0),
    "padded": eqa.Causal() & eqa.Padding(19),
    "array": eqa.Causal() & eqa.Padding(jnp.full((1, 1, 1), 19)),
}


def sides(layout: str, n: int, q_len: int, kv_len: int, shift: int | None = 0):
    chunks = chunks_of(layout, n)
    count = n * len(chunks[0])
    return Side(chunks, q_len // count, shift), Side(chunks, kv_len // count, 0)


def tile(q_index, kv_index, q_shift: int) -> Tile:
    q, kv = (np.asarray(x, np.int32) for x in (q_index, kv_index))
    q, kv = q.reshape(1, -1, 1), kv.reshape(1, 1, -1)
    arrays = (q, kv, q + q_shift, kv, np.zeros((1, 1, 1), np.int32))
    return Tile(*map(jnp.asarray, arrays))


def visible(mask, at: Tile):
    shape = (at.q_index.shape[1], at.kv_index.shape[2])
    return np.broadcast_to(np.asarray(mask.visible(at))[0], shape)


def found_by(steps, mask, q, kv, q_index, kv_index) -> np.ndarray:
    """What steps compute, as the mechanism that computes them is told to."""
    out = np.zeros((len(q_index), len(kv_index)), int)
    for step in steps:
        if step is None:
            continue
        rows, columns = slice(*step.query), slice(*step.key)
        at = tile(q_index[rows], kv_index[columns], q.shift)
        if step.shift is not None:
            counted = (np.arange(b - a) for a, b in (step.query, step.key))
            counted = tile(*counted, step.shift)
            positions = (counted.q_position, counted.kv_position)
            at = at._replace(q_position=positions[0], kv_position=positions[1])
        kept = [visible(parts(mask)[n], at) for n in step.kept]
        whole = np.ones((at.q_index.shape[1], at.kv_index.shape[2]), bool)
        out[rows, columns] += np.logical_and.reduce([whole, *kept])
    return out


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("name", list(MASKS))
def test_steps_compute_each_visible_pair_once(name, layout):
    mask = MASKS[name]
    for n, lengths, shift in ((1, (8, 8), 0), (3, (24, 24), 0), (4, (16, 32), 5)):
        q, kv = sides(layout, n, *lengths, shift)
        own = [np.asarray(q.indices(r, (0, q.length))) for r in range(n)]
        others = [np.asarray(kv.indices(r, (0, kv.length))) for r in range(n)]
        plans = [plan(mask, (), q, kv, shifts=shifts) for shifts in (True, False)]
        for found in (*plans, level(plans[0], mask)):
            hops = {hop.shift: hop for hop in found.hops}
            for r in range(n):
                for s in range(n):
                    q_index, kv_index = own[r], others[(r - s) % n]
                    expected = visible(mask, tile(q_index, kv_index, shift))
                    step = hops[s].steps[hops[s].which[r]] if s in hops else None
                    both = halves(step, mask)
                    for steps in ([step], both):
                        got = found_by(steps, mask, q, kv, q_index, kv_index)
                        np.testing.assert_array_equal(got, expected)
                    if step is not None:
                        assert hops[s].keys[0] <= step.key[0]
                        assert step.key[1] <= hops[s].keys[1]


def test_causal_is_balanced_in_zigzag():
    for n in (2, 3, 8):
        contiguous = plan(eqa.Causal(), (), *sides("contiguous", n, 1024 * n, 1024 * n))
        zigzag = plan(eqa.Causal(), (), *sides("zigzag", n, 1024 * n, 1024 * n))
        assert contiguous.uniform and zigzag.uniform
        assert zigzag.imbalance < 1.001
        assert abs(contiguous.imbalance - (2 * n - 1) / n) < 0.1
        half = 512
        for hop in zigzag.hops[1:]:
            # No mask, and equal work: all queries by half of the keys, or the converse.
            assert len(hop.steps) == 2
            for step in hop.steps:
                assert step is not None and step.kept == ()
                sizes = [b - a for a, b in (step.query, step.key)]
                assert sorted(sizes) == [half, 2 * half]
        # The order of a device's own tokens is that of the sequence.
        for one in (contiguous, zigzag):
            (step,) = one.hops[0].steps
            assert step == ((0, 1024), (0, 1024), (0,), 0)
        assert contiguous.hops[1].steps == (None, ((0, 1024), (0, 1024), (), 0))


def test_windows_reach_over_few_hops_and_few_keys():
    length, n = 32768, 4
    mask = eqa.Causal() & eqa.SlidingWindow(4095)
    found = plan(mask, (), *sides("contiguous", n, n * length, n * length))
    assert [hop.shift for hop in found.hops] == [0, 1]
    assert not found.uniform
    hop = found.hops[1]
    assert hop.keys == (length - 4096, length)
    assert hop.steps == (None, ((0, 4096), (length - 4096, length), (1,), 4096))
    # To both sides: the devices before and after.
    both = plan(eqa.SlidingWindow(100, 100), (), *sides("contiguous", 5, 5000, 5000))
    assert [hop.shift for hop in both.hops] == [0, 1, 4]


def test_what_is_not_known_is_computed():
    q, kv = sides("zigzag", 3, 24, 24)
    documents = eqa.Segments(jnp.zeros(24, jnp.int32))
    found = plan(eqa.Causal() & documents, (), q, kv)
    # That it is causal is known: the segments are left, for the tokens that may be seen.
    assert all(s is not None and s.kept == (1,) for h in found.hops[1:] for s in h.steps)
    assert all(s.shift == 0 for h in found.hops for s in h.steps if s is not None)
    given = plan(eqa.Causal(), (), q._replace(shift=None), kv)
    assert all(h.steps == (((0, 8), (0, 8), (0,), None),) for h in given.hops)


def test_scores_of_distances_may_count_positions():
    q, kv = sides("contiguous", 3, 24, 24)
    alibi = (eqa.ALiBi.standard(2), eqa.SoftCap(3.0))
    found = plan(eqa.Full(), alibi, q, kv)
    shifts = [sorted(s.shift for s in hop.steps if s) for hop in found.hops]
    assert shifts == [[0], [-16, 8], [-8, 16]]
    loose = plan(eqa.Full(), alibi, q, kv, shifts=False)
    assert {s.shift for hop in loose.hops for s in hop.steps if s} == {None}
    fn = eqa.ScoreFn(lambda logit, q, kv, head, a, b, c: logit + q.astype(logit.dtype))
    absolute = plan(eqa.Full(), (fn,), q, kv)
    assert {s.shift for hop in absolute.hops for s in hop.steps if s} == {None}


def test_layouts_are_permutations():
    x = np.arange(24).reshape(2, 12)
    laid = eqa.to_layout(x, 3)
    assert laid[0].tolist() == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    np.testing.assert_array_equal(eqa.from_layout(laid, 3), x)
    np.testing.assert_array_equal(eqa.to_layout(x, 3, "contiguous"), x)
    turned = eqa.to_layout(x.T, 3, axis=0)
    np.testing.assert_array_equal(turned.T, laid)
    with pytest.raises(ValueError, match=r"to_layout\(x\): .* multiple of 8 .* got 12"):
        eqa.to_layout(x, 4)
    with pytest.raises(ValueError, match=r"from_layout\(n\): .* at least 1"):
        eqa.from_layout(x, 0)
    with pytest.raises(ValueError, match=r"to_layout\(axis\): .* got 2"):
        eqa.to_layout(x, 3, axis=2)


def test_all_devices_do_the_same():
    q, kv = sides("zigzag", 4, 64, 64)
    found = plan(eqa.Causal(), (), q, kv)
    assert [len(hop.steps) for hop in found.hops] == [1, 2, 2, 2]
    assert [hop.steps for hop in level(found, eqa.Causal()).hops[1:]] == 3 * [
        (Step((0, 16), (0, 16), (0,), None),)
    ]
