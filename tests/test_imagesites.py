"""Images by site: what the stand-in's sites do, the loader's errors, both scripts' tiny runs."""

import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits

from armed_pyro.analysis.applications import ad_diagnosis, melanoma
from armed_pyro.analysis.applications.image_sites import digit_study, file_study, read_images
from armed_pyro.analysis.benchmarks.step_time import step_times


def everything(study):
    return [study.train, study.validation, study.unseen]


def test_sites_do_what_they_are_said_to():
    study = digit_study([5, 6, 7, 8, 9], size=16, light=0.3, seed=3)
    table = study.effects.table
    assert len(table) == 18
    assert study.image == (1, 16, 16)
    images = np.concatenate([one.features.numpy()[:, 0] for one in everything(study)])
    site = np.concatenate([one.grouping("site").labels() for one in everything(study)])
    across = np.linspace(-1, 1, 16)
    rows = []
    for name in table.index:
        own = images[site == name]
        flat = own - own.mean((1, 2), keepdims=True)
        # Corners are black in most originals: what is left there is the brightness.
        rows.append([flat.std(), own[:, :3, 0].mean(), (own.mean((0, 1)) * across).mean()])
    found = pd.DataFrame(rows, index=table.index, columns=["contrast", "brightness", "light"])
    for effect in found:
        assert np.corrcoef(found[effect], table[effect])[0, 1] > 0.9, effect
    # Sites are made of different digits, so that means differ by chance, by about 0.02.
    np.testing.assert_allclose(found["brightness"], table["brightness"], atol=0.05)


def test_shares_of_the_classes_are_those_of_the_shifts():
    study = digit_study([0, 1, 2, 3, 4], size=8, seed=1)
    label = np.concatenate([one.outcome.numpy() for one in everything(study)])
    site = np.concatenate([one.grouping("site").labels() for one in everything(study)])
    share = pd.Series(label).groupby(site).agg(["sum", "size"])
    logit = np.log((share["sum"] + 0.5) / (share["size"] - share["sum"] + 0.5))
    shift = study.effects.table["shift"]
    np.testing.assert_allclose(logit[shift.index], shift, atol=1e-9)
    assert shift.std() > 0.5
    assert (share["size"] == 80).all()


def test_every_image_is_used_once_and_blur_blurs():
    still = {"contrast": 0.0, "brightness": 0.0, "shift": 0.0}
    sharp = digit_study([5, 6, 7, 8, 9], size=8, seed=2, **still)
    blurred = digit_study([5, 6, 7, 8, 9], size=8, seed=2, blur=1.0, **still)
    originals = load_digits().images.reshape(-1, 64) / 16
    images = np.concatenate([one.features.numpy() for one in everything(sharp)]).reshape(-1, 64)
    nearest = cdist(images, originals).argmin(1)
    assert len(np.unique(nearest)) > 0.99 * len(images)
    sd = {}
    for name, study in (("sharp", sharp), ("blurred", blurred)):
        site = study.train.grouping("site").labels()
        sd[name] = pd.Series(study.train.features.numpy().std((1, 2, 3))).groupby(site).mean()
    ratio = sd["blurred"] / sd["sharp"]
    blur = blurred.effects.table.loc[ratio.index, "blur"]
    assert np.corrcoef(ratio, blur)[0, 1] < -0.9
    with pytest.raises(ValueError, match="40 sites of 80 images need 3200"):
        digit_study([1], seen=20, unseen=20)


def write(path, **arrays):
    rng = np.random.default_rng(0)
    given = {
        "images": rng.normal(size=(24, 5, 6)),
        "labels": np.array(["AD", "CN"] * 12),
        "sites": np.repeat(["a", "b", "c"], 8),
    }
    np.savez(path, **{name: one for name, one in (given | arrays).items() if one is not None})
    return path


