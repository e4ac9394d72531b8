"""What users get: public names with docstrings and examples, and what a wheel installs."""

import ast
import importlib
import inspect
import re
import shutil
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path
from types import FunctionType

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY, MODELS, ANALYSIS = ROOT / "armed_pyro", ROOT / "models", ROOT / "analysis"


# ------------------------------------------------------------------------------- public names


def public_names() -> dict[str, object]:
    library = importlib.import_module("armed_pyro")
    return {name: getattr(library, name) for name in library.__all__}


def test_all_is_sorted_and_importable():
    library = importlib.import_module("armed_pyro")

    def rank(name: str) -> tuple[int, str]:  # the order of ruff's RUF022
        constant = len(name) > 1 and name.isupper()
        return 0 if constant else 1 if name[0].isupper() else 2, name

    assert len(set(library.__all__)) == len(library.__all__) > 0
    assert list(library.__all__) == sorted(library.__all__, key=rank)
    assert [name for name in library.__all__ if not hasattr(library, name)] == []


def test_public_names_have_docstrings():
    missing = []
    for name, value in public_names().items():
        if not (inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value)):
            continue  # a constant
        doc = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
        if not doc or not doc.strip() or doc.startswith(f"{name}("):  # a dataclass's own
            missing.append(name)
        members = vars(value) if inspect.isclass(value) else {}
        missing += [
            f"{name}.{member}"
            for member, found in members.items()
            if isinstance(found, FunctionType | property | classmethod | staticmethod)
            and not member.startswith("_")
            and not inspect.getdoc(getattr(value, member))  # its own, or the abstract class's
        ]
    assert missing == []


EXPLAINED = [
    *("adapt", "attribution", "boundaries", "compare_modes", "decoded", "draws", "hyperparameters"),
    *("invariance", "predict", "refine", "to_datatree", "variance_components"),
]


@pytest.mark.parametrize("verb", EXPLAINED)
def test_the_help_of_a_fits_method_explains_its_options(verb):
    method = getattr(public_names()["Fit"], verb)
    doc, (itself, *options) = inspect.getdoc(method), inspect.signature(method).parameters
    assert itself == "self"
    assert options
    assert not {"posterior", "classifiers"} & {*options}
    assert not re.search("^(posterior|classifiers) : ", doc, flags=re.MULTILINE)
    words = re.findall(r"\w+", doc)
    assert [option for option in options if option not in words] == []


def examples_in(docstring: str) -> str:
    """Return the doctest lines and the Examples section of a numpydoc docstring."""
    lines = [line.strip() for line in inspect.cleandoc(docstring).splitlines()]
    kept, inside = [], False
    for line, following in pairwise([*lines, ""]):
        if re.fullmatch(r"-{3,}", following):  # `line` is a section's heading
            inside = line in {"Example", "Examples"}
        elif inside or line.startswith((">>> ", "... ")):
            kept.append(line)
    return "\n".join(kept)


def test_examples_are_read_from_docstrings():
    doc = "Fit.\n\nExamples\n--------\nfit(model)\n\nSee Also\n--------\npredict\n"
    assert "fit(model)" in examples_in(doc)
    assert "predict" not in examples_in(doc)
    assert examples_in("Fit.\n\n>>> fit(m)\n") == ">>> fit(m)"


def test_public_names_are_shown_in_use():
    shown = [path.read_text("utf-8") for path in ANALYSIS.rglob("*.py")]
    if (ROOT / "README.md").exists():
        shown.append((ROOT / "README.md").read_text("utf-8"))
    for path in LIBRARY.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                shown.append(examples_in(ast.get_docstring(node) or ""))
    words = set(re.findall(r"\w+", "\n".join(shown)))
    unused = [name for name in public_names() if name not in words and not name.startswith("__")]
    assert unused == [], "show each in README.md, a docstring's example or a script in analysis/"


# -------------------------------------------------------------------------------------- wheel


def test_wheel_installs_nothing_but_armed_pyro(tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    for folder in [LIBRARY, MODELS, ANALYSIS]:
        shutil.copytree(
            folder, tree / folder.name, ignore=shutil.ignore_patterns("__pycache__", ".*")
        )
    # sdist first, then the wheel from the unpacked sdist: the longest way to a user
    build = "from setuptools import build_meta; print(build_meta.build_{}({!r}))"

    def run(kind: str, folder: Path) -> Path:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", build.format(kind, str(tmp_path))],
            capture_output=True,
            text=True,
            cwd=folder,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return tmp_path / done.stdout.splitlines()[-1]

    sdist = run("sdist", tree)
    shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    files = zipfile.ZipFile(run("wheel", unpacked)).namelist()

    top = {name.partition("/")[0] for name in files}
    assert {name for name in top if not name.endswith(".dist-info")} == {"armed_pyro"}
    needed = {"armed_pyro/py.typed", "armed_pyro/models/__init__.py"}
    assert needed | {"armed_pyro/report/page.html.jinja"} <= set(files)
    expected = {f"armed_pyro/{path.relative_to(LIBRARY)}" for path in LIBRARY.rglob("*.py")}
    for folder in [MODELS, ANALYSIS]:
        expected |= {f"armed_pyro/{path.relative_to(ROOT)}" for path in folder.rglob("*.py")}
    assert {name for name in files if name.endswith(".py")} == expected
