"""Fixtures of the whole session: nothing is written outside temporary folders, dear things are made once."""

import ast
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from tiny import ROOT, tiny_study

from piebridge.experiment import Experiment, open_experiment

torch.set_num_threads(1)  # the networks are so small that threads only wait for each other


@pytest.fixture(scope="session", autouse=True)
def build(tmp_path_factory):
    """PIEBRIDGE_BUILD points to a temporary folder, in this process and in those that it starts."""
    folder = tmp_path_factory.mktemp("build")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIEBRIDGE_BUILD", str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])))
        patch.setenv("MPLBACKEND", "agg")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.chdir(ROOT)
        yield folder


@pytest.fixture(scope="session")
def tiny(build) -> Experiment:
    """The smallest study made ready: backbone pretrained, family aligned, router trained."""
    return open_experiment(tiny_study())


@pytest.fixture(scope="session")
def notebook_folder(tmp_path_factory) -> Path:
    """Where the session's executed notebooks lie."""
    return tmp_path_factory.mktemp("executed")


@pytest.fixture(scope="session")
def executed_notebooks(tmp_path_factory, notebook_folder) -> dict[str, subprocess.CompletedProcess]:
    """Every notebook executed once with the smoke study, in the order of the Snakefile; how each ended, by name."""
    surroundings = os.environ | {"PIEBRIDGE_BUILD": str(tmp_path_factory.mktemp("notebooks_build"))}
    return {
        name: run_papermill(ROOT / "notebooks" / f"{name}.ipynb", notebook_folder / f"{name}.ipynb", surroundings)
        for name in notebook_order()
    }


def run_papermill(source: Path, target: Path, surroundings: dict[str, str], *parameters: str):
    """Execute a notebook with the smoke study as the Snakefile does."""
    command = [
        sys.executable, "-m", "papermill", str(source), str(target), "-p", "study", "params/smoke.yaml",
        "-p", "overrides", "", *parameters, "--no-progress-bar", "--log-level", "WARNING",
    ]
    return subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True)


def notebook_order() -> list[str]:
    """Names of all notebooks, each behind those that the Snakefile puts before it."""
    text = (ROOT / "Snakefile").read_text(encoding="utf-8")
    after = ast.literal_eval(re.search(r"^AFTER = (\{.*?^\})", text, re.DOTALL | re.MULTILINE).group(1))
    names = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    graph = {name: [other for other in after.get(name, []) if other in names] for name in names}
    return list(TopologicalSorter(graph).static_order())
