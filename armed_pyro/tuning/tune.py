"""tune(): settings chosen by cross-validation on held-out clusters or rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch

from armed_pyro._messages import INTEGER, check_type
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.engine.schedule import Schedule
from armed_pyro.inference.train import progress_bar
from armed_pyro.program.model import MixedEffects
from armed_pyro.tuning.folds import By, Fold, Task, make_folds
from armed_pyro.tuning.result import Criterion, Scored, Tuning, choose, described, score_table
from armed_pyro.tuning.settings import Grid, Settings, changed, distances, grid_of

__all__ = ["single", "tune"]


def tune(
    model: MixedEffects | Callable[[Settings], MixedEffects],
    data: ClusteredData,
    by: By = "clusters",
    over: Grid | None = None,
    *,
    factor: str | None = None,
    folds: int = 5,
    unseen: str = "marginal",
    support: int = 0,
    criterion: Criterion = "log_score",
    schedule: Schedule | None = None,
    draws: int = 400,
    workers: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Tuning:
    r"""Choose settings of a program by cross-validation on clusters or rows that training lacks.

    .. math:: score(s) = \frac{1}{N} \sum_i \log p(y_i \mid x_i, data_{-fold(i)}, s)

    Each combination of settings s is fitted to each fold's training rows, and every row is scored
    once as a test row. Standard errors take clusters, not rows, as independent. The chosen
    combination is the one nearest to the default among those whose `criterion` is within one
    standard error of the best, where the standard error is that of the difference. A
    distance is the number of steps in the lists of values, summed over the settings; the default
    is the model's present value if it is listed, otherwise the first listed value.

    Parameters
    ----------
    model : MixedEffects or callable
        The program, not fitted. A callable gets a mapping of settings and returns a program, for
        settings that are no arguments of `MixedEffects`, such as widths of the network.
    by : {"clusters", "rows"}
        "clusters" holds out whole clusters of `factor`, to choose for predictions of new clusters.
        "rows" holds out rows of every cluster, to choose for new rows of seen clusters. With
        crossed factors, only the clusters of `factor` are held out; clusters of other factors stay
        in training as far as they have other rows.
    over : mapping of str to sequence, or a sequence of these
        Values of each setting: arguments of `MixedEffects` by their names, and those of its
        adversaries with the prefix ``adversary_``, such as ``adversary_weight``. All combinations
        are tried; a sequence of mappings is a union of such grids.
    factor : str, optional
        Grouping factor whose clusters are held out, and over which standard errors are taken; by
        default the program's first.
    folds : int
        Number of folds, at most the number of clusters or rows.
    unseen : str
        Mode in which held-out clusters are predicted; see `Fit.predict`.
    support : int
        Labelled rows of each held-out cluster to which the posterior is adapted before the other
        rows are scored; above 0, `unseen` is "adapt".
    criterion : {"log_score", "rmse", "accuracy"}
        What to choose by: the log predictive density, which judges predictions with their
        uncertainty, or the error of predictive means, "rmse", or of classes, "accuracy".
    schedule : Schedule, optional
        Length and learning rates of every fit. By default ``Schedule(folds=1, fold_by=by)``: a
        fifth of the training clusters or rows stops one network, where `fit` cross-fits five.
    draws : int
        Posterior draws of the predictions.
    workers : int, optional
        Processes that fit, with one thread each; by default as many as there are cores, and one on
        a GPU. The result does not depend on their number.
    seed : int
        Seed of folds and fits, the same for every combination.
    progress : bool
        Whether to show a progress bar.
    **options
        Further arguments of `fit`, for every fit. `refine` is False by default.

    Returns
    -------
    Tuning
        The table of scores, `best`, `chosen`, and the program with the chosen settings, `model`.

    Raises
    ------
    ValueError
        If the program lacks a setting, is fitted already, or cannot be made with a value; if there
        are fewer clusters than folds; or if there is nothing to choose from.
    RuntimeError
        If every combination has a fit that diverged.

    References
    ----------
    Breiman, Friedman, Olshen, Stone (1984), Classification and Regression Trees, section 3.4.3: the
    rule of one standard error. Roberts et al. (2017), Ecography 40(8): folds of whole clusters.

    Examples
    --------
    >>> from armed_pyro.data.simulate import wages
    >>> data, _ = wages(20, 4)
    >>> model = MixedEffects(torch.nn.Linear(data.n_features, 1), "(1 | id)", bayesian_head=True)
    >>> tuning = tune(  # real use needs more steps
    ...     model, data, over={"random": ["(1 | id)", "(1 + exper | id)"]}, folds=2,
    ...     schedule=Schedule(steps=20), workers=1, progress=False,
    ... )
    >>> tuning.table.columns[:3].tolist()
    ['random', 'log_score', 'log_score_se']
    """
    grid = grid_of({} if over is None else over)
    models = _programs(model, data, grid, by)
    _check_criterion(criterion, models)
    factor = _factor(models[0], data, factor)
    parts = _folds(data, by, factor, folds, support, seed)
    settings: dict[str, Any] = {**options, "schedule": single(by) if schedule is None else schedule}
    mode = "adapt" if support else unseen
    tasks = [
        Task(number, made, part, factor, mode, draws, seed, settings)
        for part in parts
        for number, made in enumerate(models)
    ]
    results, errors = _run(tasks, _workers(workers, options.get("device", "auto")), progress)
    lost = [sum(number == k for number, _ in errors) for k in range(len(grid))]
    if all(lost):
        raise RuntimeError(f"every combination has a fit that diverged, the first: {errors[0][1]}")
    scored = _scored(results, lost)
    table = score_table(grid, scored, criterion, classes=models[0].family.is_class)
    template = model if isinstance(model, MixedEffects) else None
    best, chosen = choose(table, distances(grid, template), criterion)
    return Tuning(
        table.assign(failed=lost),
        tuple(grid),
        best,
        chosen,
        models[chosen],
        criterion,
        _design(by, factor, folds, support, scored),
        tuple(f"{described(grid[number])}: {text}" for number, text in errors),
    )


def single(by: By) -> Schedule:
    """One network for each combination and fold; cross-fitting in every fold would train five."""
    return Schedule(folds=1, fold_by=by)


def _programs(
    model: MixedEffects | Callable[[Settings], MixedEffects],
    data: object,
    grid: Sequence[Settings],
    by: object,
) -> list[MixedEffects]:
    """The program of every combination, after checks of the arguments."""
    check_type(data, ClusteredData, "data", "Read the rows into memory: ClusteredData.from_frame.")
    if by not in get_args(By):
        raise ValueError(f"`by` must be 'clusters' or 'rows', not {by!r}")
    if isinstance(model, MixedEffects):
        made = [changed(model, settings) for settings in grid]
    else:
        check_type(model, Callable, "model", "Pass a MixedEffects.")  # type: ignore[arg-type]
        made = [model(dict(settings)) for settings in grid]
    for program in [model, *made] if isinstance(model, MixedEffects) else made:
        check_type(program, MixedEffects, "the program that `model` returns")
        if program.facts is not None:
            raise ValueError(
                "the model is fitted already, and its network has seen the rows that would be held "
                "out: pass the model that was given to fit()"
            )
    return made


def _check_criterion(criterion: Criterion, models: Sequence[MixedEffects]) -> None:
    """Raise ValueError unless all programs have the criterion."""
    classes = {model.family.is_class for model in models}
    if len(classes) > 1:
        raise ValueError("the families of `over` must all be of classes, or all of numbers")
    known = ("log_score", "accuracy" if classes == {True} else "rmse")
    if criterion not in known:
        raise ValueError(f"`criterion` must be {known[0]!r} or {known[1]!r}, not {criterion!r}")


def _factor(model: MixedEffects, data: ClusteredData, factor: str | None) -> str | None:
    """The factor over whose clusters scores are summed; None if there is none."""
    if factor is None:
        return next(iter((*model.grouping_names(), *data.groupings)), None)
    data.grouping(factor)  # for its error
    return factor


def _folds(
    data: ClusteredData, by: By, factor: str | None, n: int, support: int, seed: int
) -> list[Fold]:
    """The folds, after checks of their number and of the support."""
    for name, value in {"folds": n, "support": support, "seed": seed}.items():
        check_type(value, INTEGER, name)
    if support and by == "rows":
        raise ValueError("`support` adapts to held-out clusters: use it with by='clusters'")
    if by == "clusters":
        if factor is None:
            raise ValueError("by='clusters' needs a grouping factor, and there is none: by='rows'")
        clusters = data.grouping(factor).n_clusters
        # Each training part needs two clusters for a variance between clusters.
        if not 2 <= n <= clusters or clusters - -(-clusters // n) < 2:
            raise ValueError(
                f"{n} folds of the {clusters} clusters of {factor!r} are not possible: `folds` "
                "must lie between 2 and the number of clusters, and every training part needs 2 "
                "clusters"
            )
    return list(make_folds(data, by, factor, n, support=support, seed=seed))


def _workers(workers: int | None, device: str) -> int:
    """Number of processes."""
    if workers is None:
        on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        return 1 if on_gpu else -1
    check_type(workers, INTEGER, "workers")
    if workers < 1:
        raise ValueError(f"`workers` must be at least 1, not {workers}")
    return workers


def _run(
    tasks: Sequence[Task], workers: int, progress: bool
) -> tuple[list[tuple[int, pd.DataFrame]], list[tuple[int, str]]]:
    """Sums of scores, and errors, of all tasks, each with the number of its combination."""
    from joblib import Parallel, delayed  # slow to import

    results, errors = [], []
    calls = (delayed(task.run)() for task in tasks)
    with progress_bar("tuning", "fit", len(tasks), progress) as report:
        for done, (number, outcome) in enumerate(
            Parallel(workers, backend="loky", return_as="generator")(calls), 1
        ):
            if isinstance(outcome, str):
                errors.append((number, outcome))
            else:
                results.append((number, outcome))
            report(done, f"{len(errors)} diverged" if errors else "")
    return results, errors


def _scored(results: Sequence[tuple[int, pd.DataFrame]], lost: Sequence[int]) -> Scored:
    """Sums by combination and cluster, over the folds; NaN for combinations with a lost fit."""
    by_setting = [
        pd.concat([frame for place, frame in results if place == number]).groupby(level=0).sum()
        if not lost[number]
        else None
        for number in range(len(lost))
    ]
    complete = next(frame for frame in by_setting if frame is not None)
    missing = np.full(len(complete), np.nan)

    def matrix(name: str) -> np.ndarray:
        return np.stack(
            [
                missing if frame is None else frame[name].reindex(complete.index).to_numpy()
                for frame in by_setting
            ]
        )

    return Scored(complete["rows"].to_numpy(), matrix("log_score"), matrix("loss"))


def _design(by: By, factor: str | None, folds: int, support: int, scored: Scored) -> str:
    """The cross-validation in words."""
    clusters, rows = len(scored.rows), int(scored.rows.sum())
    held = f"held-out clusters of {factor!r}" if by == "clusters" else "held-out rows"
    adapted = f", adapted to {support} row(s) of each" if support else ""
    units = "rows" if factor is None else f"the {clusters} clusters of {factor!r}"
    return (
        f"{folds}-fold cross-validation on {held}{adapted}: {rows} scored rows, standard errors "
        f"over {units}"
    )
