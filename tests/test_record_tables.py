"""The book's table that compares variants, built from a small file."""

import re
import subprocess
import sys

import pandas as pd
import pytest
from tiny import ROOT

PAGE = """# Page

```{record-comparison} routes.csv
:reference: highest loss
```
"""


@pytest.fixture
def build(tmp_path):
    """Builds a page of one directive; gives the process and the page's text without tags."""
    (tmp_path / "records").mkdir()
    (tmp_path / "index.md").write_text(PAGE, encoding="utf-8")
    (tmp_path / "conf.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'book' / '_ext')!r})\n"
        "extensions = ['myst_parser', 'record_tables']\n"
    )

    def run(table):
        if table is not None:
            table.to_csv(tmp_path / "records" / "routes.csv", index=False)
        command = [sys.executable, "-m", "sphinx", "-q", "-W", "-E", str(tmp_path), str(tmp_path / "html")]
        ended = subprocess.run(command, capture_output=True, text=True)
        page = tmp_path / "html" / "index.html"
        return ended, re.sub(r"<[^>]+>|\s+", " ", page.read_text(encoding="utf-8")) if page.is_file() else ""

    return run


def test_a_table_a_study(build):
    rows = [
        ("one", "original", 0, 1.0, 80.0), ("one", "original", 1, 1.0, 82.0),
        ("one", "highest loss", 0, 0.4, 79.0), ("one", "highest loss", 1, 0.4, 80.5),
        ("two", "highest loss", 0, 0.5, 60.0), ("two", "highest loss", 1, 0.5, 61.0),
    ]
    ended, text = build(pd.DataFrame(rows, columns=["study", "variant", "seed", "cost", "test_accuracy"]))
    assert ended.returncode == 0, ended.stderr
    words = " ".join(text.split())
    assert "one , 2 seeds: variant cost accuracy (%) points below “highest loss” original 1.000 81.00" in words
    # differences -1 and -1.5: half a width of 12.706 * 0.25
    assert "81.00 -1.25 ± 3.18 highest loss 0.400 79.75 - two , 2 seeds:" in words
    assert "highest loss 0.500 60.50 -" in words


def test_without_the_file_the_book_fails(build):
    ended, _ = build(None)
    assert ended.returncode != 0
    assert "routes.csv" in ended.stderr
