"""The house rules: floors, import direction, lengths, and no patch of another package."""

import ast
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY, MODELS, ANALYSIS = ROOT / "armed_pyro", ROOT / "models", ROOT / "analysis"
PACKAGES = {"armed_pyro": LIBRARY, "armed_pyro.models": MODELS, "armed_pyro.analysis": ANALYSIS}

PICKLES = {"pickle", "cloudpickle", "dill", "shelve"}
TO_ANALYSIS = {"armed_pyro.analysis", "analysis"}
TO_MODELS = {"armed_pyro.models", "models"}
LONGEST, LONGEST_FUNCTION = 500, 60


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
        ("models/x.py", "from armed_pyro.analysis.applications import fertility", True),
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
        ("armed_pyro/x.py", "from armed_pyro.analysis.applications import fertility", True),
        ("armed_pyro/x.py", "import pickle", True),
        ("armed_pyro/x.py", "import arviz as az", True),
        ("armed_pyro/x.py", "from armed_pyro.terms import Slopes", False),
        ("armed_pyro/summaries/datatree.py", "import arviz as az", False),
        ("models/x.py", "from armed_pyro.analysis.applications import fertility", True),
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


# ------------------------------------------------------------------------------------- floors

# Packages and files of the library, lowest floor first: none imports a higher floor.
FLOORS: list[set[str]] = [
    {
        "_free_space",
        "_memory",
        "_messages",
        "_optional",
        "_plotting",
        "_pyro_module",
        "_word",
        "distributions",
        "rows",
    },
    {"data", "engine", "networks", "priors"},
    {"families", "random_effects", "streaming"},
    {"program"},
    {"guides"},
    {"inference"},
    {"effects", "explain", "prediction", "report", "summaries"},
    {"automatic_weight", "checks", "plots", "storage"},
    {"fit_result", "fitting"},
    {"estimators", "formula_model", "tuning"},
    {"cli"},
]


def library_modules() -> dict[str, Path]:
    """Every module of the library by its full name; a package's is that of its __init__.py."""
    found = {}
    for path in LIBRARY.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def import_graph() -> dict[str, set[str]]:
    """The library's modules that each imports, under TYPE_CHECKING and in functions too."""
    files = library_modules()
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        if module == "armed_pyro":  # the face names all, and imports when a name is asked for
            continue
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        names = {name for _, name in imported_names(path.read_text("utf-8"), package)}
        # `from package import module` and `from module import name`.
        targets = {name if name in files else name.rpartition(".")[0] for name in names}
        graph[module] = (targets & files.keys()) - {module, "armed_pyro"}
    return graph


