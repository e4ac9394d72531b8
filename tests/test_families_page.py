"""docs/families.md: its table is the registry's, and its example runs."""

import re
from pathlib import Path

import torch

from armed_pyro.families.ordinal import Ordinal
from armed_pyro.families.registry import FAMILIES, family_named

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"


def rows_of_the_table():
    lines = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_lists_every_family_with_its_links_and_parameters():
    table = {row[0].strip("`").partition("(")[0]: row for row in rows_of_the_table()}
    assert set(table) == set(FAMILIES)
    for name, (_, _, _, links, parameters) in table.items():
        if "`f`" in links:
            continue  # those of the family inside
        known = getattr(FAMILIES[name], "links", None)
        if known is not None:
            assert links.split(", ") == list(known), name
        if FAMILIES[name] is not Ordinal:
            family = family_named(name)
            assert re.findall("`(.+?)`", parameters) == [p.name for p in family.parameters], name


def test_the_example_finds_what_was_simulated():
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.M)
    names = {"__name__": "families_page"}
    with torch.random.fork_rng():
        exec(compile(code, str(PAGE), "exec"), names)
    table = names["result"].variance_components(prob=0.99)
    zi = table[table["statistic"] == "zi"].iloc[0]
    assert zi["lower"] < 0.25 < zi["upper"]
    effects = names["result"].fixed_effects(prob=0.99).set_index("term").loc["dose"]
    assert effects["lower"] < 0.3 < effects["upper"]
