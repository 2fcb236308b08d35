"""Notebook sources hold no outputs, take two parameters, and run with the smallest study."""

import ast
import json
import os

import pytest
from conftest import run_papermill
from tiny import ROOT

NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


def cells_of(name):
    return json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def test_there_are_notebooks():
    assert "00_quickstart" in NOTEBOOKS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_source_holds_no_outputs(name):
    for cell in cells_of(name):
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_first_code_cell_sets_the_two_parameters(name):
    code = [cell for cell in cells_of(name) if cell["cell_type"] == "code"]
    tagged = [cell for cell in cells_of(name) if "parameters" in cell["metadata"].get("tags", [])]
    assert tagged == [code[0]]
    statements = ast.parse("".join(code[0]["source"])).body
    names = [target.id for statement in statements for target in statement.targets]
    assert sorted(names) == ["overrides", "study"]
    values = {statement.targets[0].id: ast.literal_eval(statement.value) for statement in statements}
    assert "embedded" in values["study"]
    assert values["overrides"] == ""


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(executed_notebooks, notebook_folder, name):
    ended = executed_notebooks[name]
    assert ended.returncode == 0, ended.stderr[-3000:]
    notebook = json.loads((notebook_folder / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert notebook["metadata"]["papermill"]["exception"] is None
    assert notebook["metadata"]["papermill"]["end_time"]
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
    assert all(cell["execution_count"] for cell in code)
    assert any(cell["outputs"] for cell in code)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_unknown_parameter_fails_and_is_named(tmp_path, name):
    source, target = ROOT / "notebooks" / f"{name}.ipynb", tmp_path / "executed.ipynb"
    surroundings = os.environ | {"PIEBRIDGE_BUILD": str(tmp_path / "build")}
    ended = run_papermill(source, target, surroundings, "-p", "nonsense", "1")
    assert ended.returncode != 0
    assert "unknown notebook parameter 'nonsense'" in ended.stderr