def floor_of(module: str) -> int:
    """Floor of a module's package, from 1."""
    room = module.split(".")[1]
    return next(number for number, floor in enumerate(FLOORS, 1) if room in floor)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Circles of imports: what is left when modules without imports are taken away again."""
    left = {module: set(targets) for module, targets in graph.items()}
    while free := [module for module, targets in left.items() if not targets & left.keys()]:
        for module in free:
            del left[module]
    return [sorted(left)] if left else []


def test_every_package_has_a_floor_and_there_are_at_most_eleven():
    rooms = {module.split(".")[1] for module in library_modules() if "." in module}
    assert rooms == set().union(*FLOORS)
    assert len(FLOORS) <= 11


def test_no_import_goes_up():
    upward = [
        f"{module} -> {target}"
        for module, targets in import_graph().items()
        for target in targets
        if floor_of(target) > floor_of(module)
    ]
    assert upward == []


def test_there_is_no_circle_of_files():
    assert circles(import_graph()) == []


def test_circles_are_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


# -------------------------------------------------------------------------- length and patches


def body_length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    return lines - ((function.body[0].end_lineno or 0) - function.body[0].lineno + 1)


def test_no_function_is_too_long():
    long = {
        f"{path.relative_to(ROOT)}:{node.name}": body_length(node)
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in long.items() if lines > LONGEST_FUNCTION} == {}


# Places of the standard library that are there to be assigned to.
HOOKS = ("os.environ[", "sys.modules[", "warnings.showwarning")


def foreign_patches(source: str) -> list[str]:
    """Assignments into modules and classes of other packages, and uses of mock."""
    tree, foreign = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(alias.name, alias.asname) for alias in node.names]
            foreign |= {(short or name).split(".")[0] for name, short in names}
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("armed_pyro"):
            foreign |= {alias.asname or alias.name for alias in node.names}

    def root(node: ast.expr) -> str:
        while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
            node = node.func if isinstance(node, ast.Call) else node.value
        return node.id if isinstance(node, ast.Name) else ""

    found = []
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = list(node.targets)
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"setattr", "delattr"}:
            found += [ast.unparse(node)] if root(node.args[0]) in foreign else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".setattr"):
            found += [ast.unparse(node)] if patched_elsewhere(node, foreign, root) else []
        found += [
            ast.unparse(node)
            for target in targets
            if isinstance(target, ast.Attribute | ast.Subscript)
            and root(target) in foreign
            and not ast.unparse(target).startswith(HOOKS)
        ]
    return found + [name for name in foreign if name in {"mock", "patch", "MagicMock"}]


def patched_elsewhere(call: ast.Call, foreign: set[str], root: Callable[[ast.expr], str]) -> bool:
    """Whether monkeypatch.setattr is told of something outside this project."""
    target = call.args[0]
    if isinstance(target, ast.Constant):
        return not str(target.value).startswith("armed_pyro.")
    return root(target) in foreign


def test_nothing_of_other_packages_is_patched():
    files = [*modules(), *(ROOT / "tests").glob("*.py")]
    patches = {
        str(path.relative_to(ROOT)): found
        for path in files
        if (found := foreign_patches(path.read_text("utf-8")))
    }
    assert patches == {}


@pytest.mark.parametrize(
    "statement",
    [
        "import torch\ntorch.add = None",
        "import torch._inductor.config as config\nconfig.x['a'] = 1",
        "from pyro import poutine\nsetattr(poutine, 'block', None)",
        "from unittest import mock",
        "import arviz\nmonkeypatch.setattr(arviz, 'loo', None)",
        "monkeypatch.setattr('torch.add', None)",
        "import torch\ndel torch.nn.Linear.forward",
    ],
)
def test_patches_are_seen(statement):
    assert foreign_patches(statement)


def test_nothing_writes_into_a_frozen_object():
    """No assignment through vars() or __dict__, and no object.__setattr__."""
    wrong = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            targets = node.targets if isinstance(node, ast.Assign) else []
            written = [ast.unparse(one) for one in targets if isinstance(one, ast.Subscript)]
            wrong += [text for text in written if text.startswith("vars(") or "__dict__" in text]
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "object.__setattr__":
                wrong.append(f"{path.name}: {ast.unparse(node)}")
    assert wrong == []


# ------------------------------------------------------------------- analyses: the public face

# Modules of the library that an analysis may import beside the names of `armed_pyro.__all__`.
FACE = (
    "armed_pyro.models",
    "armed_pyro.data.simulate",
    "armed_pyro.families.simulate",
    "armed_pyro.analysis",
)
# Parts of analysis/ in import order: each imports itself and the parts before it.
ANALYSES = ("figures", "rivals", "applications", "compare", "validation", "benchmarks")


def past_the_face(source: str, package: str) -> list[str]:
    """Imports of the library that are not public."""
    public = {f"armed_pyro.{name}" for name in importlib.import_module("armed_pyro").__all__}
    return [
        f"line {line}: {name}"
        for line, name in imported_names(source, package)
        if name.partition(".")[0] == "armed_pyro"
        and name not in public
        and not any(name == face or name.startswith(f"{face}.") for face in FACE)
    ]


def analyses() -> dict[str, Path]:
    """Files of analysis/ by their module's name, packages left out."""
    return {
        ".".join(path.relative_to(ANALYSIS).with_suffix("").parts): path
        for path in sorted(ANALYSIS.rglob("*.py"))
        if path.name != "__init__.py"
    }


