"""The book's tables and figures of committed records, made of the CSV files when the book is built.

`{record-table} file.csv` pivots the rows that `:where:` selects: `:index:`, `:columns:`, `:values:`.
`{record-comparison} file.csv` compares each study's variants with one of them, `:reference:`.
`{record-figure} file.csv` draws rows, a line a variant (`:kind: compared`) or a point a subnet
(`:kind: fidelity_against_macs`); its content is the caption.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from piebridge import cloud_figures, records

OWN = "single runs on one data-centre GPU (H200), one seed"


class Records(SphinxDirective):
    required_arguments = 1
    has_content = True

    def rows(self) -> pd.DataFrame:
        path = Path(self.env.srcdir) / "records" / self.arguments[0]
        self.env.note_dependency(str(path))
        table = pd.read_csv(path).fillna({"without": "", "shared": ""})
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

    def parsed(self, text: list[str]) -> list[nodes.Node]:
        """What lines of Markdown become."""
        container = nodes.container()
        self.state.nested_parse(StringList(text, source="record_tables"), self.content_offset, container)
        return container.children


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
        cells = [[_text(value, form) for value in row] for row in table.itertuples(index=False)]
        return self.parsed(_markdown([name.replace("_", " ") for name in table.columns], cells))


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
            text += [f"`{study}`, {rows['seed'].nunique()} seeds:", "", *_markdown(names, cells), ""]
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
        file = Path(self.env.srcdir) / "generated" / f"{self.options['name']}.png"
        file.parent.mkdir(exist_ok=True)
        figure.savefig(file, dpi=110, bbox_inches="tight")
        image = nodes.image(uri=f"generated/{file.name}", alt=self.options["title"], width="90%")
        caption = nodes.caption()
        inline = nodes.container()
        self.state.nested_parse(self.content, self.content_offset, inline)
        caption += inline.children[0].children if inline.children else nodes.Text(self.options["title"])
        return [nodes.figure("", image, caption)]


def _markdown(names: list[str], cells: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in [names, ["---"] * len(names), *cells]]


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
    return {"parallel_read_safe": True}
