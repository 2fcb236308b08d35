"""What the README says of the committed records is what they say."""

from tiny import ROOT

from piebridge.records import read_table, speedups


def test_the_claims_of_the_readme():
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    table = read_table(ROOT / "book" / "records" / "end_to_end.csv")
    compared = speedups(table[table["study"] == "caltech101_resnet18"])
    ours = compared.loc["piebridge"]
    assert "PieBridge halves the time of `pet`" in text and ours["faster_than_pet"] >= 2.0
    assert "ten times faster than `full`" in text and ours["faster_than_full"] >= 10
    assert "for less than a point of `pet`'s accuracy" in text and -1 < ours["points_above_pet"] < 0
    assert "did no better than random ones" in text and ours["test_accuracy"] <= compared.loc["random", "test_accuracy"]
    assert "faster still and exact" in text and compared.loc["cached", "train_seconds"] < ours["train_seconds"]


def test_every_link_of_the_readme_leads_somewhere():
    import re

    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
