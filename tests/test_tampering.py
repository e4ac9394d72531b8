"""Saved fits whose files were changed: each change is named, and no other file is ever read."""

import json
import os
import shutil
import sys
import warnings
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from armed_pyro import ClusteredData, Fit, MixedEffects, Schedule, fit
from armed_pyro.engine.checkpoint import Checkpoint
from armed_pyro.storage.checksums import sealed
from armed_pyro.storage.run_lock import locked

FILES = {
    "model.safetensors",
    "manifest.json",
    "posterior.nc",
    "variance_components.csv",
    "fixed_effects.csv",
    "diagnostics.json",
}


def network(activation=nn.ReLU):
    return nn.Sequential(nn.Linear(2, 3), activation(), nn.Linear(3, 1))


def small_fit(seed=0, **options):
    rng = np.random.default_rng(3)
    data = ClusteredData.from_arrays(
        rng.normal(size=(20, 2)), rng.normal(size=20), {"site": np.repeat([0, 1], 10)}
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few rows
        schedule = Schedule(steps=30, batch_size=16)
        model = MixedEffects(network(), "(1 | site)")
        return fit(model, data, schedule=schedule, progress=False, **options)


@pytest.fixture(scope="module")
def small():
    return small_fit()


@pytest.fixture(scope="module")
def other():
    return small_fit(seed=1)


@pytest.fixture(scope="module")
def pristine(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "run"
    small.save(folder, draws=5)
    return folder


@pytest.fixture
def run(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "run")


def seal(folder, **changes):
    """Write sums of the files as they are, as whoever changes files on purpose could."""
    path = folder / "manifest.json"
    manifest = {**json.loads(path.read_text("utf-8")), **changes}
    path.write_text(json.dumps(sealed(manifest, path.name, folder, FILES - {path.name})), "utf-8")


# ----------------------------------------------------------------------------------- checksums


@pytest.mark.parametrize("name", sorted(FILES - {"manifest.json"}))
def test_a_single_flipped_bit_is_named(run, name):
    content = bytearray((run / name).read_bytes())
    content[len(content) // 2] ^= 1
    (run / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} was changed after .* verify=False"):
        Fit.load(run, network())


def test_a_changed_number_in_the_manifest_is_named(run):
    text = (run / "manifest.json").read_text("utf-8")
    assert '"spread": ' in text
    (run / "manifest.json").write_text(text.replace('"spread": ', '"spread": 1'), "utf-8")
    with pytest.raises(ValueError, match=r"manifest\.json was changed"):
        Fit.load(run, network())


def test_line_ends_of_the_manifest_do_not_matter(run):
    content = (run / "manifest.json").read_bytes()
    (run / "manifest.json").write_bytes(content.replace(b"\n", b"\r\n"))
    Fit.load(run, network())


def test_weights_of_another_fit_of_the_same_architecture_are_named(other, run, tmp_path):
    other.save(tmp_path / "other", draws=2)
    (tmp_path / "other" / "model.safetensors").replace(run / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors was changed"):
        Fit.load(run, network())


def test_a_file_that_was_changed_on_purpose_can_be_read(small, run):
    (run / "fixed_effects.csv").write_text("mine")
    with pytest.raises(ValueError, match=r"fixed_effects\.csv was changed"):
        Fit.load(run, network())
    read = Fit.load(run, network(), verify=False)
    np.testing.assert_array_equal(
        read.predict(small.data, draws=5).expected, small.predict(small.data, draws=5).expected
    )


def test_a_fit_without_sums_is_read_with_a_note(small, run):
    path = run / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    for name in ("checksums", "probe"):
        del manifest[name]
    for name in ("rows", "columns"):
        del manifest["data"][name]
    path.write_text(json.dumps(manifest), "utf-8")
    with pytest.warns(UserWarning, match="kept no checksums"):
        read = Fit.load(run, network())
    assert torch.equal(read.data.features, small.data.features)
    np.testing.assert_array_equal(
        read.predict(small.data, draws=5).expected, small.predict(small.data, draws=5).expected
    )


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.Identity])
def test_a_network_that_computes_something_else_is_refused(pristine, activation):
    with pytest.raises(ValueError, match=r"network is not that of the fit.*activation functions"):
        Fit.load(pristine, network(activation))
    Fit.load(pristine, network(activation), verify=False)


def test_a_network_with_random_outputs_has_no_probe(tmp_path):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(1, 1)

        def forward(self, x):
            return self.line(x) + torch.randn(len(x), 1)

    data = ClusteredData.from_arrays(torch.randn(20, 1), torch.randn(20), {"s": [0, 1] * 10})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = fit(MixedEffects(Noisy(), "(1 | s)"), data, schedule=Schedule(4), progress=False)
    result.save(tmp_path / "run", draws=2)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text("utf-8"))["probe"] is None
    Fit.load(tmp_path / "run", Noisy())


@pytest.mark.parametrize("step", [0, 1, 4, 6, 9, 11])
def test_a_process_killed_while_files_are_moved_leaves_a_whole_fit(small, other, run, step):
    """A process that ends before its nth move; the folder is whole again under its lock."""
    moves = iter(range(100))

    def end(event, _):
        if event == "os.rename" and next(moves) >= step:
            os._exit(9)

    child = os.fork()
    if not child:
        try:  # the child must never return into the test run
            sys.addaudithook(end)
            other.save(run, draws=2)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    with locked(run):
        pass
    assert {path.name for path in run.iterdir()} == FILES
    read = Fit.load(run, network())
    kept = small if step == 0 else other
    assert torch.equal(read.model.net[0].weight, kept.model.net[0].weight)


# ------------------------------------------------------------------------------- the manifest

WRONG = {
    "network.made_by": lambda m: m["network"].update(made_by=["dense"]),
    "network.parameters.0.weight": lambda m: m["network"]["parameters"].update({"0.weight": 3}),
    "training.schedule.steps": lambda m: m["training"]["schedule"].update(steps="many"),
    "training.seed": lambda m: m["training"].update(seed=None),
    "training.history.loss": lambda m: m["training"]["history"].update(loss=3.0),
    "facts.n_rows": lambda m: m["facts"].update(n_rows="20"),
    "facts.spread": lambda m: m["facts"].update(spread=float("nan")),
    "facts.center": lambda m: m["facts"].update(center=[0.0, 1.0]),
    "facts.feature_scale": lambda m: m["facts"].update(feature_scale=[1.0, 0.0]),
    "facts.feature_mean": lambda m: m["facts"].update(feature_mean=[1.0]),
    "facts.counts.site": lambda m: m["facts"]["counts"].update(site=[10]),
    "facts.levels.site.values": lambda m: m["facts"]["levels"]["site"].update(values="ab"),
    "model.random.0": lambda m: m["model"]["random"][0].update(kind="Term"),
    "model.random.0.slopes": lambda m: m["model"]["random"][0].update(slopes=3),
    "model.random.0.extra": lambda m: m["model"]["random"][0].update(extra=3),
    "model.priors.residual_sd": lambda m: m["model"]["priors"].update(residual_sd={"kind": "eval"}),
    "model.family": lambda m: m["model"].update(family="gama"),
    "model.parameters.sigma": lambda m: m["model"].update(parameters={"sigma": 1}),
    "model.parameters": lambda m: m["model"].update(parameters={"zi": "1"}),
    "model.fixed_weight": lambda m: m["model"].update(fixed_weight="1"),
    "guide": lambda m: m.update(guide="AutoNormal"),
    "data.levels": lambda m: m["data"].update(levels=[1]),
    "data.rows": lambda m: m["data"].update(rows=-1),
    "prob": lambda m: m.update(prob=2.0),
}


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_field_of_the_manifest_is_named(run, field):
    manifest = json.loads((run / "manifest.json").read_text("utf-8"))
    WRONG[field](manifest)
    seal(run, **manifest)
    expected = rf"manifest\.json is damaged or was changed.*{field}".replace("residual_sd", "")
    with pytest.raises(ValueError, match=expected):
        Fit.load(run, network())


def test_a_network_larger_than_the_fit_is_not_made(run):
    made_by = {"name": "dense", "arguments": {"n_features": 2, "hidden": [10**9]}}
    manifest = json.loads((run / "manifest.json").read_text("utf-8"))
    seal(run, network={**manifest["network"], "made_by": made_by})
    with pytest.raises(ValueError, match=r"network is not the fit's.*\[1000000000, 2\]"):
        Fit.load(run)


def test_labels_of_rows_beyond_their_type_are_an_error(run):
    with h5py.File(run / "posterior.nc", "r+") as file:
        values = file["observed_data/row"][...]
        del file["observed_data/row"]
        file["observed_data"].create_dataset("row", data=values + 300)
    manifest = json.loads((run / "manifest.json").read_text("utf-8"))
    seal(run, data={**manifest["data"], "row_dtype": "int8"})
    with pytest.raises(ValueError, match=r"posterior\.nc is damaged or was changed"):
        Fit.load(run, network())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda draws: draws[:, :, :0], r"shape \(20, 2, 0\), expected \(20, 2, 1\)"),
        (lambda draws: draws.fill_(torch.inf), "not all finite"),
        (lambda draws: None, "missing"),
    ],
)
def test_refined_draws_of_another_shape_are_refused(run, change, message):
    tensors = load_file(run / "model.safetensors")
    base = {k: v for k, v in tensors.items() if not k.startswith("refined.")}
    posterior = small_posterior(run)
    draws = dict(posterior.guide.draws(posterior.model.clusters(), 20))
    effect = change(draws.pop("site_effect").clone())
    draws |= {} if effect is None else {"site_effect": effect}
    kept = {f"refined.{k}": v.detach().contiguous() for k, v in draws.items()}
    save_file(base | kept, run / "model.safetensors")
    seal(run, refined={"method": "psis", "quality": {}})
    with pytest.raises(ValueError, match=rf"model\.safetensors .*'site_effect'.*{message}"):
        Fit.load(run, network())


