"""The pages: worked examples run in a smoke form, `make docs` reads all, the reference is whole."""

import re
import sys
from pathlib import Path

import pytest
import torch

import armed_pyro

DOCS = Path(__file__).resolve().parents[1] / "docs"
EXAMPLES = sorted(path.stem for path in (DOCS / "examples").glob("*.md") if path.stem != "index")
# The whole fits run in `make docs`.
FULL, SMOKE = ".fit(progress=False)", ".fit(steps=10, progress=False)"

sys.path.insert(0, str(DOCS))
from run_examples import ExampleError, with_results  # noqa: E402


@pytest.mark.parametrize("name", ["../index", *EXAMPLES])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_examples_of_a_page_run_print_and_draw(name):
    text = (DOCS / "examples" / f"{name}.md").read_text("utf-8")
    assert FULL in text
    with torch.random.fork_rng():
        shown = with_results(text.replace(FULL, SMOKE), name)
    assert shown.count("```text\n") == len(
        re.findall(r"^```python\n(?:(?!```).*\n)*?.*print\(", text, re.M)
    )
    assert shown.count('<img class="result"') == len(re.findall(r"^figure = ", text, re.M))


def test_blocks_share_names_and_results_follow_them():
    page = "Text.\n\n```python\na = 1\n```\n\nMore.\n\n```python\nprint(a + 1)\n```\n\nEnd.\n"
    shown = with_results(page, "page")
    assert shown == page.replace("print(a + 1)\n```", "print(a + 1)\n```\n\n```text\n2\n```")


def test_an_example_that_fails_is_named():
    page = "```python\na = 1\n```\n```python\na / 0\n```\n"
    with pytest.raises(ExampleError, match=r"page \(example 2\): ZeroDivisionError"):
        with_results(page, "page")


def test_every_public_name_is_in_the_reference_once():
    pages = [path.read_text("utf-8") for path in (DOCS / "reference").glob("*.md")]
    named = re.findall(r"^\.\. (?:auto\w+|py:data):: armed_pyro\.(\w+)$", "\n".join(pages), re.M)
    assert sorted(named) == sorted(set(armed_pyro._MODULES))


def test_every_page_is_in_a_table_of_contents():
    listed = set()
    for path in DOCS.rglob("*.md"):
        for tree in re.findall(
            r"^```\{toctree\}\n(.*?)^```$", path.read_text("utf-8"), re.M | re.S
        ):
            entries = [line for line in tree.splitlines() if line and not line.startswith(":")]
            names = [re.sub(r"^.*<(.*)>$", r"\1", entry) for entry in entries]
            listed |= {(path.parent / f"{name}.md").resolve() for name in names}
    assert {path.resolve() for path in DOCS.rglob("*.md")} - listed == {
        (DOCS / "index.md").resolve()
    }


def test_links_between_pages_lead_somewhere():
    for path in DOCS.rglob("*.md"):
        for link in re.findall(r"\]\(([^)#\s]+?)(?:#[^)]*)?\)", path.read_text("utf-8")):
            assert link.startswith("https://") or (path.parent / link).exists(), (path, link)
