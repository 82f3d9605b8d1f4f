import eqx_attention as eqa
import jax.numpy as jnp
import pytest


# Left out on the newest jax: what this is about is our own.
pytestmark = pytest.mark.slow


def test_text():
    text = eqa.visualise(eqa.Causal() & eqa.SlidingWindow(1), 3, 4)
    assert text.splitlines() == ["█···", "██··", "·██·"]
    assert eqa.visualise(eqa.Causal(), 2, 4, q_positions="end") == "███·\n████"


def test_long_sequences_are_drawn_in_cells():
    lines = eqa.visualise(eqa.Causal(), 100, 100, width=10).splitlines()
    assert len(lines) == 10 and lines[0] == "▒" + 9 * "·" and lines[9] == 9 * "█" + "▒"


def test_heads_and_batch():
    mask = eqa.Dense(jnp.array([[[True, False]], [[False, True]]]))
    assert eqa.visualise(mask, 1, 2, head=1) == "·█"
    mask = eqa.Padding(jnp.array([1, 2]))
    assert [eqa.visualise(mask, 1, 3, batch=n) for n in (0, 1)] == ["█··", "██·"]
    by_head = eqa.Predicate(lambda q, k, head, *_: k <= head)
    assert eqa.visualise(by_head, 1, 3, num_heads=2, head=1) == "██·"
    with pytest.raises(ValueError, match="num_heads"):
        eqa.visualise(by_head, 1, 3)


def test_picture(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    figure, ax = plt.subplots()
    assert eqa.visualise(eqa.Causal(), 8, 8, ax=ax) is ax
    assert ax.images[0].get_array().sum() == 36
    figure.savefig(tmp_path / "mask.png")
    plt.close(figure)
