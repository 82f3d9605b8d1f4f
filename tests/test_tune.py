"""The tables by which kernels and mechanisms are chosen."""

import json

import jax
import jax.numpy as jnp
import pytest
from eqx_attention import tune
from eqx_attention._kernel import schedule, tuning
from eqx_attention._mechanism import measured


# Left out on the newest jax: what this is about is our own.
pytestmark = pytest.mark.slow


SHAPES = [(1, 64, 2, 64, 64), (1, 64, 2, 256, 256)]


def _sizes(shape, masked):
    request, dout = tune.requests(shape, masked)
    assert dout.shape == (*request.query.shape[:3], shape[-1])
    sizes = tuning.sizes_of(request)
    assert sizes == (*shape[3:], masked)
    return sizes


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("shape", tune.SHAPES, ids=str)
def test_the_tables_tiles_are_candidates(shape, masked):
    sizes = _sizes((1, 64, 1, *shape[3:]), masked)
    tried = tune.candidates(sizes)
    assert tuning.forward_blocks(sizes) in tried["forward"]
    assert tuning.backward_blocks(sizes, False) in tried["backward"]


def test_sizes_that_nobody_measured_have_tiles_that_fit():
    dims = (64, 128, 192, 256)
    for head_dim in dims:
        for value_dim in (x for x in dims if x <= head_dim):
            sizes = tuning.Sizes(head_dim, value_dim, True)
            assert tuning.forward_fits(sizes, tuning.forward_blocks(sizes))
            assert tuning.backward_fits(sizes, tuning.backward_blocks(sizes, True))


def test_tuning_writes_the_fastest(tmp_path, monkeypatch, capsys):
    """With times that are made up: the more keys in flight, the faster."""

    def calls(request, dout, sizes):
        return {
            which: {blocks: lambda stages=blocks.stages: stages for blocks in tried}
            for which, tried in tune.candidates(sizes).items()
        }

    def milliseconds(calls):
        return {blocks: 10.0 - call() for blocks, call in calls.items()}

    monkeypatch.setattr(tune, "calls", calls)
    monkeypatch.setattr(tune, "milliseconds", milliseconds)
    monkeypatch.setattr(tune, "SHAPES", SHAPES)
    monkeypatch.setattr(tune, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    out = tmp_path / "tuning.json"
    before = tuning.TABLE.read_text()
    tune.main(["--head-dim", "64", "--out", str(out)])
    assert tuning.TABLE.read_text() == before
    assert capsys.readouterr().out.count("ms\n") > 10
    monkeypatch.setattr(tuning, "TABLE", out)
    tuning._measured.cache_clear()
    try:
        narrow, wide = (tuning.Sizes(x, x, True) for x in (64, 256))
        assert tuning.forward_blocks(narrow).stages == 3
        assert tuning.backward_blocks(narrow, True).stages == 3
        assert tuning.backward_blocks(narrow, True).in_order
        rows = json.loads(before)["forward"]
        (row,) = (x for x in rows if tuning.Sizes(**x["sizes"]) == wide)
        assert tuning.forward_blocks(wide)._asdict() == row["blocks"]
    finally:
        tuning._measured.cache_clear()


def test_tuning_needs_a_gpu(capsys):
    with pytest.raises(SystemExit):
        tune.main([])
    assert "expected a Hopper GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("length", "head_dim", "masked", "shape"),
    (
        (8192, 128, True, [2, 8192, 16, 16, 128]),
        (100, 128, False, [8, 2048, 16, 16, 128]),
        (10**6, 100, True, [1, 131072, 16, 16, 128]),
        (4096, 64, True, [4, 4096, 32, 32, 64]),
        (4096, 250, False, [2, 4096, 8, 8, 256]),
    ),
)
def test_what_is_most_like_a_call(length, head_dim, masked, shape):
    row = measured.nearest(length, head_dim, masked)
    assert (row["shape"], row["masked"]) == (shape, masked)


def test_the_faster_mechanism():
    request, _ = tune.requests((1, 64, 2, 128, 128), True)
    ms = measured.nearest(64, 128, True)["ms"]
    name, why = measured.faster(request)
    assert ms[name] == min(ms.values())
    assert f"{min(ms.values()):.2f} ms" in why and f"{max(ms.values()):.2f}" in why


def test_pieces_go_to_the_first_that_is_free():
    costs = jnp.asarray([5, 4, 3, 3, 2, 2, 1])
    found = schedule._in_turn(costs.tolist(), 3)
    assert found.pieces is not None and found.counts is not None
    table = [found.pieces[n, :count].tolist() for n, count in enumerate(found.counts)]
    assert table == [[0, 5], [1, 4, 6], [2, 3]]
    assert schedule._in_turn([1, 1], 3).programs == 2
