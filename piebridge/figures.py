"""Tables in, matplotlib figures out: one colour a method throughout, the study named on every figure.

Every figure that shows seconds names the device too, and holds runs of one study on one device only: times of
different devices do not belong on one axis. Arguments named study, device, member and what go into the title.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import chain, repeat

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from .records import speedups

SAFE = sns.color_palette("colorblind").as_hex()  # told apart by colour-blind readers too
METHODS = (
    "pet", "full", "piebridge", "last_k", "random", "fixed", "cached", "piebridge_cached", "elastic", "prune",
    "resolution", "oracle",
)
# the palette has ten colours; Tol's wine and black go with them
COLOURS = dict(zip(METHODS, [*(SAFE[place] for place in (0, 7, 3, 5, 1, 4, 9, 2, 8, 6)), "#882255", "#000000"]))
MARKERS = dict(zip(METHODS, "osDvP^Xd*ph<"))
ITEMS = ("prefix", "suffix", "correction", "cache", "router", "engine", "data", "other")  # of training time
PARTS = dict(zip(ITEMS, (SAFE[place] for place in (0, 1, 2, 9, 3, 4, 5, 7))))


def _colour(method: str) -> str:
    return COLOURS.get(method, "0.3")


class Drawing(Figure):
    """A figure that a notebook shows under any backend of matplotlib, and once."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
        return buffer.getvalue()


def panels(
    width: float, height: float, columns: int = 1, share_y: bool = False, rows: int = 1
) -> tuple[Figure, list[Axes]]:
    """A figure of one row or one column of axes."""
    style = {"axes.spines.top": False, "axes.spines.right": False}
    with sns.axes_style("whitegrid", style), sns.plotting_context("notebook", font_scale=0.9):
        figure = Drawing(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, sharey=share_y, squeeze=False)
    return figure, list(axes.ravel())


def titled(figure: Figure, what: str, study: str, device: str = "") -> Figure:
    """The figure with a title that names the study, and the device where times are shown."""
    where = f"study {study}" + (f", on {device}" if device else "")
    figure.suptitle(f"{what}\n{where}", fontsize=10.5)
    return figure


def _one_device(records: pd.DataFrame) -> tuple[str, str]:
    """(study and regime, device and threads) of records that may share an axis; a ValueError if these differ."""
    keys = records[["study", "regime", "device", "threads"]].drop_duplicates()
    if len(keys) != 1:
        raise ValueError(
            f"times of {len(keys)} studies, regimes or devices do not belong on one axis; choose one study of "
            f"{', '.join(dict.fromkeys(keys['study']))}"
        )
    study, regime, device, threads = keys.iloc[0]
    if regime != "plain" and not study.endswith(regime):  # some studies have the regime in their name
        study = f"{study}, {regime}"
    return study, f"{device}, {threads} thread{'s' if threads > 1 else ''}"


def _horizontal_stack(axis: Axes, table: pd.DataFrame, colours: dict[str, str], hatches: Sequence[str] = ()) -> None:
    left = np.zeros(len(table))
    for place, (part, colour) in enumerate(colours.items()):
        values = table[part].to_numpy(dtype=float)
        look = {"color": colour, "edgecolor": "white", "linewidth": 0.5, "hatch": hatches[place] if hatches else ""}
        axis.barh(table.index, values, left=left, label=part, **look)
        left += values
    axis.grid(axis="y", visible=False)


