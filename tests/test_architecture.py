"""The house rules: import direction, file length, public names, and what a wheel installs."""

import ast
import importlib
import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import FunctionType

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY, MODELS, ANALYSIS = ROOT / "armed_pyro", ROOT / "models", ROOT / "analysis"
PACKAGES = {"armed_pyro": LIBRARY, "armed_pyro.models": MODELS, "armed_pyro.analysis": ANALYSIS}

PICKLES = {"pickle", "cloudpickle", "dill", "shelve"}
TO_ANALYSIS = {"armed_pyro.analysis", "analysis"}
TO_MODELS = {"armed_pyro.models", "models"}
LONGEST = 500


# ---------------------------------------------------------------------------- import direction


def imported_names(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Yield line and full name of all that a module of ``package`` imports, however it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).rpartition(".")[2]
            first = node.args[0]
            if called in {"import_module", "__import__"} and isinstance(first, ast.Constant):
                name = str(first.value)
                level = len(name) - len(name.lstrip("."))
                parents = package.split(".")[: len(package.split(".")) - level + 1]
                yield node.lineno, ".".join([*parents, name.lstrip(".")]) if level else name


def forbidden_imports(source: str, package: str, banned: set[str]) -> list[str]:
    return [
        f"line {line}: {name}"
        for line, name in imported_names(source, package)
        if any(name == ban or name.startswith(f"{ban}.") for ban in banned)
    ]


def banned_in(path: Path) -> set[str]:
    if LIBRARY in path.parents:
        arviz = set() if path == LIBRARY / "summaries/datatree.py" else {"arviz"}
        return PICKLES | TO_MODELS | TO_ANALYSIS | arviz
    if MODELS in path.parents:
        return PICKLES | TO_ANALYSIS | {"models", "arviz"}
    return PICKLES | {"models", "analysis"}


def modules() -> list[Path]:
    return sorted(path for folder in PACKAGES.values() for path in folder.rglob("*.py"))


def test_imports_go_from_analysis_to_models_to_library():
    wrong = {}
    for path in modules():
        package = next(name for name, folder in PACKAGES.items() if folder in path.parents)
        found = forbidden_imports(path.read_text("utf-8"), package, banned_in(path))
        if found:
            wrong[str(path.relative_to(ROOT))] = found
    assert wrong == {}


@pytest.mark.parametrize(
    ("folder", "statement", "caught"),
    [
        ("armed_pyro/x.py", "import armed_pyro.models.dense", True),
        ("armed_pyro/x.py", "from armed_pyro import models", True),
        ("armed_pyro/x.py", "from . import models", True),
        ("armed_pyro/x.py", "from .models.dense import dense", True),
        ("armed_pyro/x.py", "from models.dense import dense", True),
        ("armed_pyro/x.py", "from .analysis import fertility", True),
        ("armed_pyro/x.py", "def f():\n    import pickle", True),
        ("armed_pyro/x.py", "importlib.import_module('armed_pyro.models.dense')", True),
        ("armed_pyro/x.py", "importlib.import_module('.models.dense', __package__)", True),
        ("armed_pyro/x.py", "import arviz.preview as az", True),
        ("armed_pyro/x.py", "import armed_pyro.modelscope", False),
        ("armed_pyro/x.py", "from .datatree import to_datatree", False),
        ("armed_pyro/summaries/datatree.py", "import arviz.preview as az", False),
        ("armed_pyro/summaries/datatree.py", "from .models import dense", True),
        ("models/x.py", "from armed_pyro import MixedEffects", False),
        ("models/x.py", "from .dense import dense", False),
        ("models/x.py", "from ..analysis import fertility", True),
        ("models/x.py", "from armed_pyro.analysis import fertility", True),
        ("analysis/x.py", "from armed_pyro.models.dense import dense", False),
        ("analysis/x.py", "import arviz as az", False),
        ("analysis/x.py", "from models.dense import dense", True),
    ],
)
def test_forbidden_imports_are_seen(folder, statement, caught):
    path = ROOT / folder
    package = next(name for name, root in PACKAGES.items() if root in path.parents)
    assert bool(forbidden_imports(statement, package, banned_in(path))) is caught


@pytest.mark.parametrize(
    ("path", "statement", "caught"),
    [
        ("armed_pyro/x.py", "from armed_pyro.models import dense", True),
        ("armed_pyro/x.py", "from armed_pyro import models", True),
        ("armed_pyro/x.py", "import models", True),
        ("armed_pyro/x.py", "from armed_pyro.analysis import fertility", True),
        ("armed_pyro/x.py", "import pickle", True),
        ("armed_pyro/x.py", "import arviz as az", True),
        ("armed_pyro/x.py", "from armed_pyro.terms import Slopes", False),
        ("armed_pyro/summaries/datatree.py", "import arviz as az", False),
        ("models/x.py", "from armed_pyro.analysis import fertility", True),
        ("models/x.py", "import arviz as az", True),
        ("models/x.py", "from armed_pyro.models import dense", False),
        ("analysis/x.py", "from armed_pyro.models import dense", False),
        ("analysis/x.py", "import arviz as az", False),
        ("analysis/x.py", "import pickle", True),
        ("tests/test_x.py", "from armed_pyro.models import dense", False),
        ("tests/test_x.py", "import models", True),
    ],
)
def test_lint_catches_forbidden_imports(path, statement, caught):
    pytest.importorskip("ruff", reason="ruff is not installed")
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "TID251"]
    command += ["--output-format", "concise", "--stdin-filename", str(ROOT / path), "-"]
    done = subprocess.run(
        command, input=f"{statement}\n", capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == int(caught), done.stdout + done.stderr
    assert ("TID251" in done.stdout) is caught


def test_importing_the_library_imports_neither_arviz_nor_matplotlib():
    code = (
        "import sys, armed_pyro\n"
        "heavy = {'arviz', 'arviz_base', 'arviz_stats', 'arviz_plots', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# -------------------------------------------------------------------------------- file length


def test_no_file_is_too_long():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in modules()
    }
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST} == {}


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
    assert {"armed_pyro/py.typed", "armed_pyro/models/__init__.py"} <= set(files)
    expected = {f"armed_pyro/{path.relative_to(LIBRARY)}" for path in LIBRARY.rglob("*.py")}
    for folder in [MODELS, ANALYSIS]:
        expected |= {f"armed_pyro/{path.relative_to(ROOT)}" for path in folder.rglob("*.py")}
    assert {name for name in files if name.endswith(".py")} == expected
