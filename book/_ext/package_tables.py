"""The book's own directives: tables printed out of the package, so that the book cannot differ from the code.

`{parameters} training` lists the parameters of a study's section (without a name: those outside any section) as
`piebridge.config` defines them. `{record-columns}` takes lines `name: meaning` and fails if they are not exactly the
fields of `piebridge.records.Record`.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from pydantic import BaseModel
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from piebridge.config import Study
from piebridge.records import Record


class Table(SphinxDirective):
    def render(self, header: list[str], rows: list[list[str]]) -> list[nodes.Node]:
        lines = [header, ["---"] * len(header), *rows]
        text = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
        container = nodes.container()
        self.state.nested_parse(StringList(text, source="package_tables"), self.content_offset, container)
        return container.children


class Parameters(Table):
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        schema = Study.model_json_schema()
        definitions, fields, name = schema["$defs"], schema["properties"], ""
        if self.arguments:
            name = f"{self.arguments[0]}."
            fields = definitions[fields[self.arguments[0]]["$ref"].rpartition("/")[2]]["properties"]
        rows = [
            [f"`{name}{key}`", _type(field, definitions), _default(field, definitions), _meaning(field)]
            for key, field in fields.items()
            if "$ref" not in field
        ]
        return self.render(["Parameter", "Values", "Default", "Meaning"], rows)


class SubnetParameters(Table):
    def run(self) -> list[nodes.Node]:
        definitions = Study.model_json_schema()["$defs"]
        rows = [
            [f"`{key}`", _type(field, definitions), _default(field, definitions), _meaning(field)]
            for key, field in definitions["SubnetSpec"]["properties"].items()
        ]
        return self.render(["Key", "Values", "Default", "Meaning"], rows)


class RecordColumns(Table):
    has_content = True

    def run(self) -> list[nodes.Node]:
        rows = [[part.strip() for part in line.split(":", 1)] for line in self.content if line.strip()]
        explained, wanted = [name for name, _ in rows], list(Record.model_fields)
        if explained != wanted:
            odd = sorted(set(explained) ^ set(wanted)) or "their order differs"
            raise self.error(f"record-columns: not the fields of piebridge.records.Record: {odd}")
        return self.render(["Column", "Meaning"], [[f"`{name}`", meaning] for name, meaning in rows])


def _meaning(field: dict[str, Any]) -> str:
    return field.get("description", "").replace("<", "\\<")


def _type(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in field:
        return "a mapping, see below"
    if "anyOf" in field:
        return " or ".join(_type(part, definitions) for part in field["anyOf"] if part.get("type") != "null")
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "prefixItems" in field:  # as many values as there are
        return f"({'; '.join(_type(part, definitions) for part in field['prefixItems'])})"
    if field.get("type") == "array":
        return f"list: {_type(field['items'], definitions)}"
    if field.get("type") == "object":
        return f"mapping of names: {_type(field['additionalProperties'], definitions)}"
    names = {"integer": "whole number", "number": "number", "boolean": "`true`, `false`", "string": "text"}
    kind = "path" if field.get("format") == "path" else names[field["type"]]
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    limits = [f"{sign} {field[key]:g}" for key, sign in signs.items() if key in field]
    return " ".join([kind, ", ".join(limits)]).strip()


def _default(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "default" not in field:
        return "the file's name"
    value = field["default"]
    if value is None:
        return "-"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"{len(value)} subnets"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, (list, tuple)):
        return ", ".join(f"`{item}`" for item in value) or "none"
    return f"`{value}`" if value != {} else "none"


def _signature(app: Sphinx, what: str, name: str, obj: Any, *rest: Any) -> tuple[str, None] | None:
    """API pages: no generated signature for pydantic models; their fields are in the tables."""
    return ("", None) if isinstance(obj, type) and issubclass(obj, BaseModel) else None


def _skip(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    return True if name == "model_config" else None


def _without_thebe(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """Jupyter Book puts thebe's loader on every page: no page has a button for it, and it would need a network."""

    def wanted(file: Any) -> bool:
        return "thebe" not in f"{file.filename} {file.attributes.get('body', '')}".lower()

    scripts = context.get("script_files", [])
    scripts[:] = filter(wanted, scripts)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("parameters", Parameters)
    app.add_directive("subnet-parameters", SubnetParameters)
    app.add_directive("record-columns", RecordColumns)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-skip-member", _skip)
    app.connect("html-page-context", _without_thebe, priority=900)
    return {"parallel_read_safe": True}
