"""Figures of the cloud side: what was cut, what alignment does, what a subnet is worth.

Arguments named study and device go into the title.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from .figures import SAFE, panels, plain_log, titled

SHAPES = "os^Dv*Xd"


def channels_of(channels: pd.DataFrame, study: str) -> Figure:
    """A picture of the networks: a bar a convolution, as high as it has channels, before the original's in outline.

    Args:
        channels: a row a network, the original first, a column a convolution (`block conv`); NaN where it was removed.
    """
    figure, axes = panels(10.0, 0.6 + 1.0 * len(channels), rows=len(channels))
    original = channels.iloc[0]
    blocks = [name.partition(" ")[0] for name in channels.columns]
    places = [place + 0.7 * len(set(blocks[: place + 1])) for place in range(len(blocks))]
    for axis, (name, counts) in zip(axes, channels.iterrows()):
        axis.bar(places, original, width=0.9, color="none", edgecolor="0.75")
        axis.bar(places, counts.fillna(0), width=0.9, color=SAFE[0])
        for place, count in zip(places, counts):
            text = f"{count:.0f}" if count > 0 else "×"
            axis.text(place, count if count > 0 else 0, text, ha="center", va="bottom", fontsize=7)
        axis.set(yticks=[], ylim=(0, 1.25 * original.max()), xticks=[])
        axis.set_ylabel(name.replace(", ", "\n"), rotation=0, ha="right", va="center", fontsize=8)
    middles = {block: [place for place, own in zip(places, blocks) if own == block] for block in dict.fromkeys(blocks)}
    axes[-1].set_xticks([sum(own) / len(own) for own in middles.values()], list(middles), fontsize=8)
    axes[-1].tick_params(axis="x", rotation=90 if len(middles) > 10 else 0)
    return titled(figure, "Channels of every convolution (outline: the original; ×: removed)", study)


def latents_plane(points: pd.DataFrame, study: str) -> Figure:
    """Latents before and after alignment in the original's principal plane.

    Args:
        points: a row an image, network and state; columns state (`unaligned`, `aligned`), network (`original` or a
            subnet's name), x, y.
    """
    states = list(dict.fromkeys(points["state"]))
    figure, axes = panels(8.5, 4.2, columns=len(states), share_y=True)
    for axis, state in zip(axes, states):
        groups = points[points["state"] == state].groupby("network", sort=False)
        for place, (network, those) in enumerate(groups):
            axis.scatter(those["x"], those["y"], s=9, marker=SHAPES[place], color=SAFE[place], label=network, alpha=0.7)
        axis.set(xlabel="first principal component", title=state)
    axes[0].set_ylabel("second principal component")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, markerscale=1.8)
    return titled(figure, "Latents of held-out images in the original's principal plane", study)


def alignment_curves(history: pd.DataFrame, study: str, names: Sequence[str]) -> Figure:
    """Alignment loss over steps, a line a member.

    Args:
        history: columns step, member (from 1), loss.
        names: of the members, from 1.
    """
    figure, (axis,) = panels(7.0, 3.6)
    for member, curve in history.groupby("member"):
        axis.plot(curve["step"], curve["loss"], color=SAFE[int(member) % 10], label=names[int(member) - 1])
    axis.set(xlabel="alignment step", ylabel="loss", yscale="log")
    plain_log(axis.yaxis)
    axis.legend(fontsize=8)
    return titled(figure, "Alignment of the subnets with the original", study)


def compared(table: pd.DataFrame, study: str, what: str) -> Figure:
    """Fidelities of variants, a line a variant, a shape a column; the first line is marked through the figure.

    Args:
        table: index: variants; columns: members, or before and after; fidelities.
        what: the title.
    """
    figure, (axis,) = panels(7.5, 1.5 + 0.32 * len(table))
    for place, column in enumerate(table.columns):
        axis.axvline(table[column].iloc[0], color=SAFE[place], linewidth=0.8, linestyle=":")
        axis.scatter(table[column], table.index, marker=SHAPES[place], color=SAFE[place], label=column, zorder=3)
    axis.invert_yaxis()
    axis.set(xlabel="fidelity (centred cosine)")
    figure.legend(loc="outside lower center", ncols=min(4, len(table.columns)), frameon=False, fontsize=8.5)
    return titled(figure, what, study)


def fidelity_against_macs(table: pd.DataFrame, study: str, what: str) -> Figure:
    """A point a subnet, a look a kind of cut.

    Args:
        table: columns cut, relative_macs, fidelity.
        what: the title.
    """
    figure, (axis,) = panels(7.5, 4.0)
    for place, (cut, those) in enumerate(table.groupby("cut", sort=False)):
        axis.scatter(
            those["relative_macs"], those["fidelity"], s=45, marker=SHAPES[place], color=SAFE[place], label=cut
        )
    axis.set(xlabel="relative MACs", ylabel="fidelity (centred cosine)")
    figure.legend(loc="outside right center", frameon=False, fontsize=8.5)
    return titled(figure, what, study)


def pareto_subnets(facts: pd.DataFrame, study: str, device: str) -> Figure:
    """Fidelity of each member against its cost, as MACs and as latency, and the front: no other is better and cheaper.

    Args:
        facts: a row a member, the original first; columns name, relative_macs, relative_latency, fidelity.
        device: the one latencies were measured on.
    """
    figure, axes = panels(9.0, 4.2, columns=2, share_y=True)
    for axis, column in zip(axes, ("relative_macs", "relative_latency")):
        front = facts.loc[pareto_front(facts, column)]
        axis.plot(front[column], front["fidelity"], color="0.6", linewidth=1, zorder=1)
        for place, (_, member) in enumerate(facts.iterrows()):
            axis.scatter(member[column], member["fidelity"], s=45, color=SAFE[0] if place else "black", zorder=3)
            point = (member[column], member["fidelity"])
            axis.annotate(str(place), point, xytext=(5, -11), textcoords="offset points", fontsize=9)
        axis.margins(y=0.12)
        axis.set(xlim=(0, 1.08), xlabel=column.replace("_", " ").replace("macs", "MACs"))
    axes[0].set_ylabel("fidelity (centred cosine)")
    listing = "\n".join(f"{place}  {name}" for place, name in enumerate(facts["name"]))
    axes[0].text(0.98, 0.03, listing, transform=axes[0].transAxes, ha="right", va="bottom", fontsize=8)
    return titled(figure, "A family of subnets: fidelity against cost", study, device)


def pareto_front(facts: pd.DataFrame, cost: str = "relative_latency") -> list:
    """Rows than which no other is both cheaper and as faithful, from cheap to dear; by their labels in the index."""
    ordered = facts.sort_values([cost, "fidelity"], ascending=[True, False])
    best = ordered["fidelity"].cummax().shift(fill_value=float("-inf"))
    return list(ordered.index[ordered["fidelity"] > best])
