"""What the benchmarks make of what they measured."""

import importlib
import json
import pathlib
import runpy

import pytest


# Left out on the newest jax: what this is about is our own.
pytestmark = pytest.mark.slow


_root = pathlib.Path(__file__).parent.parent


@pytest.fixture
def gpu(monkeypatch):
    """Imports a part of `benchmarks/gpu`."""
    monkeypatch.syspath_prepend(str(_root / "benchmarks"))
    return lambda name: importlib.import_module(f"gpu.{name}")


_CAUSAL, _WINDOW = "(2, 8192, 16, 16, 128) causal=True", "window 1024"


def _row(case, name, fwd, fb):
    row = {"case": case, "mechanism": name, "fwd_ms": fwd, "fb_ms": fb}
    if case == _CAUSAL:
        row |= {"fwd_tflops": 600 / fwd, "fb_tflops": 2100 / fb}
    return row


_ROWS = [
    _row(_CAUSAL, "flash", 1.0, 4.0),
    _row(_CAUSAL, "jax.nn cudnn", 1.5, 4.0),
    _row("(4, 4096, 32, 32, 64) causal=True", "flash", 1.0, 1.0),
    _row("(4, 4096, 32, 32, 64) causal=True", "jax.nn cudnn", 6.0, 1.0),
    _row(_WINDOW, "flash", 0.5, 1.5),
    _row(_WINDOW, "flex", 0.5, 3.0),
    _row("ALiBi", "flex", 1.0, 2.0),
]


def test_summary(gpu):
    summary = gpu("summary").summary(_ROWS)
    assert summary["ratios"][_WINDOW] == {"flex": {"fwd": 1.0, "fb": 2.0}}
    assert "ALiBi" not in summary["ratios"]
    mean = summary["means of causal, 64 and 128"]["jax.nn cudnn"]
    assert mean["fwd"] == pytest.approx(3.0) and mean["fb"] == pytest.approx(1.0)
    text = "\n".join(gpu("summary").lines(summary))
    assert "geometric mean" in text and "jax.nn cudnn" in text
    assert json.loads(json.dumps(summary)) == summary


def test_flops(gpu):
    timed = gpu("cases").TIMED
    whole, half = (timed[f"(2, 8192, 16, 16, 128) causal={x}"] for x in (False, True))
    pairs = 2 * 16 * 8192**2
    assert whole.flops(both=False) == 4 * pairs * 128
    assert half.flops(both=True) == 3.5 * half.flops(both=False)
    assert half.flops(both=True) == 3.5 * whole.flops(both=False) / 2
    assert timed[_WINDOW].flops(both=True) is None


def test_every_timed_case_has_options(gpu):
    cases = gpu("cases")
    for timed in cases.TIMED.values():
        options = cases.options(timed.kind, 64, timed.shape[2])
        assert set(options) <= {"mask", "score"}
    with pytest.raises(ValueError, match="circular"):
        cases.options("circular", 64, 1)


def test_peers(gpu, capsys, monkeypatch):
    peers = gpu("peers")
    monkeypatch.setattr(
        peers.importlib.util, "find_spec", lambda name: name == "jax" or None
    )
    assert peers.importable(None) == {"jax.nn cudnn"}
    assert "flex, as torch cannot be imported" in capsys.readouterr().out
    assert peers.importable("") == set()
    timed = gpu("cases").TIMED[_WINDOW]
    assert peers.names(timed, {"flex"}) == ["flash", "cudnn", "flex"]


def test_tables_of_the_docs(gpu):
    cases = gpu("cases").TIMED
    report = {
        "device": "GPU",
        "dtype": "bfloat16",
        "versions": {"jax": "0.0"},
        "cases": {
            case: {"shape": str(timed.shape), "kind": timed.kind}
            for case, timed in cases.items()
        },
        "timings": [row for row in _ROWS if row["case"] in (_CAUSAL, _WINDOW)],
        "summary": gpu("summary").summary(_ROWS),
        "not timed": [{"case": "ALiBi", "mechanism": "flex", "error": "no"}],
    }
    script = _root / "docs" / "_benchmarks.py"
    text = runpy.run_path(str(script))["markdown"](report)
    text = text.replace("\u00a0", " ")  # so that numbers of a cell stay in one line
    assert "| (2, 8192, 16, 16, 128, 128) causal | 600 · 525 | 400 · 525 |" in text
    assert f"| {_WINDOW} (2, 8192, 16, 16, 128, 128) | 0.50 · 1.50 | 0.50 · 3.00 |" in text
    assert "3.00 · 1.00 times as fast as cuDNN" in text
    assert "- FlexAttention, ALiBi: no" in text


def test_context_parallel(gpu, tmp_path):
    script = importlib.import_module("context_parallel")
    cases = script.cases_of([32768, 1048576], [131072])
    causal, window = script.Case(32768), script.Case(131072, 4096)
    both, forward = "forward+backward", "forward"
    assert cases[:4] == [(x, y) for x in (causal, window) for y in (forward, both)]
    assert cases[4:] == [(script.Case(1048576), x) for x in (both, forward)]
    assert script.Case(4, 2).pairs == 7 and script.Case(4).pairs == 10
    # Which would take the cycles apart in which rings send.
    flags = " ".join(flag for flags in script.FLAGS.values() for flag in flags)
    assert "pipeline" not in flags
    results = script.Results(tmp_path / "new" / "a.json", {"device": "GPU"})
    results.add("rows", {"ms": 1.0})
    results.failed(ValueError("no"), strategy="ring")
    found = json.loads((tmp_path / "new" / "a.json").read_text())
    assert found["device"] == "GPU" and found["rows"] == [{"ms": 1.0}]
    assert found["failures"] == [{"strategy": "ring", "error": "ValueError: no"}]


def test_timeline(gpu):
    timeline = gpu("timeline")
    assert timeline._total([(3, 5), (0, 2), (1, 2), (4, 6)]) == 5
    assert timeline._moves("ncclDevKernel_SendRecv") and not timeline._moves("fusion")
    # Of three calls of two kernels each, the second one.
    events = [gpu("profile").Event(n, n + 1, "ab"[n % 2]) for n in reversed(range(6))]
    start, end, found = timeline.one_of(events)
    assert (start, end, [event.name for event in found]) == (2, 4, ["a", "b"])
