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

_SAFE = sns.color_palette("colorblind").as_hex()  # told apart by colour-blind readers too
METHODS = (
    "pet", "full", "piebridge", "last_k", "random", "fixed", "cached", "piebridge_cached", "elastic", "prune",
    "resolution", "oracle",
)
# the palette has ten colours; Tol's wine and black go with them
COLOURS = dict(zip(METHODS, [*(_SAFE[place] for place in (0, 7, 3, 5, 1, 4, 9, 2, 8, 6)), "#882255", "#000000"]))
MARKERS = dict(zip(METHODS, "osDvP^Xd*ph<"))
ITEMS = ("prefix", "suffix", "correction", "cache", "router", "engine", "data", "other")  # of training time
PARTS = dict(zip(ITEMS, (_SAFE[place] for place in (0, 1, 2, 9, 3, 4, 5, 7))))


def _colour(method: str) -> str:
    return COLOURS.get(method, "0.3")


class Drawing(Figure):
    """A figure that a notebook shows under any backend of matplotlib, and once."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
        return buffer.getvalue()


def _figure(width: float, height: float, columns: int = 1, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    style = {"axes.spines.top": False, "axes.spines.right": False}
    with sns.axes_style("whitegrid", style), sns.plotting_context("notebook", font_scale=0.9):
        figure = Drawing(figsize=(width, height), layout="constrained")
        axes = figure.subplots(1, columns, sharey=share_y, squeeze=False)
    return figure, list(axes[0])


def _titled(figure: Figure, what: str, study: str, device: str = "") -> Figure:
    where = f"study {study}" + (f", on {device}" if device else "")
    figure.suptitle(f"{what}\n{where}", fontsize=10.5)
    return figure


def _one_device(records: pd.DataFrame) -> tuple[str, str]:
    """(study, device and threads) of records that may share an axis; a ValueError if these differ."""
    keys = records[["study", "device", "threads"]].drop_duplicates()
    if len(keys) != 1:
        raise ValueError(f"times of {len(keys)} studies or devices do not belong on one axis; choose one")
    study, device, threads = keys.iloc[0]
    return study, f"{device}, {threads} thread{'s' if threads > 1 else ''}"


def _horizontal_stack(axis: Axes, table: pd.DataFrame, colours: dict[str, str], hatches: Sequence[str] = ()) -> None:
    left = np.zeros(len(table))
    for place, (part, colour) in enumerate(colours.items()):
        values = table[part].to_numpy(dtype=float)
        look = {"color": colour, "edgecolor": "white", "linewidth": 0.5, "hatch": hatches[place] if hatches else ""}
        axis.barh(table.index, values, left=left, label=part, **look)
        left += values
    axis.grid(axis="y", visible=False)


def _plain_log(axis: Axis) -> None:
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
    colours = dict(zip(bars, (_SAFE[0], _SAFE[9], _SAFE[1], _SAFE[8])))
    figure, (axis,) = _figure(7.5, 1.4 + 0.5 * len(sums))
    _horizontal_stack(axis, pd.DataFrame(bars), colours, ("", "//", "", "//"))
    axis.invert_yaxis()
    axis.set(xlabel="milliseconds a batch")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return _titled(figure, "Cost of a training step: frozen prefix and the rest", study, device)


def channels_kept(shares: pd.DataFrame, study: str) -> Figure:
    """What was cut, layer by layer.

    Args:
        shares: a row a member, a column a layer: share of the output channels kept; NaN where the block was removed.
    """
    figure, (axis,) = _figure(9.0, 2.4 + 0.34 * len(shares))
    axis.grid(False)
    look = {"vmin": 0, "vmax": 1, "cmap": "viridis", "linewidths": 0.6, "linecolor": "white"}
    sns.heatmap(shares, ax=axis, mask=shares.isna(), cbar_kws={"label": "share of channels kept"}, **look)
    for row, column in np.argwhere(shares.isna().to_numpy()):
        axis.text(column + 0.5, row + 0.5, "×", ha="center", va="center", color="0.35")
    axis.set(xlabel="convolution (×: its block is removed)", ylabel="")
    axis.tick_params(axis="x", rotation=90, labelsize=7.5)
    axis.tick_params(axis="y", rotation=0)
    return _titled(figure, "Channels kept in each layer", study)


def latents_plane(points: pd.DataFrame, study: str, member: str) -> Figure:
    """Latents before and after alignment in the original's principal plane.

    Args:
        points: a row an image and network; columns image, network (`original`, `unaligned`, `aligned`), x, y.
    """
    figure, axes = _figure(8.5, 4.2, columns=2, share_y=True)
    original = points[points["network"] == "original"].set_index("image")
    for axis, network in zip(axes, ("unaligned", "aligned")):
        other = points[points["network"] == network].set_index("image").loc[original.index]
        axis.plot([original["x"], other["x"]], [original["y"], other["y"]], color="0.8", linewidth=0.5, zorder=1)
        axis.scatter(original["x"], original["y"], s=9, color=_SAFE[0], label="original", zorder=2)
        axis.scatter(other["x"], other["y"], s=9, marker="^", color=_SAFE[3], label=f"subnet, {network}", zorder=3)
        axis.set(xlabel="first principal component", title=network)
        axis.legend(loc="best", fontsize=8, markerscale=1.6)
    axes[0].set_ylabel("second principal component")
    return _titled(figure, f"Latents of held-out images: original and {member}", study)


def alignment_curves(history: pd.DataFrame, study: str, names: Sequence[str]) -> Figure:
    """Alignment loss over steps, a line a member.

    Args:
        history: columns step, member (from 1), loss.
        names: of the members, from 1.
    """
    figure, (axis,) = _figure(7.0, 3.6)
    for member, curve in history.groupby("member"):
        axis.plot(curve["step"], curve["loss"], color=_SAFE[int(member) % 10], label=names[int(member) - 1])
    axis.set(xlabel="alignment step", ylabel="loss", yscale="log")
    _plain_log(axis.yaxis)
    axis.legend(fontsize=8)
    return _titled(figure, "Alignment of the subnets with the original", study)


def pareto_subnets(facts: pd.DataFrame, study: str, device: str) -> Figure:
    """Fidelity of each member against its cost, as MACs and as latency.

    Args:
        facts: a row a member, the original first; columns name, relative_macs, relative_latency, fidelity.
        device: the one latencies were measured on.
    """
    figure, axes = _figure(9.0, 4.2, columns=2, share_y=True)
    for axis, column in zip(axes, ("relative_macs", "relative_latency")):
        for place, (_, member) in enumerate(facts.iterrows()):
            axis.scatter(member[column], member["fidelity"], s=45, color=_SAFE[0] if place else "black", zorder=3)
            point = (member[column], member["fidelity"])
            axis.annotate(str(place), point, xytext=(5, -11), textcoords="offset points", fontsize=9)
        axis.margins(y=0.12)
        axis.set(xlim=(0, 1.08), xlabel=column.replace("_", " ").replace("macs", "MACs"))
    axes[0].set_ylabel("fidelity (centred cosine)")
    listing = "\n".join(f"{place}  {name}" for place, name in enumerate(facts["name"]))
    axes[0].text(0.98, 0.03, listing, transform=axes[0].transAxes, ha="right", va="bottom", fontsize=8)
    return _titled(figure, "A family of subnets: fidelity against cost", study, device)


def difficulty_plane(table: pd.DataFrame, study: str, target_cost: float) -> Figure:
    """What the router says: the distribution of difficulty, and difficulty against what the members lose.

    Args:
        table: a row a held-out image; columns difficulty, loss (mean over the subnets).
        target_cost: the mean cost that the router was trained towards.
    """
    figure, (left, right) = _figure(9.0, 3.8, columns=2)
    left.hist(table["difficulty"], bins=30, color=_SAFE[0])
    left.axvline(table["difficulty"].mean(), color="black", label="mean difficulty")
    left.axvline(target_cost, color=_SAFE[3], linestyle="--", label="target cost in training")
    left.set(xlabel="difficulty (cost an image deserves)", ylabel="held-out images")
    left.legend(fontsize=8)
    rank = table["difficulty"].rank(method="first", pct=True)
    right.scatter(rank, table["loss"], s=7, alpha=0.5, color=_SAFE[0])
    tenths = table["loss"].groupby(pd.cut(rank, np.linspace(0, 1, 11), labels=False)).mean()
    right.plot(tenths.index / 10 + 0.05, tenths, "o-", color=_SAFE[3], label="mean of each tenth")
    right.set(xlabel="rank of the difficulty (1: hardest)", ylabel="loss of the subnets, mean", yscale="log")
    _plain_log(right.yaxis)
    right.legend(fontsize=8)
    return _titled(figure, "The router's difficulty on images it never saw", study)


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
    return _titled(figure, what, study)


def time_breakdown(records: pd.DataFrame) -> Figure:
    """Training seconds of each method by item, means over seeds.

    Args:
        records: of one study and device; columns study, device, threads, method and all `*_seconds`.
    """
    study, device = _one_device(records)
    items = [part for part in PARTS if part != "other"]
    means = records.groupby("method", sort=False)[["train_seconds", *[f"{item}_seconds" for item in items]]].mean()
    parts = means.rename(columns=lambda name: name.removesuffix("_seconds"))
    parts["other"] = (parts["train"] - parts[items].sum(axis=1)).clip(lower=0)
    figure, (left, right) = _figure(9.5, 1.6 + 0.36 * len(parts), columns=2, share_y=True)
    _horizontal_stack(left, parts, PARTS)
    _horizontal_stack(right, 100 * parts.div(parts[list(PARTS)].sum(axis=1), axis=0), PARTS)
    left.invert_yaxis()
    left.set_xlabel("training time, seconds")
    right.set(xlabel="share of a method's own time, %", xlim=(0, 100))
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(PARTS), frameon=False)
    return _titled(figure, "Where training time goes", study, device)


def routes_over_epochs(history: pd.DataFrame, study: str) -> Figure:
    """Share of images that the original computed in each epoch, a line a method.

    Args:
        history: columns method, epoch, original_share; means over seeds are drawn.
    """
    figure, (axis,) = _figure(7.0, 3.6)
    shares = history.groupby(["method", "epoch"], sort=False)["original_share"].mean()
    sizes = chain((11, 8, 5), repeat(4))  # lines may coincide
    for size, method in zip(sizes, dict.fromkeys(history["method"])):
        look = {"marker": MARKERS.get(method, "."), "color": _colour(method), "markersize": size, "linewidth": size / 3}
        axis.plot(100 * shares[method], label=method, **look)
    axis.set(xlabel="epoch", ylabel="latents of the original, %", ylim=(-4, 104))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right center", frameon=False)
    return _titled(figure, "Who computes the latents", study)


def accuracy_over_time(history: pd.DataFrame, records: pd.DataFrame) -> Figure:
    """Test accuracy after each epoch against the training time so far, a line a run.

    Args:
        history: columns method, seed, epoch, train_seconds, test_accuracy.
        records: of the same runs, for the study's and the device's names.
    """
    study, device = _one_device(records)
    figure, (axis,) = _figure(7.5, 4.2)
    for (method, seed), run in history.dropna(subset="test_accuracy").groupby(["method", "seed"], sort=False):
        look = {"marker": MARKERS.get(method, "."), "markersize": 4, "color": _colour(method)}
        label = method if seed == history["seed"].min() else None
        axis.plot(run["train_seconds"], run["test_accuracy"], label=label, **look)
    axis.set(xlabel="training time, seconds (evaluation excluded)", ylabel="test accuracy, %", xscale="log")
    _plain_log(axis.xaxis)
    figure.legend(loc="outside right center", frameon=False)
    return _titled(figure, "Accuracy against training time", study, device)


def speedup_bars(records: pd.DataFrame) -> Figure:
    """How many times faster each method trained than `pet` and than `full`; what was not run has no bar.

    Args:
        records: of one study and device; columns study, device, threads, method, train_seconds and both accuracies.
    """
    study, device = _one_device(records)
    table = speedups(records)
    rivals = [rival for rival in ("pet", "full") if rival in table.index]
    figure, axes = _figure(8.0, 1.4 + 0.36 * len(table), columns=max(1, len(rivals)), share_y=True)
    for axis, rival in zip(axes, rivals):
        ratios = table[f"faster_than_{rival}"]
        bars = axis.barh(table.index, ratios, color=[_colour(method) for method in table.index])
        axis.bar_label(bars, [f"{ratio:.2f}×" for ratio in ratios], padding=3, fontsize=8.5)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(xlabel=f"times faster than {rival}", xlim=(0, 1.18 * ratios.max()))
        axis.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    return _titled(figure, "Speed-up of training time", study, device)


def accuracy_against_time(records: pd.DataFrame) -> Figure:
    """Final test accuracy against training time, a point a method (mean over seeds), seeds as small points.

    Args:
        records: of one study and device; columns study, device, threads, method, train_seconds, test_accuracy.
    """
    study, device = _one_device(records)
    figure, (axis,) = _figure(7.5, 4.2)
    for method, runs in records.groupby("method", sort=False):
        axis.scatter(runs["train_seconds"], runs["test_accuracy"], s=12, color=_colour(method), alpha=0.5)
        mean = runs[["train_seconds", "test_accuracy"]].mean()
        look = {"marker": MARKERS.get(method, "o"), "color": _colour(method), "edgecolor": "black"}
        axis.scatter(*mean, s=75, label=method, **look)
    means = records.groupby("method")[["train_seconds", "test_accuracy"]].mean().sort_values("train_seconds")
    front = means[means["test_accuracy"] > means["test_accuracy"].cummax().shift(fill_value=-1)]
    axis.plot(front["train_seconds"], front["test_accuracy"], color="0.5", linewidth=1, zorder=0, label="front")
    axis.set(xlabel="training time, seconds", ylabel="test accuracy after the last epoch, %", xscale="log")
    _plain_log(axis.xaxis)
    figure.legend(loc="outside right center", frameon=False)
    return _titled(figure, "Accuracy against training time, each method once", study, device)