def small_posterior(run):
    return Fit.load(run, network(), verify=False).posterior


# ----------------------------------------------------------------------------------- posterior.nc


def external_link(group, values, secret):
    with h5py.File(secret, "w") as other:
        other.create_dataset("y", data=np.arange(20.0))
    group["outcome"] = h5py.ExternalLink(str(secret), "y")


def external_storage(group, values, secret):
    secret.write_bytes(np.arange(20.0).tobytes())
    group.create_dataset("outcome", (20,), "f8", external=[(str(secret), 0, 160)])


def virtual_dataset(group, values, secret):
    with h5py.File(secret, "w") as other:
        other.create_dataset("y", data=np.arange(20.0))
    layout = h5py.VirtualLayout((20,), "f8")
    layout[:] = h5py.VirtualSource(str(secret), "y", (20,))
    group.create_virtual_dataset("outcome", layout)


def soft_link(group, values, secret):
    group["other"], group["outcome"] = values, h5py.SoftLink("/observed_data/other")


def references(group, values, secret):
    group.create_dataset("outcome", data=[group.ref] * 20, dtype=h5py.ref_dtype)


def nested_group(group, values, secret):
    group.create_group("outcome").create_dataset("y", data=values)


def claimed(group, values, secret):
    group.create_dataset("outcome", (10**12,), "f8", chunks=(10**5,), compression="gzip")


