"""The benchmark that people run: `python -m eqx_attention.benchmark`."""
# What a row may lack, these have.
# pyright: reportOptionalOperand=false, reportOperatorIssue=false

import csv
import importlib.util
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqx_attention import benchmark, testing
from eqx_attention._benchmark import (
    cli,
    clock,
    expected,
    extras,
    masks,
    measure,
    places,
    programs,
    saving,
    tables,
)
from eqx_attention._benchmark.measure import Measuring
from eqx_attention._benchmark.report import Report, Row
from eqx_attention._benchmark.settings import cases, settings_of
from eqx_attention._mechanism import saved_table
from typer.testing import CliRunner


_SIZES = dict(num_attention_heads=2, head_dim=8, rounds=1)
_root = pathlib.Path(__file__).parent.parent


def _invoke(*arguments: str, **sizes):
    texts = [
        text
        for name, x in (_SIZES | sizes).items()
        for text in (f"--{name.replace('_', '-')}", str(x))
    ]
    return CliRunner().invoke(cli.app, [*arguments, *texts])


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of the command line, and the folder with its files."""
    folder = tmp_path_factory.mktemp("benchmark")
    files = {x: str(folder / f"out.{x}") for x in ("json", "csv")}
    options = [text for name, path in files.items() for text in (f"--{name}", path)]
    options += ["--plot", str(folder / "plot.png")]
    options += ["--save-table", str(folder / "table.json")]
    options += ["--mechanisms", "vanilla,blockwise,flash", "--compare", "jax,tokamax"]
    options += ["--sequence-length", "16", "--masks", "causal", "--batch", "2"]
    result = _invoke(*options, num_key_value_heads=1)
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_rows(done):
    folder, output = done
    report = Report.from_json((folder / "out.json").read_text())
    rows = {(row.sequence_length, row.mechanism): row for row in report.rows}
    names = ("vanilla", "blockwise", "flash", "jax.nn", "tokamax")
    assert list(rows) == [(length, name) for length in (16,) for name in names]
    most = report.matmul_tflops
    assert most is not None and most > 0 and not report.interrupted
    for (length, name), row in rows.items():
        assert (row.mask, row.mesh) == ("causal", "")
        if name in ("flash", "tokamax"):
            assert row.status == "unsupported" and row.both_ms is None
            continue
        assert (row.status, row.reason, row.reference) == ("ok", "", "all")
        pairs = 2 * 2 * length * (length + 1) / 2
        for ms, tflops, share, factor in (
            (row.forward_ms, row.forward_tflops, row.forward_share, 1.0),
            (row.both_ms, row.both_tflops, row.both_share, 3.5),
        ):
            assert ms > 0 and tflops == pytest.approx(4 * pairs * 8 * factor / ms / 1e9)
            assert share == pytest.approx(tflops / most)
        # The arguments and the results, at least; no more than all weights, many times.
        assert 0 < row.forward_mib < row.both_mib < 1
        assert 0 < row.error_out < 1e-6 and 0 < row.error_grad < 2e-6
        assert row.grad_norm_ratio == pytest.approx(1, abs=1e-5)
        assert 0.5 < row.grad_max < 100
    assert rows[16, "vanilla"].explain.startswith("vanilla: ")
    assert "Hopper GPUs, not on cpu" in rows[16, "flash"].reason
    assert rows[16, "tokamax"].reason == "tokamax cannot be imported"
    assert "flash: unsupported: it runs on Hopper GPUs" in output
    assert "blockwise" in output and "GFLOP/s" in output and "norm ratio" in output
    assert str(report).splitlines()[0].startswith(report.machine["device"])


def test_files(done):
    folder, output = done
    report = Report.from_json((folder / "out.json").read_text())
    assert Report.from_json(report.to_json()) == report
    with open(folder / "out.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    for row, line in zip(report.rows, lines, strict=True):
        assert line == {name: "" if x is None else str(x) for name, x in vars(row).items()}
    picture = (folder / "plot.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    assert not list(folder.glob("*.part"))
    with pytest.raises(ValueError, match="expected the format"):
        Report.from_json("{}")
    assert f"EQX_ATTENTION_TABLE={folder / 'table.json'}" in output.replace("\n", "")


def test_auto_chooses_by_the_saved_table(done, tmp_path, monkeypatch):
    rows = saved_table.read(done[0] / "table.json")
    assert [row.shape for row in rows] == [(2, 16, 2, 1, 8)]
    for row in rows:
        assert set(row.ms) == {"vanilla", "blockwise"}
        assert row.masked and row.dtype == "float32"

    def chosen(length, mask=eqa.Causal()):
        x = jnp.zeros((1, length, 2, 8))
        return eqa.Attention(mask=mask).explain(x, x, x).split("\nmechanisms")[0]

    path = tmp_path / "table.json"
    monkeypatch.setenv(saved_table.VARIABLE, str(path))
    for best, other in (("vanilla", "blockwise"), ("blockwise", "vanilla")):
        new = [row._replace(ms={best: 1.0, other: 2.0}) for row in rows]
        path.write_text(saved_table.text_of(new))
        os.utime(path, ns=(0, len(best)))
        assert chosen(16).startswith(f"{best}: "), chosen(16)
        assert f"1.000 ms (against {other} 2.000)" in chosen(16)
    # The weights of vanilla are as many as were measured, or fewer.
    path.write_text(saved_table.text_of(row._replace(ms={"vanilla": 1.0}) for row in rows))
    assert str(path) in chosen(22) and "at most 2 MiB" in chosen(23)
    # Of another device, it says nothing.
    path.write_text(saved_table.text_of(row._replace(device="another") for row in rows))
    assert "at most 2 MiB" in chosen(16)
    monkeypatch.setenv(saved_table.VARIABLE, "")
    assert "at most 2 MiB" in chosen(16)


_GOOD = saved_table.Row("cpu", "float32", (1, 16, 2, 2, 8), True, {"vanilla": 1.0})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "error"),
    (
        (None, "No such file"),
        ("[", "Expecting value"),
        ("[]", "format"),
        ('{"format": "eqx_attention table", "version": 2, "rows": []}', "version 1"),
        ('{"format": "eqx_attention table", "version": 1}', "no list of rows"),
        (saved_table.text_of([_GOOD]).replace('"masked"', '"hidden"'), "a row is to have"),
        (saved_table.text_of([_GOOD._replace(ms={"vanilla": math.nan})]), "odd"),
        (saved_table.text_of([_GOOD._replace(shape=(1, 0, 2, 2, 8))]), "odd"),
        (saved_table.text_of([_GOOD._replace(masked=1)]), "odd"),
    ),
)
def test_odd_tables(text, error, tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv(saved_table.VARIABLE, str(path))
    x = jnp.zeros((1, 16, 2, 8))
    with pytest.raises(ValueError, match=f"EQX_ATTENTION_TABLE: .*{error}"):
        eqa.Attention().explain(x, x, x)


@pytest.mark.slow
def test_saving_again_replaces_what_is_the_same(done, tmp_path):
    folder, _ = done
    report = Report.from_json((folder / "out.json").read_text())
    settings = _settings(
        sequence_length=16,
        batch=2,
        num_key_value_heads=1,
        head_dim=8,
        masks=("causal",),
    )
    path = tmp_path / "table.json"
    other = saved_table.Row("another", "float32", (1, 1, 1, 1, 1), False, {"vanilla": 1.0})
    path.write_text(saved_table.text_of([other]))
    for _ in range(2):
        saving.save_table(report, settings, path)
        assert saved_table.read(path) == (other, *saved_table.read(folder / "table.json"))
    nothing = Report(report.settings, report.machine, None, ())
    with pytest.warns(UserWarning, match="nothing was measured"):
        saving.save_table(nothing, settings, path)


def _settings(**given):
    wanted = dict(
        places=places.places(None, places.AXIS_NAMES, None, None),
        sequence_length=8,
        masks=("full",),
        mechanisms=None,
        compare=(),
        batch=1,
        num_attention_heads=2,
        num_key_value_heads=None,
        head_dim=4,
        dtype=None,
        chunk_size=None,
        rounds=1,
    )
    return settings_of(**(wanted | given))


@pytest.mark.parametrize("mask", ("documents:3", "window:5"))
def test_a_part_of_the_reference(mask, monkeypatch):
    """It is what the whole reference is there, if nothing else has a cotangent."""
    settings = _settings(
        sequence_length=40, batch=2, num_attention_heads=4, num_key_value_heads=2
    )
    (case,) = cases(settings._replace(masks=masks.masks_of([mask])))
    operands = case.operands()
    monkeypatch.setattr(expected, "_WEIGHTS", 2 * 40 * 7)
    found = expected.expected_of(case, operands)
    part = found.part
    assert (part.batch, part.heads, len(part.rows)) == (1, 2, 7)
    assert part.text == "7 of 40 queries, 2 of 4 heads, 1 of 2 batch elements"
    operands[3] = part.alone(operands[3])
    query, key_, value, dout = map(jnp.asarray, operands)
    whole = testing.reference_gradients(query, key_, value, dout=dout, mask=case.mask)
    gradients = [whole.arguments[name] for name in ("query", "key_", "value")]
    errors = found.errors(whole.out, gradients)
    assert errors.out < 1e-12 and max(errors.gradients) < 1e-12
    assert errors.norm_ratio == pytest.approx(1) and errors.largest > 0
    # What is wrong is seen.
    wrong = found.errors(1.1 * whole.out, [2 * gradients[0], *gradients[1:]])
    assert wrong.out == pytest.approx(0.1) and wrong.gradients[0] == pytest.approx(1)
    assert wrong.norm_ratio > 1.1 and max(wrong.gradients[1:]) < 1e-12
    gradients[2] = gradients[2].copy()
    gradients[2][1, 3, 1, 0] = np.nan  # beside the part
    assert math.isnan(found.errors(whole.out, gradients).gradients[2])


@pytest.mark.slow
def test_pairs(monkeypatch):
    monkeypatch.setattr(masks, "_AT_ONCE", 200)
    named = {name: made(37) for name, made in masks.masks_of(list(masks.MASKS)).items()}
    named |= {
        "number": masks.masks_of(["window:4"])["window:4"](37),
        "wide": eqa.SlidingWindow(None, 3) & eqa.Causal(1),
        "dense": eqa.Dense(jnp.arange(37 * 37 * 2).reshape(2, 37, 37) % 3 == 0),
        "batch": eqa.Padding(jnp.array([5, 20, 37])),
        "not": ~eqa.Causal(),
        "empty": eqa.SlidingWindow(2) & eqa.Causal(-5),
    }
    for name, mask in named.items():
        seen = testing.visible_pairs(mask, (3,), 2, 37, 37)
        assert masks.num_pairs(mask, 3, 2, 37) == seen.sum(), name


def test_out_of_memory_is_a_row(monkeypatch):
    monkeypatch.setattr(measure, "available_bytes", lambda device: 2**10)
    report = benchmark.run(
        sequence_length=16, masks=("full",), mechanisms=("vanilla",), **_SIZES
    )
    (row,) = report.rows
    assert row.status == "out of memory" and row.both_ms is None
    assert "forward needs 0.0 GiB, and 0.0 GiB are free" in row.reason
    assert row.forward_mib > 2**-10
    assert "vanilla: out of memory: forward needs" in str(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("json", "csv", "plot", "save_table"))
def test_files_that_cannot_be_written(name, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "matmul_tflops", lambda settings: pytest.fail("measured"))
    (tmp_path / "file").touch()
    (tmp_path / "a.png").mkdir()
    option = f"--{name.replace('_', '-')}"
    for path in (tmp_path / "file" / "a.png", tmp_path / "a.png"):
        result = _invoke(option, str(path))
        assert result.exit_code == 2, result.output
        assert f"Error: {name}: cannot be written: {path}: " in result.output
    assert {x.name for x in tmp_path.iterdir()} == {"file", "a.png"}


@pytest.mark.slow
def test_a_file_that_fails_later(tmp_path, monkeypatch):
    """All of them do, once all was measured; the last write of rows counts."""
    folder, measured = tmp_path / "folder", Measuring.rows

    def rows(self):
        yield from measured(self)
        shutil.rmtree(folder)
        folder.touch()

    monkeypatch.setattr(Measuring, "rows", rows)
    monkeypatch.setattr(measure, "matmul_tflops", lambda settings: 1.0)
    names = ("json", "csv", "plot", "save-table")
    result = _invoke(
        *("--sequence-length", "8", "--masks", "full", "--mechanisms", "vanilla"),
        *(x for name in names for x in (f"--{name}", str(folder / f"{name}.png"))),
    )
    assert result.exit_code == 1, result.output
    assert "vanilla *" in result.output
    for name in ("json", "csv", "plot", "save_table"):
        assert f"{name}: could not be written: [Errno" in result.output
        assert f"{name}: {folder}" not in result.output


@pytest.mark.slow
def test_one_name_is_one_of_one():
    settings = _settings(masks="causal", mechanisms="vanilla", compare="jax")
    assert list(settings.masks) == ["causal"]
    assert (settings.mechanisms, settings.peers) == (("vanilla",), ("jax",))
    alone, prefix = _settings(masks=("window:0", "prefix_lm:0")).masks.values()
    assert masks.num_pairs(alone(7), 1, 1, 7) == 7
    assert masks.num_pairs(prefix(7), 1, 1, 7) == 28
    with pytest.raises(TypeError, match="sequence_length: expected an integer, got True"):
        _settings(sequence_length=(8, True))
    with pytest.raises(TypeError, match="sequence_length"):  # as seen here, or by beartype
        _settings(sequence_length=(8, "a"))


@pytest.mark.slow
def test_nothing_visible():
    report = benchmark.run(
        sequence_length=8,
        masks={"nothing": eqa.Padding(0)},
        mechanisms=("vanilla",),
        **_SIZES,
    )
    (row,) = report.rows
    assert (row.status, row.grad_norm_ratio, row.grad_max) == ("ok", 1.0, 0.0)
    assert expected._ratio(2.0, 0.0) == expected._ratio(math.nan, 0.0) == math.inf
    padding = masks.masks_of(["padding"])["padding"]
    for length, pairs in ((64, 64), (65, 65), (66, 132)):
        assert masks.num_pairs(padding(length), 1, 1, length) == pairs


def test_masks_that_do_not_fit_are_rows(tmp_path):
    given = {
        "dense": eqa.Dense(jnp.ones((16, 16), bool)),
        "segments": eqa.Segments.from_lengths(jnp.array([4, 4])),
        "keys": eqa.Keys(jnp.ones(4, bool)),
        "divides": lambda n: eqa.SlidingWindow(1 // 0),
        "number": lambda n: 3,
        "raises": lambda n: {}[n],
        "good": lambda n: eqa.Causal(),
    }
    report = benchmark.run(
        sequence_length=16,
        masks=given,
        mechanisms=("vanilla",),
        save_table=tmp_path / "table.json",
        **_SIZES,
    )
    rows = {row.mask: row for row in report.rows}
    for name, status, error in (
        ("segments", "unsupported", "mask.*16.*8"),
        ("keys", "unsupported", "mask.*16.*4"),
        ("divides", "failed", "ZeroDivisionError"),
        ("number", "failed", "TypeError: mask: expected a mask"),
        ("raises", "failed", "KeyError: 16"),
    ):
        assert rows[name].status == status and rows[name].both_ms is None
        assert re.match(error, rows[name].reason), rows[name].reason
    for name, pairs in (("dense", 16 * 16), ("good", 16 * 17 / 2)):
        row = rows[name]
        assert row.status == "ok"
        assert row.forward_tflops == pytest.approx(4 * 2 * pairs * 8 / row.forward_ms / 1e9)
    assert list(rows) == list(given)
    (saved,) = saved_table.read(tmp_path / "table.json")
    assert saved.masked


@pytest.mark.slow
def test_errors_are_rows():
    unsupported = eqa.UnsupportedError(
        "X does not support this call: it is red; it is old. Mechanisms that do: none."
    )
    for error, status, reason in (
        (unsupported, "unsupported", "it is red; it is old."),
        (
            ValueError("sharding: expected\n  more"),
            "unsupported",
            "sharding: expected more",
        ),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 4 GiB"), "out of memory", "4 GiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate"), "out of memory", "allocate"),
        (MemoryError(), "out of memory", ""),
        (RuntimeError("broken"), "failed", "RuntimeError: broken"),
    ):
        found = measure._status(error)
        assert found[0] == status and reason in found[1]


def test_stopping_keeps_what_was_measured(tmp_path, monkeypatch):
    """Ctrl-C while the second case is timed."""
    count, timed = 0, clock.seconds

    def seconds(*args, **kwargs):
        nonlocal count
        count += 1
        # One is of the matrix product, two of the first case.
        if count == 5:
            raise KeyboardInterrupt
        return timed(*args, **kwargs)

    monkeypatch.setattr(measure, "seconds", seconds)
    result = _invoke(
        *("--sequence-length", "32,16,24", "--mechanisms", "vanilla", "--masks", "full"),
        *("--json", str(tmp_path / "a.json")),
    )
    assert result.exit_code == 130, result.output
    report = Report.from_json((tmp_path / "a.json").read_text())
    assert report.interrupted
    first, second = report.rows
    assert (first.sequence_length, second.sequence_length) == (16, 24)
    assert first.status == "ok" and first.both_ms > 0
    assert second.status == "interrupted" and second.both_ms is None
    assert second.forward_ms > 0 and second.error_grad < 1e-6
    assert "stopped before its end" in result.output


def test_meshes(tmp_path):
    """Where the sequence is split, only what communicates is supported. The batch is what
    the mesh can split."""
    result = _invoke(
        *("--mesh", "dp=2,sp=4", "--sequence-length", "16", "--masks", "causal"),
        *("--mechanisms", "vanilla,all_gather", "--chunk-size", "4"),
        *("--json", str(tmp_path / "a.json")),
    )
    assert result.exit_code == 0, result.output
    report = Report.from_json((tmp_path / "a.json").read_text())
    assert report.settings["batch"] == 2
    rows = {(row.mesh, row.mechanism): row for row in report.rows}
    assert {key: row.status for key, row in rows.items()} == {
        ("dp=2,sp=4", "vanilla"): "unsupported",
        ("dp=2,sp=4", "all_gather"): "ok",
    }
    row = rows["dp=2,sp=4", "all_gather"]
    assert row.error_out < 1e-6 and row.error_grad < 2e-6 and row.both_ms > 0
    assert "causal, on dp=2,sp=4" in str(report)


@pytest.mark.slow
def test_the_batch_is_what_all_meshes_can_split():
    def batch(*meshes, **given):
        found = places.places(None, places.AXIS_NAMES, list(meshes), None)
        return _settings(places=found, **({"batch": None} | given)).batch

    assert _settings(batch=None).batch == 1
    assert batch("dp=2,fsdp=2,sp=2") == 4 and batch("tp=2") == 1
    assert batch("dp=3", "fsdp=2") == 6 and batch("dp=2", batch=3) == 3


def test_nothing_measured_is_an_error(monkeypatch):
    monkeypatch.setattr(measure, "matmul_tflops", lambda settings: 1.0)
    result = _invoke(
        *("--sequence-length", "16", "--masks", "full", "--mechanisms", "flash"),
    )
    assert result.exit_code == 1, result.output
    assert "flash: unsupported" in result.output
    assert "Error: nothing could be measured" in result.output


@pytest.mark.slow
def test_chunk_size():
    blockwise = eqa.Blockwise(8, 8)
    assert programs.mechanism_of("blockwise", 8) == blockwise
    for name, strategy in (
        ("ring", eqa.Ring),
        ("ulysses", eqa.Ulysses),
        ("all_gather", eqa.AllGather),
    ):
        assert programs.mechanism_of(name, 8) == strategy(blockwise)
        assert programs.mechanism_of(name, None) == strategy()
    assert programs.mechanism_of("vanilla", 8) == eqa.Vanilla()


@pytest.mark.slow
def test_meshes_that_are_asked_for():
    def names(*args):
        axis_dims, mesh = args
        return [x.name for x in places.places(axis_dims, places.AXIS_NAMES, mesh, None)]

    assert names((1, 1, 1, -1), None) == ["sp=8"]
    assert names([(1, -1, 2, 2), [8, 1, 1, 1]], None) == ["fsdp=2,tp=2,sp=2", "dp=8"]
    assert names(None, "dp=2, sp=4") == ["dp=2,sp=4"]
    assert names(None, [{"tp": 2, "sp": -1}, "sp=1"]) == ["tp=2,sp=4", "sp=1"]
    assert names(None, None) == [""]
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    (place,) = places.places(None, (), mesh, eqa.Sharding(sequence="x"))
    assert place.splits_tokens
    for length, spec in ((4, "x"), (5, None)):
        assert place.put(jnp.zeros((1, length, 1, 1))).sharding.spec[1] == spec  # pyright: ignore
    assert _settings(places=(place,)).names(place) == ("auto", *places.STRATEGIES)


@pytest.mark.slow
def test_meshes_are_ranked():
    def row(mesh, length, mechanism, ms):
        return Row(mesh, "full", length, mechanism, both_ms=ms)

    rows = [row("a", 1, "x", 2.0), row("a", 1, "y", 1.0), row("a", 2, "x", 8.0)]
    rows += [row("b", 1, "x", 4.0), row("b", 2, "x", 4.0), row("c", 1, "x", 0.5)]
    report = Report({}, {}, None, tuple(rows))
    ranked = report.meshes()
    assert [mesh for mesh, _ in ranked] == ["a", "b", "c"]
    # Geometric means of (1, 8) and of (4, 4).
    (note,) = tables.notes(report)
    assert note.endswith("relative to it: a (1.00), b (1.41), c (not all measured)")
    assert [x for _, x in ranked] == pytest.approx([1.0, 2**0.5, math.inf])


_WRONG = {
    "sequence_length: expected at least 1": dict(sequence_length=(16, 0)),
    "sequence_length: expected at least one": dict(sequence_length=()),
    "rounds: expected at least 1": dict(rounds=0),
    "num_key_value_heads: expected a divisor": dict(num_key_value_heads=3),
    "mechanisms: expected one of 'auto', .*, 'ring'; got 'flash_attn2', which is called "
    "'flash' here": dict(mechanisms=["flash_attn2"]),
    "mechanisms: .* got 'vanila'; did you mean 'vanilla'": dict(mechanisms="vanila"),
    "sequence_length: expected each once, got 16 again": dict(sequence_length=(16, 8, 16)),
    "masks: expected each once, got 'causal' again": dict(masks=("causal", "causal")),
    "mechanisms: expected each once, got 'auto' again": dict(mechanisms=("auto", "auto")),
    "compare: expected each once, got 'jax' again": dict(compare=("jax", "jax")),
    "masks: expected documents:8 or the like, got 'documents:0'": dict(masks="documents:0"),
    "sequence_length: expected an integer, got True": dict(sequence_length=True),
    "num_attention_heads: expected an integer, got True": dict(num_attention_heads=True),
    "mechanisms: expected at least one": dict(mechanisms=[]),
    "compare: expected some of jax, tokamax, torch": dict(compare=["flax"]),
    "masks: expected some of full": dict(masks=["circular"]),
    "masks: expected window:255 or the like": dict(masks=["window:x"]),
    "masks: expected causal, got": dict(masks=["causal:3"]),
    "masks: expected at least one": dict(masks=[]),
    "dtype: expected one of float32, .*; got int32": dict(dtype=jnp.int32),
    "dtype: .* as jax_enable_x64 is off": dict(dtype="float64"),
    "axis_dims: expected as many sizes": dict(axis_dims=(1, 2)),
    "axis_dims: expected positive sizes": dict(axis_dims=(-1, -1, 1, 1)),
    "divides the number of devices, which is 8": dict(axis_dims=(3, 1, 1, -1)),
    "is at most the number of devices.*XLA_FLAGS": dict(mesh="dp=4,sp=4"),
    "axis_names: expected some of dp": dict(mesh="x=2"),
    "mesh: expected 'dp=2,sp=4'": dict(mesh="dp:2"),
    "mesh: expected None": dict(mesh="dp=2", axis_dims=(1, 1, 1, 1)),
    "expected each mesh once": dict(axis_dims=[(1, 1, 1, 2), (1, 1, 1, 2)]),
    "sharding: expected None": dict(sharding=eqa.Sharding(batch="dp")),
    "sharding: expected axes of the mesh.*'x'.*; got 'dp'": dict(
        mesh={"x": 1}, sharding=eqa.Sharding(batch="dp")
    ),
    "plot: expected a file name": dict(plot="plot.docx"),
    "chunk_size: expected None": dict(save_table="table.json", chunk_size=8),
    "masks: expected Full": dict(save_table="table.json", masks=["window"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("error", _WRONG)
def test_wrong_arguments(error, monkeypatch):
    monkeypatch.setattr(measure, "matmul_tflops", lambda settings: pytest.fail("measured"))
    with pytest.raises((TypeError, ValueError), match=error):
        benchmark.run(**_WRONG[error])


@pytest.mark.slow
def test_what_is_not_installed(monkeypatch):
    for module in ("matplotlib", "rich"):
        monkeypatch.setitem(sys.modules, module, None)
        for name in [x for x in sys.modules if x.startswith(f"{module}.")]:
            monkeypatch.delitem(sys.modules, name)
    wanted = (
        r"needs [\w.]+, which is not installed: `pip install '.\[benchmark\]'` in a clone"
    )
    with pytest.raises(ImportError, match=f"plot {wanted}"):
        benchmark.run(plot="plot.png")
    with pytest.raises(ImportError, match=f"progress {wanted}"):
        benchmark.run(progress=True)
    with pytest.raises(ImportError, match=f"it {wanted}"):
        extras.needed("matplotlib.figure", "it")
    result = CliRunner().invoke(cli.app, ["--plot", "plot.png"])
    assert result.exit_code == 2 and "pip install '.[benchmark]'" in result.output


@pytest.mark.thorough
@pytest.mark.parametrize(
    "peer", [x for x in ("tokamax", "torch") if importlib.util.find_spec(x) is not None]
)
def test_peers(peer):
    report = benchmark.run(
        sequence_length=16,
        masks=("full", "causal", "window:4", "documents:3"),
        mechanisms=(),
        compare=(peer,),
        num_key_value_heads=1,
        **_SIZES,
    )
    assert len(report.rows) == 4
    for row in report.rows:
        assert row.status == "ok" and row.error_out < 1e-5 and row.error_grad < 1e-5


def test_command_line_is_stopped(tmp_path):
    """In a process of its own, with a real Ctrl-C."""
    path = tmp_path / "a.json"
    lengths = ",".join(str(8 * n) for n in range(1, 200))
    command = [sys.executable, "-W", "error", "-m", "eqx_attention.benchmark"]
    command += ["--mechanisms", "vanilla", "--masks", "full", "--json", str(path)]
    command += ["--sequence-length", lengths, "--rounds", "1", "--head-dim", "8"]
    started = subprocess.Popen(
        command, cwd=_root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline and started.poll() is None:
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    output, _ = started.communicate(timeout=60)
    assert started.returncode == 130, output
    found = json.loads(path.read_text())
    assert found["interrupted"] and 1 <= len(found["rows"]) < 199
    assert found["rows"][0]["status"] == "ok" and "stopped before its end" in output
