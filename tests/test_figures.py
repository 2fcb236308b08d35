"""Figures of records: every method has its own look, and times of different devices never share an axis."""

import pandas as pd
import pytest

from piebridge import cloud_figures, figures
from piebridge.config import METHODS

OF_RECORDS = (figures.time_breakdown, figures.speedup_bars, figures.accuracy_against_time)


@pytest.fixture
def table():
    """Two seeds of every method on one device."""
    rows = []
    for position, method in enumerate(METHODS):
        for seed in (0, 1):
            row = {"study": "tiny", "regime": "plain", "method": method, "seed": seed}
            row |= {"device": "a small board", "threads": 2}
            row |= {f"{item}_seconds": 1.0 for item in figures.ITEMS if item != "other"}
            accuracy = 90.0 + position / 10
            rows.append(row | {
                "train_seconds": 10.0 + position, "test_accuracy": accuracy, "best_test_accuracy": accuracy + 1,
                "peak_memory_mib": 100.0,
            })
    return pd.DataFrame(rows)


@pytest.fixture
def history():
    epochs = [(method, 0, epoch) for method in METHODS for epoch in (1, 2, 3)]
    frame = pd.DataFrame(epochs, columns=["method", "seed", "epoch"])
    return frame.assign(train_seconds=frame["epoch"] * 2.0, test_accuracy=80.0 + frame["epoch"], original_share=0.5)


def texts_of(figure):
    drawn = [figure.get_suptitle()]
    for axis in figure.axes:
        drawn += [label.get_text() for label in (*axis.get_xticklabels(), *axis.get_yticklabels())]
    for legend in figure.legends:
        drawn += [text.get_text() for text in legend.get_texts()]
    return drawn


def test_every_method_has_its_own_look():
    assert set(METHODS) == set(figures.COLOURS) == set(figures.MARKERS)
    assert len(set(figures.COLOURS.values())) == len(METHODS)
    assert len(set(figures.MARKERS.values())) == len(METHODS)


@pytest.mark.parametrize("draw", OF_RECORDS)
def test_figures_of_records_name_study_device_and_methods(table, draw):
    figure = draw(table)
    assert figure._repr_png_().startswith(b"\x89PNG")
    drawn = texts_of(figure)
    assert "tiny" in drawn[0]
    assert "a small board" in drawn[0]
    assert set(METHODS) <= set(drawn)


@pytest.mark.parametrize("draw", OF_RECORDS)
@pytest.mark.parametrize("column", ["study", "regime", "device", "threads"])
def test_times_of_two_devices_do_not_share_an_axis(table, draw, column):
    table.loc[0, column] = 9 if column == "threads" else "another"
    with pytest.raises(ValueError, match=r"do not belong on one axis; choose one study of .*tiny"):
        draw(table)


def test_the_regime_is_named_once(table):
    for study in ("tiny", "tiny_augmented"):
        figure = figures.accuracy_against_time(table.assign(study=study, regime="augmented"))
        assert figure.get_suptitle().count("augmented") == 1


def test_figures_of_the_history(table, history):
    for figure in (figures.accuracy_over_time(history, table), figures.routes_over_epochs(history, "tiny")):
        assert set(METHODS) <= set(texts_of(figure))
        assert "tiny" in texts_of(figure)[0]
        assert figure._repr_png_().startswith(b"\x89PNG")


def test_speedups_are_the_length_of_the_bars(table):
    figure = figures.speedup_bars(table)
    seconds = table.groupby("method")["train_seconds"].mean()
    methods = list(dict.fromkeys(table["method"]))
    for axis, rival in zip(figure.axes, ("pet", "full")):
        lengths = [bar.get_width() for bar in axis.patches]
        assert lengths == pytest.approx([seconds[rival] / seconds[method] for method in methods])


def test_a_rival_that_was_not_run_has_no_bars(table):
    figure = figures.speedup_bars(table[table["method"] != "full"])
    assert len(figure.axes) == 1
    assert "pet" in figure.axes[0].get_xlabel()


def test_figures_of_the_cloud_side():
    channels = pd.DataFrame({"stem 0": [8, 4], "layer1 conv1": [16, None]}, index=["original", "narrow"])
    points = pd.DataFrame([(state, network, place, -place) for state in ("unaligned", "aligned")
                           for network in ("original", "narrow") for place in (0.0, 1.0)],
                          columns=["state", "network", "x", "y"])
    fidelities = pd.DataFrame({"a": [0.5, 0.6], "b": [0.7, 0.8]}, index=["reference", "other"])
    subnets = pd.DataFrame({"cut": ["width", "depth"], "relative_macs": [0.5, 0.4], "fidelity": [0.8, 0.7]})
    drawn = (
        cloud_figures.channels_of(channels, "tiny"), cloud_figures.latents_plane(points, "tiny"),
        cloud_figures.compared(fidelities, "tiny", "what"),
        cloud_figures.fidelity_against_macs(subnets, "tiny", "what"),
    )
    for figure in drawn:
        assert figure._repr_png_().startswith(b"\x89PNG")
        assert "tiny" in figure.get_suptitle()
    assert {"reference", "other", "a", "b"} <= set(texts_of(drawn[2]))
    assert "×" in [text.get_text() for axis in drawn[0].axes for text in axis.texts]


def test_pareto_front_is_what_nothing_beats():
    facts = pd.DataFrame({"relative_latency": [1.0, 0.5, 0.6, 0.2, 0.2], "fidelity": [1.0, 0.9, 0.8, 0.6, 0.7]})
    assert cloud_figures.pareto_front(facts) == [4, 1, 0]