def wrong_length(group, values, secret):
    group.create_dataset("outcome", data=values[:-1])


def text(group, values, secret):
    group.create_dataset("outcome", data=["1"] * 20)


def not_finite(group, values, secret):
    values[3] = np.nan
    group.create_dataset("outcome", data=values)


def bomb(group, values, secret):
    """One block of 1 MB that inflates to 1 GB."""
    data = group.create_dataset("outcome", (20,), "f8", chunks=(20,), compression="gzip")
    packer = zlib.compressobj(9)
    content = b"".join(packer.compress(bytes(2**20)) for _ in range(2**10)) + packer.flush()
    data.id.write_direct_chunk((0,), content)


def other_filter(group, values, secret):
    group.create_dataset("outcome", data=values, chunks=(20,), fletcher32=True)


def missing(group, values, secret):
    pass


ATTACKS = {
    external_link: "'/observed_data/outcome' is a link",
    external_storage: "has its values in another file",
    virtual_dataset: "is a virtual dataset",
    soft_link: "'/observed_data/outcome' is a link",
    references: "holds object, expected numbers or text",
    nested_group: "is not a dataset",
    claimed: r"has the shape \(1000000000000,\), expected \(20,\)",
    wrong_length: r"has the shape \(19,\), expected \(20,\)",
    text: "holds object, expected numbers",
    not_finite: "values that are not finite",
    bomb: "has a block",
    other_filter: "other filters than shuffle and deflate",
    missing: "no variable '/observed_data/outcome'",
}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_harmful_features_of_hdf5_are_refused(run, tmp_path, attack):
    with h5py.File(run / "posterior.nc", "r+") as file:
        group = file["observed_data"]
        values = group["outcome"][...]
        del group["outcome"]
        attack(group, values, tmp_path / "secret")
    seal(run)
    with pytest.raises(ValueError, match=rf"posterior\.nc is damaged.*{ATTACKS[attack]}"):
        Fit.load(run, network())