def plain_log(axis: Axis) -> None:
    """Ticks of a logarithmic axis written as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def block_costs(table: pd.DataFrame, study: str, device: str) -> Figure:
    """Where a training step's time goes, a bar a kind of training.

    Args:
        table: a row a kind and block; columns kind, part (`prefix` or `suffix`), forward_ms, backward_ms.
    """
    sums = table.pivot_table(index="kind", columns="part", values=["forward_ms", "backward_ms"], aggfunc="sum")
    sums = sums.loc[list(dict.fromkeys(table["kind"]))].fillna(0.0)
    empty = pd.Series(0.0, index=sums.index)
    kinds = [(part, way) for part in ("prefix", "suffix") for way in ("forward", "backward")]
    bars = {f"{part}, {way}": sums.get((f"{way}_ms", part), empty) for part, way in kinds}
    colours = dict(zip(bars, (SAFE[0], SAFE[9], SAFE[1], SAFE[8])))
    figure, (axis,) = panels(7.5, 1.4 + 0.5 * len(sums))
    _horizontal_stack(axis, pd.DataFrame(bars), colours, ("", "//", "", "//"))
    axis.invert_yaxis()
    axis.set(xlabel="milliseconds a batch")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return titled(figure, "Cost of a training step: frozen prefix and the rest", study, device)


def difficulty_plane(table: pd.DataFrame, study: str, target_cost: float) -> Figure:
    """What the router says: the distribution of difficulty, and difficulty against what the members lose.

    Args:
        table: a row a held-out image; columns difficulty, loss (mean over the subnets).
        target_cost: the mean cost that the router was trained towards.
    """
    figure, (left, right) = panels(9.0, 3.8, columns=2)
    left.hist(table["difficulty"], bins=30, color=SAFE[0])
    left.axvline(table["difficulty"].mean(), color="black", label="mean difficulty")
    left.axvline(target_cost, color=SAFE[3], linestyle="--", label="target cost in training")
    left.set(xlabel="difficulty (cost an image deserves)", ylabel="held-out images")
    left.legend(fontsize=8)
    rank = table["difficulty"].rank(method="first", pct=True)
    right.scatter(rank, table["loss"], s=7, alpha=0.5, color=SAFE[0])
    tenths = table["loss"].groupby(pd.cut(rank, np.linspace(0, 1, 11), labels=False)).mean()
    right.plot(tenths.index / 10 + 0.05, tenths, "o-", color=SAFE[3], label="mean of each tenth")
    right.set(xlabel="rank of the difficulty (1: hardest)", ylabel="loss of the subnets, mean", yscale="log")
    plain_log(right.yaxis)
    right.legend(fontsize=8)
    return titled(figure, "The router's difficulty on images it never saw", study)


def image_rows(rows: dict[str, Sequence], captions: dict[str, Sequence[str]], study: str, what: str) -> Figure:
    """Small images, a row a name, with a caption each.

    Args:
        rows: uint8 images (H, W, 3) by the row's name; as many in each.
        captions: a text an image.
    """
    count = max(len(images) for images in rows.values())
    figure = Drawing(figsize=(0.95 * count + 0.6, 1.3 * len(rows) + 0.7), layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, images) in zip(axes, rows.items()):
        for axis, image, caption in zip(line, images, captions[name]):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
            axis.set_title(caption, fontsize=8)
        line[0].set_ylabel(name, fontsize=9)
    return titled(figure, what, study)


def time_breakdown(records: pd.DataFrame) -> Figure:
    """Training seconds of each method by item, means over seeds.

    Args:
        records: of one study and device; columns study, regime, device, threads, method and all `*_seconds`.
    """
    study, device = _one_device(records)
    items = [part for part in PARTS if part != "other"]
    means = records.groupby("method", sort=False)[["train_seconds", *[f"{item}_seconds" for item in items]]].mean()
    parts = means.rename(columns=lambda name: name.removesuffix("_seconds"))
    parts["other"] = (parts["train"] - parts[items].sum(axis=1)).clip(lower=0)
    figure, (left, right) = panels(9.5, 1.6 + 0.36 * len(parts), columns=2, share_y=True)
    _horizontal_stack(left, parts, PARTS)
    _horizontal_stack(right, 100 * parts.div(parts[list(PARTS)].sum(axis=1), axis=0), PARTS)
    left.invert_yaxis()
    left.set_xlabel("training time, seconds")
    right.set(xlabel="share of a method's own time, %", xlim=(0, 100))
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(PARTS), frameon=False)
    return titled(figure, "Where training time goes", study, device)


def routes_over_epochs(history: pd.DataFrame, study: str) -> Figure:
    """Share of images that the original computed in each epoch, a line a method.

    Args:
        history: columns method, epoch, original_share; means over seeds are drawn.
    """
    figure, (axis,) = panels(7.0, 3.6)
    shares = history.groupby(["method", "epoch"], sort=False)["original_share"].mean()
    sizes = chain((11, 8, 5), repeat(4))  # lines may coincide
    for size, method in zip(sizes, dict.fromkeys(history["method"])):
        look = {"marker": MARKERS.get(method, "."), "color": _colour(method), "markersize": size, "linewidth": size / 3}
        axis.plot(100 * shares[method], label=method, **look)
    axis.set(xlabel="epoch", ylabel="latents of the original, %", ylim=(-4, 104))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right center", frameon=False)
    return titled(figure, "Who computes the latents", study)


def accuracy_over_time(history: pd.DataFrame, records: pd.DataFrame) -> Figure:
    """Test accuracy after each epoch against the training time so far, a line a run.

    Args:
        history: columns method, seed, epoch, train_seconds, test_accuracy.
        records: of the same runs, for the study's and the device's names.
    """
    study, device = _one_device(records)
    figure, (axis,) = panels(7.5, 4.2)
    for (method, seed), run in history.dropna(subset="test_accuracy").groupby(["method", "seed"], sort=False):
        look = {"marker": MARKERS.get(method, "."), "markersize": 4, "color": _colour(method)}
        label = method if seed == history["seed"].min() else None
        axis.plot(run["train_seconds"], run["test_accuracy"], label=label, **look)
    axis.set(xlabel="training time, seconds (evaluation excluded)", ylabel="test accuracy, %", xscale="log")
    plain_log(axis.xaxis)
    figure.legend(loc="outside right center", frameon=False)
    return titled(figure, "Accuracy against training time", study, device)


def speedup_bars(records: pd.DataFrame) -> Figure:
    """How many times faster each method trained than `pet` and than `full`; what was not run has no bar.

    Args:
        records: of one study and device; columns study, regime, device, threads, method, train_seconds,
            peak_memory_mib and both accuracies.
    """
    study, device = _one_device(records)
    table = speedups(records)
    rivals = [rival for rival in ("pet", "full") if rival in table.index]
    figure, axes = panels(8.0, 1.4 + 0.36 * len(table), columns=max(1, len(rivals)), share_y=True)
    for axis, rival in zip(axes, rivals):
        ratios = table[f"faster_than_{rival}"]
        bars = axis.barh(table.index, ratios, color=[_colour(method) for method in table.index])
        axis.bar_label(bars, [f"{ratio:.2f}×" for ratio in ratios], padding=3, fontsize=8.5)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(xlabel=f"times faster than {rival}", xlim=(0, 1.18 * ratios.max()))
        axis.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    return titled(figure, "Speed-up of training time", study, device)


def accuracy_against_time(records: pd.DataFrame) -> Figure:
    """Final test accuracy against training time, a point a method (mean over seeds), seeds as small points.

    Args:
        records: of one study and device; columns study, regime, device, threads, method, train_seconds, test_accuracy.
    """
    study, device = _one_device(records)
    figure, (axis,) = panels(7.5, 4.2)
    for method, runs in records.groupby("method", sort=False):
        axis.scatter(runs["train_seconds"], runs["test_accuracy"], s=12, color=_colour(method), alpha=0.5)
        mean = runs[["train_seconds", "test_accuracy"]].mean()
        look = {"marker": MARKERS.get(method, "o"), "color": _colour(method), "edgecolor": "black"}
        axis.scatter(*mean, s=75, label=method, **look)
    means = records.groupby("method")[["train_seconds", "test_accuracy"]].mean().sort_values("train_seconds")
    front = means[means["test_accuracy"] > means["test_accuracy"].cummax().shift(fill_value=-1)]
    axis.plot(front["train_seconds"], front["test_accuracy"], color="0.5", linewidth=1, zorder=0, label="front")
    axis.set(xlabel="training time, seconds", ylabel="test accuracy after the last epoch, %", xscale="log")
    plain_log(axis.xaxis)
    figure.legend(loc="outside right center", frameon=False)
    return titled(figure, "Accuracy against training time, each method once", study, device)
