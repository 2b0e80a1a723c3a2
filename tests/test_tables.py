"""`model.table()`, `model.plot()` and the short repr, which importing the package plugs into the model."""

import math

import pandas as pd
import pytest

from families import make
from stitchable import StitchableForImageClassification
from stitchable.card import stitch_table
from stitchable.tables import short_names


def measured() -> StitchableForImageClassification:
    model = make("vit")
    model.record(0, metrics={"accuracy": 0.5, "loss": 1.25})
    model.record(4, metrics={"accuracy": 0.75}, latency_ms=2.5)
    return model


def test_a_table_has_a_row_per_stitch_and_what_is_known() -> None:
    model = measured()
    table = model.table()
    assert isinstance(table, pd.DataFrame)
    assert table.index.name == "id"
    assert table.index.tolist() == [stitch.id for stitch in model.stitches]
    assert table.columns.tolist() == ["route", "flops", "params", "latency_ms", "accuracy", "loss"]
    assert table.loc[4, "route"] == "vit-8 0–1 → vit-12 0–2"
    assert table.flops.tolist() == [stitch.flops for stitch in model.stitches]
    assert table.params.tolist() == [stitch.params for stitch in model.stitches]
    assert table.accuracy.dropna().to_dict() == {0: 0.5, 4: 0.75}
    assert table.latency_ms.dropna().to_dict() == {4: 2.5}
    assert table.nlargest(1, "accuracy").index.tolist() == [4]  # numbers, to sort and compute with
    assert table.query("flops <= @model.stitches[0].flops").index.tolist() == [0]


def test_the_markdown_of_cards_and_commands_is_the_same_table() -> None:
    model = measured()
    head, _, *rows = stitch_table(model.stitches, short_names(model.config)).splitlines()
    assert head == "| id | route | kFLOPs | params | accuracy | ms |"
    assert len(rows) == len(model.table())
    for row, (stitch_id, known) in zip(rows, model.table().iterrows(), strict=True):
        accuracy = "" if pd.isna(known.accuracy) else f"{100 * known.accuracy:.2f} %"
        latency = "" if pd.isna(known.latency_ms) else f"{known.latency_ms:.2f}"
        cells = [stitch_id, known.route, f"{known.flops / 1e3:.3f}", f"{known.params:,}", accuracy, latency]
        assert row == f"| {' | '.join(map(str, cells))} |"


def test_a_stitch_whose_costs_nobody_counted_has_empty_cells() -> None:
    model = measured()
    model.record(4, flops=None)
    assert model.table().flops.isna().to_dict()[4]
    assert stitch_table(model.stitches[4:5], ["a", "b"]).splitlines()[-1].startswith("| 4 | a 0–1 → b 0–2 | ")


def test_a_plot_has_a_dot_per_measured_stitch() -> None:
    model = measured()
    axes = model.plot().axes[0]
    dots = {tuple(dot) for group in axes.collections for dot in group.get_offsets().tolist()}  # anchors: a star too
    unit = 1e3 if "kFLOPs" in axes.get_xlabel() else math.nan
    expected = [[model.stitches[i].flops / unit, 100 * model.stitches[i].metrics["accuracy"]] for i in (0, 4)]
    assert sorted(dots) == [pytest.approx(dot) for dot in sorted(expected)]
    with pytest.raises(ValueError, match="no stitch has a measured top5_accuracy"):
        model.plot("top5_accuracy")


def test_a_model_is_one_line() -> None:
    model = make("vit")
    model.set_stitch(4)
    number = len(model.stitches)
    assert repr(model) == f"StitchableForImageClassification({number} stitches of vit-8, vit-12; stitch 4 runs)"
    assert "(blocks)" in repr(model.anchors)
