"""Fits on disk: what is read does what was saved, and anything else is refused with a reason."""

import datetime
import json
import os
import shutil
import stat
import types
import warnings
import weakref
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from safetensors.torch import load_file
from torch import nn

from armed_pyro import (
    Adversary,
    ClusteredData,
    Exponential,
    Fit,
    HalfNormal,
    HalfStudentT,
    Known,
    MixedEffects,
    Priors,
    RandomEffects,
    Schedule,
    Slopes,
    StructuredGuide,
    fit,
)
from armed_pyro.engine.checkpoint import module_tensors
from armed_pyro.families.gaussian import Gaussian
from armed_pyro.networks.by_name import network
from armed_pyro.report.text import summarize
from armed_pyro.storage import save as storage
from armed_pyro.storage.checksums import sealed
from armed_pyro.storage.manifest import VERSION

SCHEDULE = Schedule(steps=30, batch_size=16)
FILES = {
    "model.safetensors",
    "manifest.json",
    "posterior.nc",
    "variance_components.csv",
    "fixed_effects.csv",
    "diagnostics.json",
}


def quick(model, data, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # fewer rows than parameters
        return fit(model, data, schedule=SCHEDULE, progress=False, **options)


def sequential(width=3):
    return nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 1))


def linear_fit():
    """A linear mixed model from a table: a category, nested factors, priors of every kind."""
    rng = np.random.default_rng(0)
    site, ward = np.repeat(np.arange(4), 10), np.tile(np.repeat([1, 2], 5), 4)
    frame = pd.DataFrame(
        {
            "y": rng.normal(size=4)[site] + rng.normal(size=40),
            "age": rng.normal(50, 10, 40),
            "sex": rng.choice(["f", "m"], 40),
            "site": [f"s{one}" for one in site],
            "ward": ward,
            "w": rng.uniform(0.5, 2, 40),
        },
        index=pd.Index(np.arange(40) * 3 + 7, name="id"),
    )
    data = ClusteredData.from_frame(
        frame, outcome="y", clusters=["site", "ward"], features="age * sex", weights="w"
    )
    priors = Priors(
        sd={"site": Exponential({"age": 0.5}), "site:ward": HalfNormal(2.0)},
        cor=2.0,
        fixed_sd=1.5,
        residual_sd=HalfStudentT(3.0, df=4.0),
    )
    terms = ["(1 + age | site)", "(1 | site:ward)"]
    net = network("linear", data.n_features)
    model = MixedEffects(net, terms, bayesian_head=True, fixed_weight=0.5, priors=priors)
    return quick(model, data, seed=3)


def bernoulli_fit():
    """A network with slopes on a hidden layer and an adversary; timestamps as clusters."""
    rng = np.random.default_rng(1)
    site = np.repeat(pd.date_range("2024-01-01", periods=4, tz="Europe/Berlin"), 10)
    data = ClusteredData.from_arrays(
        rng.normal(size=(40, 2)),
        np.where(rng.random(40) < 0.5, "yes", "no"),
        {"site": site},
        offset=rng.normal(size=40),
    )
    torch.manual_seed(0)
    game = Adversary("site", ["1"], weight=2.0, hidden=(5,), warmup=0.3)
    terms = ["(1 | site)", Slopes("site", on="1", correlated=True)]
    return quick(MixedEffects(sequential(), terms, "bernoulli", game), data)


def categorical_fit():
    rng = np.random.default_rng(2)
    frame = pd.DataFrame(
        {
            "kind": rng.choice(["a", "b", "c"], 40),
            "x": rng.normal(size=40),
            "z": rng.normal(size=40),
            "site": np.repeat([10, 2, 33, 4], 10),
        }
    )
    data = ClusteredData.from_frame(frame, outcome="kind", clusters=["site"])
    torch.manual_seed(0)
    net = network("dense", 2, 3, hidden=(4,))
    return quick(MixedEffects(net, "(1 + x || site)", "categorical"), data)


FITS = {
    "linear": (linear_fit, None),
    "bernoulli": (bernoulli_fit, sequential),
    "categorical": (categorical_fit, None),
}