def package_of(module: str) -> str:
    return ".".join(["armed_pyro.analysis", *module.split(".")[:-1]])


def test_analyses_import_the_public_face_alone():
    wrong = {
        module: past_the_face(path.read_text("utf-8"), package_of(module))
        for module, path in analyses().items()
        if not module.startswith("benchmarks.")  # these time parts of the library
    }
    assert {module: names for module, names in wrong.items() if names} == {}


@pytest.mark.parametrize(
    ("statement", "caught"),
    [
        ("from armed_pyro import Fit, fit", False),
        ("from armed_pyro.models.dense import dense", False),
        ("from armed_pyro.data.simulate import spirals", False),
        ("from armed_pyro.analysis import figures", False),
        ("import pandas", False),
        ("from armed_pyro import taps", True),
        ("from armed_pyro.data.clustered import ClusteredData", True),
        ("import armed_pyro.rows", True),
        ("def f():\n    from armed_pyro.engine.schedule import Plateau", True),
    ],
)
def test_imports_past_the_public_face_are_seen(statement, caught):
    assert bool(past_the_face(statement, "armed_pyro.analysis.rivals")) is caught


def test_parts_of_the_analyses_import_in_one_order():
    wrong = []
    for module, path in analyses().items():
        floor = ANALYSES.index(module.partition(".")[0])
        for _, name in imported_names(path.read_text("utf-8"), package_of(module)):
            part = name.removeprefix("armed_pyro.analysis.").partition(".")[0]
            if name.startswith("armed_pyro.analysis.") and ANALYSES.index(part) > floor:
                wrong.append(f"{module} imports {name}")
    assert wrong == []


COMMANDS = [name for name, path in analyses().items() if "__main__" in path.read_text("utf-8")]


@pytest.mark.parametrize("module", COMMANDS)
def test_every_analysis_explains_itself(module, capsys):
    pytest.importorskip("statsmodels")
    main = importlib.import_module(f"armed_pyro.analysis.{module}").main
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "--smoke" in capsys.readouterr().out or module == "benchmarks.benchmark"


# ------------------------------------------------------------------------- cheap imports

HELP = (
    "sys.argv = ['armed-pyro', '--help']; "
    "from armed_pyro.cli import app; app(standalone_mode=False)"
)
COMPILER = {"torch._dynamo", "torch._inductor", "triton", "sympy"}
SLOW = {
    "arviz",
    "arviz_base",
    "arviz_plots",
    "arviz_stats",
    "captum",
    "formulaic",
    "jinja2",
    "joblib",
    "matplotlib",
    "scipy.optimize",
    "scipy.sparse",
    "scipy.stats",
    "sklearn",
    "statsmodels",
}


@pytest.mark.parametrize(
    ("code", "not_loaded"),
    [
        ("import armed_pyro", {"torch", "pyro", "numpy", "pandas"} | COMPILER | SLOW),
        (HELP, {"torch", "pyro", "numpy", "pandas"} | COMPILER | SLOW),
        ("import torch, pyro; from armed_pyro import *", COMPILER | SLOW),
    ],
    ids=["import", "help", "every name"],
)
def test_slow_packages_are_imported_when_they_are_used(code, not_loaded):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print(*sys.modules, file=sys.stderr)"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stderr.split())
    assert "armed_pyro" in loaded
    assert sorted(loaded & not_loaded) == []


def test_public_names_are_those_that_a_type_checker_sees():
    source = ast.parse((LIBRARY / "__init__.py").read_text("utf-8"))
    seen = {
        alias.asname: statement.module
        for node in source.body
        if isinstance(node, ast.If)
        for statement in node.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    library = importlib.import_module("armed_pyro")
    assert seen == {name: f"armed_pyro.{home}" for name, home in library._MODULES.items()}
    assert set(library.__all__) <= set(dir(library))
    with pytest.raises(ImportError, match="cannot import name 'Fitt'"):
        exec("from armed_pyro import Fitt")


# -------------------------------------------------------------------------------- file length


def test_no_file_is_too_long():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in modules()
    }
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST} == {}