def test_rows_without_their_features_are_refused(run):
    with h5py.File(run / "posterior.nc", "r+") as file:
        del file["constant_data/features"]
    seal(run)
    with pytest.raises(ValueError, match="no variable '/constant_data/features'"):
        Fit.load(run, network())


def test_claims_of_the_manifest_take_no_memory(run):
    manifest = json.loads((run / "manifest.json").read_text("utf-8"))
    seal(run, facts={**manifest["facts"], "n_rows": 10**12, "feature_shape": [10**6, 10**6]})
    with pytest.raises(ValueError, match=r"'/constant_data/features' has the shape \(20, 2\)"):
        Fit.load(run, network())


# ------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("place", [0.3, 0.6, 0.9])
def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path, place):
    path = tmp_path / "run.checkpoint"
    Checkpoint({"a": torch.arange(400.0), "n": torch.tensor(3)}, {"step": 7}).write(path)
    assert Checkpoint.read(path).record == {"step": 7}
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.checkpoint is damaged"):
        Checkpoint.read(path)


def test_a_checkpoint_without_a_sum_is_read(tmp_path):
    path = tmp_path / "run.checkpoint"
    Checkpoint({"a": torch.ones(2)}, {"step": 7}).write(path)
    save_file(load_file(path), path, metadata={"record": '{"step": 7}', "version": "3"})
    assert Checkpoint.read(path).record == {"step": 7}


def test_a_run_is_not_resumed_with_another_activation_function(tmp_path):
    path = tmp_path / "run.checkpoint"
    data = small_fit(checkpoint=path).data
    model = MixedEffects(network(nn.Tanh), "(1 | site)")
    schedule = Schedule(steps=30, batch_size=16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(ValueError, match="network is not that of the checkpoint"):
            fit(model, data, schedule=schedule, checkpoint=path, resume=True, progress=False)


def test_files_outside_the_folder_are_never_named(run, tmp_path):
    (tmp_path / "outside").write_text("secret")
    manifest = json.loads((run / "manifest.json").read_text("utf-8"))
    sums = {**manifest["checksums"], "../outside": "0" * 64}
    (run / "manifest.json").write_text(json.dumps({**manifest, "checksums": sums}), "utf-8")
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Fit.load(run, network())
    assert os.sep + "outside" not in str(caught.value)
    assert Path(tmp_path / "outside").read_text() == "secret"
