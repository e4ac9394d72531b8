"""``armed-pyro demo``: a demonstration registered by an installed package."""

from __future__ import annotations

from importlib.metadata import entry_points

from armed_pyro.cli.options import DemoOptions

__all__ = ["run_demo"]


def run_demo(options: DemoOptions) -> None:
    """Run the demonstration registered as ``fertility`` under ``armed_pyro.demos``.

    Raises
    ------
    ValueError
        If the demonstration, or a package that it needs, is not installed.
    """
    registered = list(entry_points(group="armed_pyro.demos", name="fertility"))
    if not registered:
        raise ValueError("the demonstration is not installed: install armed_pyro again")
    try:
        main = registered[0].load()
    except ModuleNotFoundError as error:
        raise ValueError(f"the demo needs {error.name}: see armed_pyro[analysis]") from error
    main(["--out", str(options.folder)])
