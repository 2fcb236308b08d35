"""The book's tables and figures of committed records, made of the CSV files when the book is built.

`{record-table} file.csv` pivots the rows that `:where:` selects: `:index:`, `:columns:`, `:values:`.
`{record-comparison} file.csv` compares each study's variants with one of them, `:reference:`.
`{record-figure} file.csv` draws rows, a line a variant (`:kind: compared`) or a point a subnet
(`:kind: fidelity_against_macs`); its content is the caption.
`{study-comparisons} end_to_end.csv` shows each study and regime of a file of whole runs, one after the other: a table
of its methods and their accuracies over training time, from `end_to_end_history.csv` beside it. `:where:` selects runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from matplotlib.figure import Figure
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from piebridge import cloud_figures, figures, records

OWN = "single runs on one data-centre GPU (H200), one seed"


class Records(SphinxDirective):
    required_arguments = 1
    has_content = True

    def read(self, file: str) -> pd.DataFrame:
        path = Path(self.env.srcdir) / "records" / file
        self.env.note_dependency(str(path))
        return pd.read_csv(path)

    def rows(self) -> pd.DataFrame:
        table = self.read(self.arguments[0]).fillna({"without": "", "shared": ""})
        if "without" in table:
            table["subnet"], table["cut"] = table.apply(_subnet, axis=1), table.apply(_cut, axis=1)
        if "where" in self.options:
            table = table.query(self.options["where"])
        if table.empty:
            raise self.error(f"{self.arguments[0]}: no rows where {self.options['where']}")
        return table

    def pivot(self) -> pd.DataFrame:
        index, columns = self.options["index"].split(), self.options["columns"].split()
        return self.rows().pivot_table(index=index, columns=columns, values=self.options["values"], sort=False)

    def parsed(self, lines: StringList | list[str]) -> list[nodes.Node]:
        """What lines of Markdown become."""
        container = nodes.container()
        self.state.nested_parse(StringList(lines, source="record_tables"), self.content_offset, container)
        return container.children

    def drawn(self, figure: Figure, name: str, title: str, caption: list[nodes.Node]) -> nodes.figure:
        file = Path(self.env.srcdir) / "generated" / f"{name}.png"
        file.parent.mkdir(exist_ok=True)
        figure.savefig(file, dpi=110, bbox_inches="tight")
        image = nodes.image(uri=f"/generated/{file.name}", alt=title, width="90%")
        return nodes.figure("", image, nodes.caption("", "", *caption))


class RecordTable(Records):
    option_spec: ClassVar = {
        name: directives.unchanged for name in ("where", "index", "columns", "values", "decimals")
    }

    def run(self) -> list[nodes.Node]:
        form = f".{self.options.get('decimals', '3')}f"
        if "columns" in self.options:
            table = self.pivot().reset_index()
            table.columns = [" / ".join(filter(None, map(str, _whole(name)))) for name in table.columns]
        else:
            table = self.rows()[self.options["index"].split()]
        rows = [[_text(value, form) for value in row] for row in table.itertuples(index=False)]
        return self.parsed(_lines([name.replace("_", " ") for name in table.columns], rows))


class RecordComparison(Records):
    option_spec: ClassVar = {name: directives.unchanged for name in ("where", "reference")}

    def run(self) -> list[nodes.Node]:
        reference = self.options["reference"]
        names = ["variant", "cost", "accuracy (%)", f"points below “{reference}”"]
        text = []
        for study, rows in self.rows().groupby("study", sort=False):
            cells = [
                [variant, f"{row['cost']:.3f}", f"{row['test_accuracy']:.2f}", _interval(row)]
                for variant, row in records.compared(rows, reference).iterrows()
            ]
            text += [f"`{study}`, {rows['seed'].nunique()} seeds:", "", *_lines(names, cells), ""]
        return self.parsed(text)


class RecordFigure(Records):
    option_spec: ClassVar = {
        name: directives.unchanged for name in ("where", "index", "columns", "values", "kind", "title", "name")
    }

    def run(self) -> list[nodes.Node]:
        if self.options["kind"] == "compared":
            figure = cloud_figures.compared(self.pivot(), "", "")
        else:
            figure = cloud_figures.fidelity_against_macs(self.rows(), "", "")
        figure.suptitle(f"{self.options['title']}\n{OWN}", fontsize=10.5)
        content = self.parsed(self.content)
        caption = content[0].children if content else [nodes.Text(self.options["title"])]
        return [self.drawn(figure, self.options["name"], self.options["title"], caption)]


class StudyComparisons(Records):
    option_spec: ClassVar = {"where": directives.unchanged}
    has_content = False

    def run(self) -> list[nodes.Node]:
        runs = self.rows()
        history = self.read(f"{Path(self.arguments[0]).stem}_history.csv")
        history = history.merge(runs[["study", "regime", "method", "seed"]])  # of the selected runs alone
        shown = []
        for (study, regime), group in runs.groupby(["study", "regime"], sort=False):
            shown += self.parsed([_about(group), "", *_comparison(group)])
            epochs = history[(history["study"] == study) & (history["regime"] == regime)]
            figure = figures.accuracy_over_time(epochs, group)
            title = f"Test accuracy over training time: {study}, {regime}"
            name = f"{self.env.docname.replace('/', '-')}-{self.env.new_serialno('study-comparisons')}"
            shown.append(self.drawn(figure, name, title, [nodes.Text(title)]))
        return shown


def _about(runs: pd.DataFrame) -> str:
    """A study's conditions in a line of Markdown."""
    first, seeds = runs.iloc[0], runs["seed"].nunique()
    return (
        f"**`{first['study']}`**, {first['regime']} regime: {first['backbone']} at {first['resolution']} px on "
        f"{first['dataset']}, {first['train_images']} training and {first['test_images']} test images, "
        f"{first['epochs']} epochs, batch {first['batch_size']}, {seeds} seed{'s' if seeds > 1 else ''}; "
        f"{first['device']}, {first['threads']} thread{'s' if first['threads'] > 1 else ''}; commit `{first['commit']}`"
    )


