"""The report for readers: its sentences, pictures, references, Word, and how a browser shows it."""

import html
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest

import armed_pyro
from armed_pyro import to_word
from armed_pyro.plots.report_pictures import report_pictures
from armed_pyro.report.cells import as_text
from armed_pyro.report.story import report
from armed_pyro.report.words import formula, methods, question, references

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def patients() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    site = np.repeat(np.arange(8), 15)
    age = rng.normal(60, 10, len(site))
    dose = rng.choice(["low", "high"], len(site))
    risk = 0.05 * (age - 60) + (dose == "high") + rng.normal(size=8)[site]
    ill = np.where(rng.random(len(site)) < 1 / (1 + np.exp(-risk)), "yes", "no")
    return pd.DataFrame({"ill": ill, "age": age, "dose": dose, "site": [f"s{k}" for k in site]})


@pytest.fixture(scope="module")
def binary():
    program = armed_pyro.model("ill ~ age + dose + (1 | site)", patients(), family="bernoulli")
    return program.fit(steps=60, progress=False)


@pytest.fixture(scope="module")
def numbers():
    table = patients().assign(score=lambda t: t["age"] / 10 + (t["dose"] == "high"))
    table["score"] += np.random.default_rng(1).normal(size=len(table))
    table["late"] = 1.0 * (table["age"] > 60)
    program = armed_pyro.model("score ~ I(age**2) + late + (1 + late | site)", table)
    return program.fit(steps=60, progress=False)


def story(fit, prob=0.8):
    pictures = report_pictures(fit.plot, prob=prob)
    return report(fit.results(prob=prob), fit.random_effects(prob=prob), pictures=pictures)


def blocks(content, kind):
    return [b for s in content.sections for b in s.blocks if type(b).__name__ == kind]


def test_the_question_names_event_features_and_clusters(binary):
    asked, program = question(binary.results())
    assert asked == (
        "How does ill = 'yes' depend on age and dose? "
        "The data are 120 rows from 8 clusters of site."
    )
    assert "Every cluster of site has its own effect on the intercept." in program
    assert formula(binary.model) == "ill ~ age + dose + (1 | site)"


def test_the_variance_components_are_told_with_the_numbers_of_their_table(numbers):
    results = numbers.results(prob=0.8)
    text = " ".join(paragraph.text for paragraph in blocks(story(numbers), "Paragraph"))
    table = results.variance_components.set_index(["factor", "term", "statistic"])
    for term, name in (("Intercept", "the intercept"), ("late", "late")):
        row = table.loc[("site", term, "sd")]
        found = re.search(rf"([\d.]+) \(80% interval ([\d.]+) to ([\d.]+)\) for {name}", text)
        told = [float(number) for number in found.groups()]
        # The last digit shown is the second of the sd.
        assert told == pytest.approx(
            [row["median"], row["lower"], row["upper"]], abs=0.06 * row["sd"]
        )
    icc = table.loc[("site", "", "icc")]
    assert f"clusters of site account for {icc['median']:.0%} (80% interval" in text
    assert "these effects are correlated" in text


def test_shares_of_a_binary_outcome_are_said_to_be_those_of_the_predictor(binary, numbers):
    texts = [" ".join(p.text for p in blocks(story(fit), "Paragraph")) for fit in (binary, numbers)]
    assert ["on the scale of the linear predictor" in text for text in texts] == [True, False]


def test_pictures_are_those_of_the_variables_and_the_others_are_named(binary, numbers):
    drawn = report_pictures(binary.plot, prob=0.9)
    assert [p.alt for p in drawn.effects] == [f"Expected outcome over {n}" for n in ("age", "dose")]
    assert len(drawn.fit) == 2
    assert drawn.notes == {}
    # The square of a column does not tell its sign.
    loaded = report_pictures(numbers.plot, prob=0.9)
    shown = [picture.alt for picture in loaded.effects]
    assert shown[-1] == "Expected outcome over late"
    assert (len(shown) == 1) == ("effect of age is not drawn" in loaded.notes.get("effects", ""))


def test_odds_ratios_are_quantiles_of_exponentials(binary):
    exact = binary.fixed_effects(prob=0.8, exponentiate=True).set_index("term")
    shown = next(b.frame for b in blocks(story(binary), "Table") if "odds ratio" in b.frame)
    assert shown["term"].tolist() == ["age", "dose[T.low]"]
    for row in shown.itertuples(index=False):
        expected = exact.loc[row[0], ["median", "lower", "upper"]]
        np.testing.assert_allclose(row[1:], expected.to_numpy(float), rtol=1e-3)


def test_what_was_not_checked_is_listed(binary):
    unchecked = [
        check.name for check in binary.diagnostics().checks if check.verdict == "not checked"
    ]
    listed = [item for bullets in blocks(story(binary), "Bullets") for item in bullets.items]
    assert unchecked
    assert all(any(item.startswith(f"{name}: ") for item in listed) for name in unchecked)