@pytest.fixture(scope="module", params=FITS)
def saved(request, tmp_path_factory):
    """A fit, the folder it was saved to, and the fit read from there."""
    make, net = FITS[request.param]
    result, folder = make(), tmp_path_factory.mktemp("saved") / "new" / request.param
    result.save(folder, draws=20)
    return result, folder, Fit.load(folder, None if net is None else net())


@pytest.fixture(scope="module")
def small():
    """A fit with a network of the user's own."""
    rng = np.random.default_rng(3)
    data = ClusteredData.from_arrays(
        rng.normal(size=(20, 2)), rng.normal(size=20), {"site": np.repeat([0, 1], 10)}
    )
    torch.manual_seed(0)
    return quick(MixedEffects(sequential(), "(1 | site)"), data)


@pytest.fixture(scope="module")
def pristine(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "run"
    small.save(folder, draws=5)
    return folder


@pytest.fixture
def run(pristine, tmp_path):
    """A copy of the small fit's folder, to be damaged."""
    return shutil.copytree(pristine, tmp_path / "run")


def edit(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    change(manifest)
    seal(folder, manifest)


def seal(folder, manifest=None):
    """Write the manifest with the sums of the folder's files, as whoever changes them could."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text("utf-8")) if manifest is None else manifest
    files = sorted(FILES - {path.name})
    path.write_text(json.dumps(sealed(manifest, path.name, folder, files)), "utf-8")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------------------------------------ round trip


def test_the_tensors_and_settings_come_back(saved):
    result, _, read = saved
    for one, other in [(result.model, read.model), (result.guide, read.guide)]:
        mine, its = module_tensors("", one), module_tensors("", other)
        assert mine.keys() == its.keys()
        for name in mine:
            assert mine[name].dtype == its[name].dtype, name
            assert torch.equal(mine[name], its[name]), name
    assert read.model.terms == result.model.terms
    assert read.model.priors == result.model.priors
    assert read.model.family == result.model.family
    assert read.model.bayesian_head == result.model.bayesian_head
    assert read.model.fixed_weight == result.model.fixed_weight
    settings = [game.settings() for game in result.model.adversaries]
    assert [game.settings() for game in read.model.adversaries] == settings
    assert (read.history, read.schedule) == (result.history, result.schedule)
    assert (read.seed, read.stopped) == (result.seed, result.stopped)
    assert not read.model.training


def test_a_fit_saved_before_there_were_fresh_probes_is_loaded(tmp_path):
    make, net = FITS["bernoulli"]
    result = make()
    result.save(tmp_path / "run", draws=5)

    def older(manifest):
        for game in manifest["model"]["adversaries"]:
            del game["warmup_epochs"]
        for name in ("warmup", "probes", "weights"):
            del manifest["training"]["history"][name]

    edit(tmp_path / "run", older)
    read = Fit.load(tmp_path / "run", net())
    assert read.model.adversaries[0].settings() == result.model.adversaries[0].settings()
    assert (read.history.warmup, read.history.probes, read.history.weights) == ([], [], [])
    assert "Adversary: site, on 1, weight 2\n" in summarize(read.results())
    checks = {check.name: check for check in read.diagnostics().checks}
    assert "training rows" in checks["adversary"].reason


def test_the_training_rows_come_back(saved):
    result, _, read = saved
    for name, mine in vars(result.data).items():
        its = getattr(read.data, name)
        if isinstance(mine, torch.Tensor):
            assert mine.dtype == its.dtype, name
            assert torch.equal(mine, its), name
        elif name == "row_labels":
            pd.testing.assert_index_equal(its, mine, exact="equiv")
        elif name == "groupings":
            assert list(mine) == list(its)
            for factor, grouping in mine.items():
                assert torch.equal(grouping.codes, its[factor].codes)
                pd.testing.assert_index_equal(grouping.levels, its[factor].levels)
        elif name == "schema":
            assert (its and its.to_json()) == (mine and mine.to_json())
        else:
            assert mine == its, name


def test_predictions_are_the_same_to_the_bit(saved):
    result, _, read = saved
    mine, its = result.predict(result.data, draws=50), read.predict(read.data, draws=50)
    np.testing.assert_array_equal(mine.expected, its.expected)
    np.testing.assert_array_equal(mine.outcome, its.outcome)
    pd.testing.assert_frame_equal(mine.to_frame(), its.to_frame(), check_index_type="equiv")


def test_results_are_the_same_to_the_bit(saved):
    result, folder, read = saved
    table = result.variance_components()
    pd.testing.assert_frame_equal(table, read.variance_components(), check_exact=True)
    pd.testing.assert_frame_equal(result.fixed_effects(), read.fixed_effects(), check_exact=True)
    tree = result.to_datatree(draws=20)
    assert tree.identical(read.to_datatree(draws=20))
    written = pd.read_csv(folder / "variance_components.csv", keep_default_na=False)
    pd.testing.assert_frame_equal(table, written, check_dtype=False)
    with xr.open_datatree(folder / "posterior.nc", engine="h5netcdf") as file:
        assert sorted(file.children) == sorted(tree.children)
        for group in tree.children:
            kept, made = file[group].dataset, tree[group].dataset
            if group in storage.DRAWN:  # in single precision
                xr.testing.assert_allclose(kept, made, rtol=1e-6)
            else:
                xr.testing.assert_equal(kept, made)


def test_fixed_effects_and_probability_are_saved(saved, tmp_path):
    result, _, _ = saved
    result.save(tmp_path / "run", draws=2, prob=0.5)
    written = pd.read_csv(tmp_path / "run" / "fixed_effects.csv", keep_default_na=False)
    pd.testing.assert_frame_equal(written, result.fixed_effects(prob=0.5), check_dtype=False)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text("utf-8"))["prob"] == 0.5
    with pytest.raises(ValueError, match=r"write 0\.95"):
        result.save(tmp_path / "other", prob=95)
    assert not (tmp_path / "other").exists()


def test_draws_stay_in_double_precision_where_single_would_lose_them():
    rng = np.random.default_rng(0)
    dims = ("chain", "draw", "term")
    draws = xr.Dataset(
        {
            "near": (dims, 6e6 + 0.5 * rng.normal(size=(1, 50, 2))),
            "plain": (dims, rng.normal(size=(1, 50, 2))),
            "known": (dims, np.full((1, 50, 2), 0.1)),
            "count": (dims, np.ones((1, 50, 2), np.int64)),
        }
    )
    kept = storage._narrow(draws)
    kinds = {name: str(array.dtype) for name, array in kept.data_vars.items()}
    assert kinds == {"near": "float64", "plain": "float32", "known": "float64", "count": "int64"}
    xr.testing.assert_equal(kept[["near", "known", "count"]], draws[["near", "known", "count"]])


def test_a_fit_read_and_saved_again_is_the_same(saved, tmp_path):
    _, folder, read = saved
    read.save(tmp_path / "again", draws=20)
    one, other = contents(folder), contents(tmp_path / "again")
    assert one.keys() == other.keys() == FILES
    for name in FILES - {"posterior.nc", "model.safetensors"}:
        assert one[name] == other[name], name
    mine = load_file(folder / "model.safetensors")
    its = load_file(tmp_path / "again" / "model.safetensors")
    assert mine.keys() == its.keys()
    assert all(torch.equal(mine[name], its[name]) for name in mine)


def test_a_new_table_is_encoded_as_the_training_table_was(tmp_path):
    result = linear_fit()
    result.save(tmp_path / "run", draws=2)
    read = Fit.load(tmp_path / "run")
    table = pd.DataFrame(
        {"age": [40.0, 60.0], "sex": ["m", "m"], "site": ["s1", "new"], "ward": [1, 1]}
    )
    mine = result.predict(table, unseen="marginal", draws=20).to_frame()
    pd.testing.assert_frame_equal(mine, read.predict(table, unseen="marginal", draws=20).to_frame())
    assert mine["unseen"].tolist() == ["", "marginal"]


def test_diagnostics_tell_how_training_ended(saved):
    result, folder, _ = saved
    diagnostics = json.loads((folder / "diagnostics.json").read_text("utf-8"))
    elbo = np.mean(result.history.elbo) * 40
    games = [
        {"factor": "site", "accuracy": a, "chance": 0.25, "weight": 2.0, "warmup_steps": warmup}
        for a, warmup in zip(
            result.history.adversary_accuracy[-1], result.history.warmup, strict=True
        )
    ]
    assert len(games) == len(result.model.adversaries)
    assert diagnostics == {
        **json.loads(json.dumps(result.diagnostics().to_json())),
        "converged": False,
        "stopped": "steps",
        "steps": 30,
        "elbo": pytest.approx(elbo),
        "adversaries": games,
        "fresh_probes": result.history.probes,
        "weights_tried": [],
    }


def test_the_manifest_holds_what_it_should(small, pristine):
    manifest = json.loads((pristine / "manifest.json").read_text("utf-8"))
    assert manifest["format"] == "armed_pyro fit"
    assert manifest["armed_pyro"] == version("armed_pyro")
    assert manifest["network"] == {
        "made_by": None,
        "dtype": "float32",
        "parameters": {"0.weight": [3, 2], "0.bias": [3], "2.weight": [1, 3], "2.bias": [1]},
        "folds": {"networks": 5, "factor": None, "clusters": 0},
    }
    assert manifest["model"]["random"] == [
        {
            "kind": "RandomEffects",
            "factor": "site",
            "slopes": [],
            "intercept": True,
            "correlated": True,
            "covariance": None,
            "categorical": [],
            "parameter": "",
            "group": "",
        }
    ]
    assert manifest["guide"] == "StructuredGuide"


ROWS = {
    "dates": pd.Index([datetime.date(2024, 1, day) for day in range(1, 21)], dtype=object),
    "timestamps": pd.date_range("2024-01-01", periods=20),
    "zoned": pd.date_range("2024-01-01", periods=20, tz="UTC"),
    "text": pd.Index([f"row {i}" for i in range(20)]),
    "twice": pd.Index([1, 2] * 10),
    "floats": pd.Index(np.arange(20) / 8),
}


@pytest.mark.parametrize("kind", ROWS)
def test_labels_of_rows_come_back(small, tmp_path, kind):
    data = ClusteredData(**{**vars(small.data), "row_labels": ROWS[kind]})
    Fit(replace(small.posterior, data=data)).save(tmp_path, draws=2)
    read = Fit.load(tmp_path, sequential())
    assert read.data.row_labels.equals(ROWS[kind])
    assert read.data.row_labels.dtype == ROWS[kind].dtype


def test_composite_labels_of_rows_become_text(small, tmp_path):
    pairs = pd.MultiIndex.from_product([["a", "b"], range(10)], names=["one", "other"])
    data = ClusteredData(**{**vars(small.data), "row_labels": pairs})
    Fit(replace(small.posterior, data=data)).save(tmp_path, draws=2)
    assert Fit.load(tmp_path, sequential()).data.row_labels[11] == "('b', 1)"


CLUSTERS = {
    "int": [7, -2, 30, 4],
    "float": [0.5, 1.5, -1.0, 2.0],
    "text": ["d", "a", "", "é"],
    "category": pd.Categorical(["d", "a", "c", "b"], categories=["d", "c", "b", "a"]),
    "timestamp": pd.date_range("2024-03-01", periods=4, freq="h"),
    "date": [datetime.date(2024, 1, day) for day in (4, 2, 3, 1)],
    "mixed": [1, "1", "a", 2],
}


@pytest.mark.parametrize("kind", CLUSTERS)
def test_clusters_of_any_type_come_back(tmp_path, kind):
    rng = np.random.default_rng(4)
    labels = pd.Series(CLUSTERS[kind]).repeat(5).reset_index(drop=True)
    data = ClusteredData.from_arrays(np.zeros((20, 0)), rng.normal(size=20), {"site": labels})
    result = quick(MixedEffects(network("linear", 0), "(1 | site)"), data)
    result.save(tmp_path / "run", draws=2)
    read = Fit.load(tmp_path / "run")
    pd.testing.assert_index_equal(read.data.grouping("site").levels, data.grouping("site").levels)
    assert read.data.grouping("site").labels().tolist() == labels.tolist()
    np.testing.assert_array_equal(
        result.predict(data, draws=5).expected, read.predict(data, draws=5).expected
    )


def test_images_known_priors_and_no_clusters_come_back(tmp_path):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(20, 1, 2, 2)).astype(np.float32)
    data = ClusteredData.from_arrays(x, rng.normal(size=20), {})
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 1))
    priors = Priors(residual_sd=Known(2.0))
    result = quick(MixedEffects(net, priors=priors), data)
    result.save(tmp_path / "run", draws=2)
    read = Fit.load(tmp_path / "run", nn.Sequential(nn.Flatten(), nn.Linear(4, 1)))
    assert read.data.features.dtype == torch.float32
    assert torch.equal(read.data.features, data.features)
    np.testing.assert_array_equal(
        result.predict(result.data, draws=5).outcome, read.predict(read.data, draws=5).outcome
    )


# ----------------------------------------------------------------------------------- the network


def test_the_callers_network_and_generator_are_left_alone(pristine):
    net, state = sequential(), torch.get_rng_state()
    before = {name: one.clone() for name, one in net.state_dict().items()}
    read = Fit.load(pristine, net)
    assert all(torch.equal(one, before[name]) for name, one in net.state_dict().items())
    assert not torch.equal(read.model.net[0].weight, net[0].weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_network_of_another_precision_is_converted(small, pristine):
    net = sequential().double()
    read = Fit.load(pristine, net)
    assert read.model.net[0].weight.dtype == torch.float32
    assert net[0].weight.dtype == torch.float64
    np.testing.assert_array_equal(
        small.predict(small.data, draws=5).expected, read.predict(small.data, draws=5).expected
    )


def test_without_the_network_its_user_is_asked_for_it(pristine):
    with pytest.raises(ValueError, match=r"network of your own.*Fit\.load\(folder, net="):
        Fit.load(pristine)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (sequential(4), r"'0\.weight' has shape \[4, 2\], the fit's \[3, 2\]"),
        (nn.Sequential(nn.Linear(2, 3), nn.ReLU()), r"'2\.weight' has shape None"),
        (
            nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1), nn.Linear(1, 1)),
            r"'3\.weight' has shape \[1, 1\], the fit's None",
        ),
    ],
)
def test_another_network_is_refused_with_its_first_difference(pristine, net, message):
    with pytest.raises(ValueError, match=message):
        Fit.load(pristine, net)


@pytest.mark.parametrize(
    ("made_by", "message"),
    [
        ({"name": "no_such", "arguments": {"n_features": 2}}, "no_such.*cannot be made.*net="),
        ({"name": "dense", "arguments": {"layers": 3, "n_features": 2}}, "cannot be made.*net="),
        ({"name": "dense"}, r"field 'network\.made_by\.arguments': Field required"),
        ({"name": "dense", "arguments": {"n_features": 2, "hidden": [9]}}, r"'0\.weight'.*net="),
    ],
)
def test_a_network_that_cannot_be_made_is_refused(run, made_by, message):
    edit(run, lambda manifest: manifest["network"].update(made_by=made_by))
    with pytest.raises(ValueError, match=message):
        Fit.load(run)


def test_a_file_that_a_manifest_names_is_not_executed(run, tmp_path):
    script = tmp_path / "net.py"
    script.write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nmake = None\n")
    made_by = {"name": f"{script}:make", "arguments": {"n_features": 2}}
    edit(run, lambda manifest: manifest["network"].update(made_by=made_by))
    with pytest.raises(ValueError, match=r"names a file.*not executed"):
        Fit.load(run)
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------------- what is wrong


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        Fit.load(tmp_path / "nowhere")


def test_a_folder_without_a_fit(tmp_path):
    with pytest.raises(ValueError, match=r"holds no fit \(no manifest\.json\)"):
        Fit.load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "posterior.nc"])
def test_a_missing_file(run, name):
    (run / name).unlink()
    with pytest.raises(ValueError, match=f"holds no {name}: the fit is incomplete"):
        Fit.load(run, sequential())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("name", ["model.safetensors", "posterior.nc", "manifest.json"])
def test_a_damaged_file(run, name, share):
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[: int(share * len(content))])
    if name != "manifest.json":
        seal(run)
    with pytest.raises(ValueError, match=f"{name} is damaged or was changed"):
        Fit.load(run, sequential())


def test_tensors_of_another_fit(run, tmp_path):
    bernoulli_fit().save(tmp_path / "other", draws=2)
    (tmp_path / "other" / "model.safetensors").replace(run / "model.safetensors")
    seal(run)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or was changed"):
        Fit.load(run, sequential())


def test_rows_of_another_fit(run, tmp_path):
    rng = np.random.default_rng(6)
    clusters = {"site": np.repeat([5, 6], 10)}
    data = ClusteredData.from_arrays(rng.normal(size=(20, 2)), rng.normal(size=20), clusters)
    quick(MixedEffects(sequential(), "(1 | site)"), data).save(tmp_path / "other", draws=2)
    (tmp_path / "other" / "posterior.nc").replace(run / "posterior.nc")
    seal(run)
    with pytest.raises(ValueError, match="clusters of 'site' that the manifest"):
        Fit.load(run, sequential())


@pytest.mark.parametrize("content", ['{"format": "something else"}', "[1, 2]", "{}"])
def test_a_foreign_manifest(run, content):
    (run / "manifest.json").write_text(content, "utf-8")
    with pytest.raises(ValueError, match="was not written by armed_pyro"):
        Fit.load(run, sequential())


@pytest.mark.parametrize("number", [VERSION + 1, None])
def test_a_newer_version(run, number):
    edit(run, lambda manifest: manifest.update(version=number, armed_pyro="9.1.0"))
    with pytest.raises(ValueError, match=rf"armed_pyro 9\.1\.0;.*reads version {VERSION}: update"):
        Fit.load(run, sequential())


CHANGES = {
    "no facts": lambda manifest: manifest.pop("facts"),
    "guide": lambda manifest: manifest.update(guide="AutoNormal"),
    "family": lambda manifest: manifest["model"].update(family="no_such_family"),
    "term": lambda manifest: manifest["model"]["random"][0].update(kind="Term"),
    "term's field": lambda manifest: manifest["model"]["random"][0].update(extra=1),
    "prior": lambda manifest: manifest["model"]["priors"].update(sd={"all": {"kind": "eval"}}),
    "dtype": lambda manifest: manifest["network"].update(dtype="load"),
    "schedule": lambda manifest: manifest["training"]["schedule"].update(steps=-1),
    "game": lambda manifest: manifest["model"].update(adversaries=[{}]),
    "kind of value": lambda manifest: manifest.update(model=[]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_manifest(run, change):
    edit(run, CHANGES[change])
    with pytest.raises(ValueError, match=r"manifest\.json is damaged or was changed"):
        Fit.load(run, sequential())


# ---------------------------------------------------------------------------------------- saving


def test_a_fit_replaces_a_fit_and_keeps_other_files(small, run):
    (run / "report.html").write_text("mine")
    edit(run, lambda manifest: manifest.update(armed_pyro="0.0.0"))
    small.save(str(run), draws=5)
    assert {path.name for path in run.iterdir()} == FILES | {"report.html"}
    assert (run / "report.html").read_text() == "mine"
    assert json.loads((run / "manifest.json").read_text())["armed_pyro"] == version("armed_pyro")
    assert [path.name for path in run.parent.iterdir()] == ["run"], "nothing may be left over"


@pytest.mark.parametrize("held", [[], ["checkpoint.safetensors"]])
def test_an_empty_folder_or_a_run_cut_short_is_filled(small, tmp_path, held):
    for name in held:
        (tmp_path / name).write_text("state")
    small.save(tmp_path, draws=5)
    assert {path.name for path in tmp_path.iterdir()} == FILES | set(held)


@pytest.mark.parametrize(
    "held", [{"thesis.txt": "years"}, {"manifest.json": "{}"}, {"manifest.json": '{"format'}]
)
def test_a_folder_of_other_files_is_not_touched(small, tmp_path, held):
    for name, content in held.items():
        (tmp_path / name).write_text(content)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"holds other files .* choose a new folder"):
        small.save(tmp_path)
    assert contents(tmp_path) == before


def test_a_file_is_not_a_folder(small, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        small.save(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("failing", ["_write_groups", "_training_end", "_put"])
def test_a_failed_save_leaves_the_old_fit_whole(small, run, monkeypatch, failing):
    before = contents(run)

    def fail(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr(storage, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        small.save(run)
    assert contents(run) == before
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_what_cannot_be_saved_is_said_before_the_checks(small, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr(type(small), "diagnostics", lambda _: pytest.fail("checks were made"))
    with pytest.raises(ValueError, match="holds other files"):
        small.save(tmp_path)


def test_a_failed_rename_puts_the_old_fit_back(small, run, monkeypatch):
    before, rename = contents(run), type(run).rename

    def fail(path, target):
        if path.name == "posterior.nc" and path.parent.name.startswith(storage.DRAFT):
            raise OSError("not possible")
        return rename(path, target)

    monkeypatch.setattr(type(run), "rename", fail)
    with pytest.raises(OSError, match="not possible"):
        small.save(run, draws=2)
    assert contents(run) == before
    assert [path.name for path in run.parent.iterdir()] == ["run"]


@pytest.mark.skipif(os.name == "nt", reason="permissions are of POSIX")
def test_files_are_as_readable_as_others(small, tmp_path):
    small.save(tmp_path / "run", draws=2)
    (tmp_path / "other").write_text("")
    expected = stat.S_IMODE((tmp_path / "other").stat().st_mode)
    for path in (tmp_path / "run").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == expected, path.name


def test_large_groups_are_left_out_and_drawn_again(small, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "LARGEST_GROUP", 4 * 5 * 20 - 1)
    small.save(tmp_path / "run", draws=5)
    with xr.open_datatree(tmp_path / "run" / "posterior.nc", engine="h5netcdf") as tree:
        groups = {"posterior", "prior", "observed_data", "constant_data", "sample_stats"}
        assert {*tree.children} == groups
    read = Fit.load(tmp_path / "run", sequential())
    assert read.to_datatree(draws=5).identical(small.to_datatree(draws=5))


def test_groups_are_written_one_after_the_other(small, tmp_path, monkeypatch):
    """Of what was written nothing is held while the next group is made."""
    made = []

    def watched(make):
        def group(*given):
            assert all(one() is None for one in made)
            found = make(*given)
            made.extend(weakref.ref(one.data) for one in found.data_vars.values())
            return found

        return group

    groups = {name: watched(make) for name, make in storage.GROUPS.items()}
    monkeypatch.setattr(storage, "GROUPS", groups)
    small.save(tmp_path / "run", draws=5)
    assert len(made) > len(groups)


class OwnTerm(RandomEffects):
    pass


class OwnFamily(Gaussian):
    pass


class OwnPrior(HalfNormal):
    pass


class OwnGuide(StructuredGuide):
    pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"random": OwnTerm("site")}, "term or prior OwnTerm cannot be saved"),
        ({"family": OwnFamily()}, "family OwnFamily cannot be saved.*gaussian"),
        ({"priors": Priors(residual_sd=OwnPrior(1.0))}, "prior OwnPrior cannot be saved"),
    ],
)
def test_parts_that_could_not_be_read_are_not_written(small, tmp_path, options, message):
    settings = {"net": sequential(), "random": "(1 | site)"} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        stub = types.SimpleNamespace(
            facts=small.model.facts,
            data_facts=small.model.data_facts,
            **{
                name: getattr(MixedEffects(**settings), name)
                for name in (
                    *("net", "terms", "family", "priors", "adversaries"),
                    *("bayesian_head", "fixed_weight", "dtype", "network_reference"),
                )
            },
        )
    with pytest.raises(ValueError, match=message):
        Fit(replace(small.posterior, model=stub)).save(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_guide_that_is_not_listed_is_not_written(small, tmp_path):
    guide = OwnGuide(small.model)
    with pytest.raises(ValueError, match=r"guide OwnGuide cannot be saved: list it in storage"):
        Fit(replace(small.posterior, guide=guide)).save(tmp_path / "run")
    assert not (tmp_path / "run").exists()