def _comparison(runs: pd.DataFrame) -> list[str]:
    """The methods of a study as the lines of a Markdown table."""
    columns = {  # of `speedups`: heading, format
        "train_seconds": ("seconds", ".1f"), "seconds_at_the_limit": ("at the limit", ".1f"),
        "faster_than_pet": ("times faster than `pet`", ".2f"),
        "faster_than_full": ("times faster than `full`", ".2f"), "test_accuracy": ("accuracy, %", ".2f"),
        "points_above_pet": ("points above `pet`", "+.2f"), "memory_to_pet": ("peak memory, times `pet`'s", ".2f"),
    }
    table = records.speedups(runs)
    header = ["method", *(heading for heading, _ in columns.values())]
    rows = [
        [f"`{method}`", *(_text(row[name], form) for name, (_, form) in columns.items())]
        for method, row in table.iterrows()
    ]
    return _lines(header, rows)


def _lines(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows]]


def _interval(row: pd.Series) -> str:
    return "-" if pd.isna(row["behind"]) else f"{row['behind']:+.2f} ± {row['half_width']:.2f}"


def _whole(name: Any) -> tuple:
    return name if isinstance(name, tuple) else (name,)


def _text(value: Any, form: str) -> str:
    if isinstance(value, float) and value != value:
        return "-"
    return format(value, form) if isinstance(value, float) else str(value)


def _subnet(row: pd.Series) -> str:
    parts = [f"width {row['width']:g}"] if row["width"] < 1 else []
    parts += [f"depth {row['depth']:g}"] if row["depth"] < 1 else []
    parts += [f"{row['resolution']} px"]
    parts += [f"without {row['without']}"] if row["without"] else []
    parts += [f"{len(row['shared'].split())} shared"] if row["shared"] else []
    return ", ".join(parts)


def _cut(row: pd.Series) -> str:
    cuts = ["resolution"]
    cuts += ["width"] if row["width"] < 1 else []
    cuts += ["blocks"] if row["without"] or row["depth"] < 1 else []
    cuts += ["(weights shared)"] if row["shared"] else []
    return " + ".join(cuts).replace("+ (", "(")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("record-table", RecordTable)
    app.add_directive("record-comparison", RecordComparison)
    app.add_directive("record-figure", RecordFigure)
    app.add_directive("study-comparisons", StudyComparisons)
    return {"parallel_read_safe": True}