def cited(text: str) -> set[tuple[str, str]]:
    """Family name of the first author and year of every work that a text cites."""
    pattern = r"([A-Z][a-z]+)(?: et al\.| and [A-Z][a-z]+)?,? \(?((?:\d{4}(?:, )?)+)"
    return {
        (name, year)
        for name, years in re.findall(pattern, text)
        for year in re.findall(r"\d{4}", years)
    }


def test_every_citation_has_its_reference_and_the_reverse(binary, numbers):
    table, hidden = patients(), {"net": "dense", "adversary": "site"}
    deep = armed_pyro.model("ill ~ age + dose + (1 | site)", table, family="bernoulli", **hidden)
    deep = deep.fit(steps=20, progress=False, validation=None)
    for fit in (binary, numbers, deep):
        names = cited(" ".join(methods(fit.results())))
        listed = references(fit.posterior)
        found = {re.match(r"([A-Za-z]+) .*?\((\d{4})\)", entry).groups() for entry in listed}
        assert names == found


def test_a_report_is_written_by_its_ending(binary, tmp_path):
    path = tmp_path / "new" / "report.html"
    binary.report(path, title="A & B")
    text = path.read_text("utf-8")
    assert "<h1>A &amp; B</h1>" in text
    assert "@media print" in text
    for heading in ("The question", "What the model says", "Methods, for a paper"):
        assert f"<h2>{heading}</h2>" in text
    assert text.count("<img") == 2 + 2 + 1 + 1  # effects, fit, clusters, loss
    for wrong in ("report.pdf", "report", "."):
        with pytest.raises(ValueError, match=r"must end in \.html or \.docx|is a folder"):
            binary.report(tmp_path / wrong)
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_word_has_the_sections_tables_and_pictures_of_the_page(binary, tmp_path):
    docx = pytest.importorskip("docx")
    path = tmp_path / "report.docx"
    binary.report(path, prob=0.8)
    written, content = docx.Document(str(path)), story(binary)
    headings = [p.text for p in written.paragraphs if p.style.name == "Heading 1"]
    assert headings == [section.title for section in content.sections]
    tables = [as_text(table.frame) for table in blocks(content, "Table")]
    assert len(written.tables) == len(tables)
    for shown, expected in zip(written.tables, tables, strict=True):
        cells = [[cell.text for cell in row.cells] for row in shown.rows]
        assert cells == [list(expected.columns), *expected.astype(str).to_numpy().tolist()]
    pictures = sum(len(gallery.pictures) for gallery in blocks(content, "Gallery"))
    assert len(written.inline_shapes) == pictures
    assert max(shape.width.inches for shape in written.inline_shapes) <= 6


def test_tables_go_to_word(binary, tmp_path):
    docx = pytest.importorskip("docx")
    path, table = tmp_path / "table.docx", pd.DataFrame({"term": ["a\x00b"], "mean": [1.25]})
    to_word(table, path, title="Table 1", note="A note.")
    written = docx.Document(str(path))
    assert [p.text for p in written.paragraphs if p.text] == ["Table 1", "A note."]
    assert [cell.text for cell in written.tables[0].rows[1].cells] == ["a\ufffdb", "1.25"]
    for result in (binary.diagnostics(), binary.variance_components(), binary.slopes("age")):
        to_word(result, path)
    binary.slopes("age").to_word(path)
    assert "slope" in docx.Document(str(path)).paragraphs[0].text.lower()
    with pytest.raises(ValueError, match=r"must end in \.docx"):
        to_word(table, tmp_path / "table.doc")
    with pytest.raises(TypeError, match="found int"):
        to_word(3, path)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("width", [390, 1600])
def test_a_browser_shows_the_page_without_scrolling_sideways(binary, tmp_path, width):
    page, frame = tmp_path / "report.html", tmp_path / "frame.html"
    binary.report(page, title="averyveryverylongnamewithoutanyspace" * 4)
    frame.write_text(
        f'<iframe id="f" width="{width}" height="900" style="border:0" '
        f'srcdoc="{html.escape(page.read_text("utf-8"))}"></iframe><script>'
        "window.onload = () => { const d = document.getElementById('f').contentDocument;"
        "document.title = [d.documentElement.clientWidth, d.documentElement.scrollWidth,"
        "[...d.images].filter(i => i.complete && i.naturalWidth > 50).length].join(' ') }</script>",
        encoding="utf-8",
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [*command, profile, frame.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    client, scroll, images = map(int, re.search("<title>(.*?)</title>", done.stdout)[1].split())
    assert width - 20 <= client <= width
    assert scroll <= client
    assert images == 6