def test_a_file_is_read(tmp_path):
    path = write(tmp_path / "scans.npz")
    data = read_images(path, factor="site")
    assert data.features.shape == (24, 1, 5, 6)
    assert data.classes == ("AD", "CN")
    study = file_study(path, factor="site", unseen=["b"])
    assert list(study.unseen.grouping("site").levels) == ["b"]
    assert set(study.train.grouping("site").levels) == {"a", "c"}
    assert study.train.n_rows + study.validation.n_rows == 16
    assert study.effects is None
    with pytest.raises(ValueError, match="site called 'd'"):
        file_study(path, factor="site", unseen=["d"])
    third = file_study(path, factor="site")
    assert len(third.unseen.grouping("site").levels) == 1
    grey = np.full((24, 3, 5, 6), 51, np.uint8)
    colour = read_images(
        write(tmp_path / "c.npz", images=grey, labels=np.array([0, 1] * 12)), factor="site"
    )
    assert colour.features.shape == (24, 3, 5, 6)
    assert float(colour.features[0, 0, 0, 0]) == pytest.approx(0.2)
    assert set(colour.outcome.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"sites": None}, "no array 'sites'; it has images, labels"),
        ({"images": np.zeros((24, 5))}, r"'images' .* must be numbers of shape .* \(24, 5\)"),
        ({"labels": np.zeros(23)}, r"'labels' .* must have the shape \(24,\), .* not \(23,\)"),
        ({"labels": np.zeros(24)}, r"must have two values, not \[0.0\]"),
        ({"sites": np.array([{}] * 24)}, "text as type str, not object"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        read_images(write(tmp_path / "scans.npz", **arrays), factor="site")


def test_what_is_no_file_of_images_is_said(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        read_images(tmp_path / "none.npz", factor="site")
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("images")
    for name in ("one.npy", "text.npz"):
        with pytest.raises(ValueError, match=r"cannot be read as an .npz file"):
            read_images(tmp_path / name, factor="site")


@pytest.mark.filterwarnings("ignore:there are fewer rows")
@pytest.mark.parametrize("script", [ad_diagnosis, melanoma])
def test_smoke_writes_every_file(script, tmp_path):
    script.main(["--smoke", "--out", str(tmp_path)])
    files = {"scores.csv", "effects.csv", "effects.png", "attributions.png"}
    files |= {"decoded.png"} if script is melanoma else set()
    assert {path.name for path in tmp_path.iterdir()} == files
    table = pd.read_csv(tmp_path / "scores.csv")
    assert list(table["effects"]) == ["own", "none", "population", "marginal", "membership"]
    assert table["auroc"].between(0, 1).all()
    effects = pd.read_csv(tmp_path / "effects.csv")
    assert effects["cluster"].nunique() == 4
    expected = {"shift"} if script is ad_diagnosis else {"shift", "contrast", "brightness", "light"}
    assert set(effects["effect"]) == expected


def test_steps_are_timed():
    table = step_times(16, steps=2)
    assert list(table["program"]) == ["convolutional", "autoencoder"]
    assert (table[["conventional", "armed", "ratio"]] > 0).all(axis=None)


@pytest.mark.slow
def test_known_effects_are_recovered():
    """Contrast, brightness and the sites' intercepts, with a correlation of at least 0.8.

    Of the mean of three fits: single ones end in different places, with rounding alone.
    """
    from armed_pyro import fit
    from armed_pyro.analysis.applications.image_fits import correlation, recovered

    for script, effects in (
        (ad_diagnosis, ["shift"]),
        (melanoma, ["shift", "contrast", "brightness"]),
    ):
        study = script.study(1)
        fits = [
            fit(
                script.program(study),
                study.train,
                validation=study.validation,
                schedule=script.APPLICATION.schedule,
                seed=seed,
                compile="never",
                progress=False,
            )
            for seed in range(3)
        ]
        tables = [recovered(one, study) for one in fits]
        mean = sum(one["recovered"] for one in tables) / len(tables)
        found = tables[0].assign(recovered=mean)
        for effect in effects:
            assert correlation(found[found["effect"] == effect]) >= 0.8, (script, effect)


@pytest.mark.slow
def test_a_step_takes_at_most_half_as_long_again():
    assert (step_times(64)["ratio"] <= 1.5).all()
