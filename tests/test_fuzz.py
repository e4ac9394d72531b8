"""Random tables and randomly changed fits: a right result, or an error of the package.

Every case follows from its number. FUZZ_CASES sets how many there are (`make fuzz`: 10,000), and
FUZZ_FIRST the first number.
"""

import csv
import io
import json
import math
import os
import re
import resource
import sys
import time
import traceback
import warnings
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import armed_pyro
from armed_pyro import ClusteredData, Fit, MixedEffects, Schedule, fit
from armed_pyro.data.files import read_table
from armed_pyro.networks.by_name import network
from armed_pyro.program.data_spec import Facts
from armed_pyro.storage.checksums import sealed

CASES, FIRST = int(os.environ.get("FUZZ_CASES", "300")), int(os.environ.get("FUZZ_FIRST", "0"))
BLOCK = 50
LONGEST, LARGEST = 30.0, 2**30  # seconds of a case, bytes of all cases of a block
LIBRARY = Path(armed_pyro.__file__).parent
FILES = ["model.safetensors", "posterior.nc", "manifest.json"]
BLOCKS = range(FIRST, FIRST + max(CASES // 2, BLOCK), BLOCK)


def check(case, number, *arguments):
    """Run a case; only errors that the library itself raises may come out of it."""
    start = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case(np.random.default_rng(number), *arguments)
    except (AssertionError, pytest.fail.Exception) as error:
        raise AssertionError(f"case {number}: {error}") from error
    except (ValueError, TypeError) as error:
        *_, last = traceback.extract_tb(error.__traceback__)
        if LIBRARY not in Path(last.filename).parents:
            raise AssertionError(f"case {number}: a foreign {type(error).__name__}") from error
    except Exception as error:
        raise AssertionError(f"case {number}: a foreign {type(error).__name__}: {error}") from error
    assert time.monotonic() - start < LONGEST, (
        f"case {number} took {time.monotonic() - start:.0f} s"
    )


def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


@pytest.fixture
def little_memory():
    before = memory()
    yield
    assert memory() - before < LARGEST


# ---------------------------------------------------------------------------------------- tables

LABELS = [
    *("a", "b", "c", "0", "-0", "00", "7", "007", "7.0", "0.1", "0.10", "1e3", "1000", "+1", "1"),
    *("9007199254740992", "9007199254740993", "9007199254740994", "18446744073709551615"),
    *(
        "123456789012345678901234567890",
        "True",
        "true",
        "TRUE",
        "2024-01-01",
        "é",
        "𝔘",
        "a:b",
        " a",
    ),
    *("a ", "=1+1", "<script>", "$x_1$", "[bold]", "a,b", 'a"b', "a\nb", "x" * 500, "."),
]
NUMBERS = [
    *("0", "1", "-1", "0.5", "1e-300", "1e300", "-1e200", "1e99", "inf", "-inf", "nan", "1e11"),
    *("9007199254740993", "1,5", "-", "< 5", "5%", "0x10", "1_000", "", " 2 "),
]
NAMES = ["x", "age", "km/h", ".", "a b", "dosé", "draw", "row", "x:y", "site_sd", "features", "1"]
MISSING = {"", "NA", "nan"}


def random_labels(rng, rows):
    pool = rng.choice(len(LABELS), size=rng.integers(1, 6), replace=False)
    labels = [LABELS[place] for place in rng.choice(pool, rows)]
    if rng.random() < 0.3:
        labels[rng.integers(rows)] = ""
    return labels


def random_numbers(rng, rows):
    values = [f"{value:.6g}" for value in rng.normal(size=rows) * 10.0 ** rng.integers(-3, 4)]
    if rng.random() < 0.4:
        values[rng.integers(rows)] = str(rng.choice(NUMBERS))
    return values


def write_csv(rng, path, columns):
    text = io.StringIO()
    ends = str(rng.choice(["\n", "\r\n", "\r"]))
    writer = csv.writer(text, lineterminator=ends)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    content = text.getvalue().encode()
    if rng.random() < 0.15 and len(content) > 3:
        place = int(rng.integers(len(content)))
        content = content[:place] + bytes([int(rng.integers(256))]) + content[place + 1 :]
        path.write_bytes(content)
        return False
    path.write_bytes(content)
    return True


def write_parquet(rng, path, columns, name):
    """Labels as text, as 64-bit integers with gaps, or as a dictionary."""
    labels = columns[name]
    arrays = {key: pa.array(_floats(values)) for key, values in columns.items() if key != name}
    whole = [value for value in labels if value]
    missing = [value or None for value in labels]
    kind = rng.integers(3)
    if kind == 1 and all(value.isdigit() and len(value) < 19 for value in whole):
        arrays[name] = pa.array([value and int(value) for value in missing], pa.int64())
        labels = [value and str(int(value)) for value in labels]
    elif kind == 2:
        arrays[name] = pa.array(missing, pa.string()).dictionary_encode()
    else:
        arrays[name] = pa.array(missing, pa.string())
    table = pa.table(arrays)
    if rng.random() < 0.2:
        table = table.replace_schema_metadata({b"pandas": bytes(rng.integers(0, 256, 20).tolist())})
    pq.write_table(table, path)
    return labels


def _floats(values):
    def number(text):
        try:
            return float(text)
        except ValueError:
            return None

    return [number(value) for value in values]


def table_case(rng, folder):
    """A table's clusters are those that were written, or an error says what is wrong."""
    rows = int(rng.integers(2, 30))
    feature = str(rng.choice(NAMES))
    labels = random_labels(rng, rows)
    columns = {"y": random_numbers(rng, rows), feature: random_numbers(rng, rows), "site": labels}
    if rng.random() < 0.5:
        path = folder / "rows.csv"
        whole = write_csv(rng, path, columns)
    else:
        path, whole = folder / "rows.parquet", True
        try:
            labels = write_parquet(rng, path, columns, "site")
        except (pa.ArrowException, OverflowError):
            return
    frame = read_table(path, labels=["site"])
    data = ClusteredData.from_frame(
        frame, outcome="y", clusters=["site"], features=[feature], missing="drop"
    )
    levels = data.grouping("site").levels
    if whole and len(frame) == rows:
        complete = _complete(frame, feature)
        written = {label for label, there in zip(labels, complete, strict=True) if there}
        assert len(levels) == len(written), (labels, frame["site"].tolist())
    data.check_training()
    model = MixedEffects(network("linear", data.n_features), "(1 | site)", bayesian_head=True)
    bound = model.bind(data)
    stored = json.loads(json.dumps(bound.data_facts().to_json()))
    assert Facts.from_json(stored).levels["site"].equals(levels)
    predictor = bound.encode(data).all().x
    assert bool(torch.isfinite(predictor).all())


def _complete(frame, feature):
    return frame[["y", feature, "site"]].notna().all(axis=1).tolist()


@pytest.mark.parametrize("first", BLOCKS)
@pytest.mark.usefixtures("little_memory")
def test_random_tables(first, tmp_path):
    for number in range(first, first + BLOCK):
        check(table_case, number, tmp_path)


# ------------------------------------------------------------------------------------ saved fits


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    rng = np.random.default_rng(0)
    site = np.repeat(["a", "b", "c"], 6)
    frame = pd.DataFrame({"y": rng.normal(size=18), "x": rng.normal(size=18), "site": site})
    frame["day"] = pd.date_range("2024-01-01", periods=18)
    data = ClusteredData.from_frame(
        frame.set_index("day"), outcome="y", clusters=["site"], features=["x"]
    )
    model = MixedEffects(network("dense", 1, hidden=[3]), "(1 + x | site)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = fit(model, data, schedule=Schedule(steps=20), progress=False)
        result = result.refine(draws=20, progress=False)
    folder = tmp_path_factory.mktemp("fit") / "run"
    result.save(folder, draws=4)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


VALUES = [None, 0, -1, 1.5, 10**12, 2**70, True, "", "x", "../x", [], {}, [[1]], {"a": 1}, math.nan]


def places(value, path=()):
    """Paths of all values in a JSON object."""
    yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in list(items)[:5]:
        yield from places(inner, (*path, key))


def change_manifest(rng, folder):
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    paths = [path for path in places(manifest) if path and path[0] != "checksums"]
    path = paths[rng.integers(len(paths))]
    parent = manifest
    for key in path[:-1]:
        parent = parent[key]
    if rng.random() < 0.2:
        del parent[path[-1]]
    else:
        parent[path[-1]] = VALUES[rng.integers(len(VALUES))]
    return manifest


def change_hdf5(rng, folder):
    with h5py.File(folder / "posterior.nc", "r+") as file:
        group = file[str(rng.choice(["observed_data", "constant_data"]))]
        name = str(rng.choice(sorted(group)))
        old = group[name]
        values, shape = old[...], old.shape
        kind = rng.integers(8)
        if kind == 0:
            group.copy(old, "other")
            return
        del group[name]
        if kind == 1:
            group[name] = h5py.ExternalLink("/etc/hostname", "/")
        elif kind == 2:
            group[name] = h5py.SoftLink("/posterior")
        elif kind == 3:
            group.create_dataset(name, (10 ** int(rng.integers(2, 13)),), "f8", chunks=(1000,))
        elif kind == 4:
            group.create_dataset(name, shape, str(rng.choice(["f4", "i1", "S3", "c16", "?"])))
        elif kind == 5:
            group.create_dataset(
                name, data=np.full(shape, rng.choice([np.nan, np.inf, 1e300, 0.0]))
            )
        elif kind == 6:
            made = group.create_dataset(name, data=values, compression="lzf", chunks=shape)
            made.attrs["units"] = str(rng.choice(["days since 2000", "years since 0", "x"]))


def change_tensors(rng, folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = str(rng.choice(sorted(tensors)))
    kind = rng.integers(5)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[f"{name}x"] = tensors.pop(name)
    elif kind == 2:
        tensors[name] = tensors[name].unsqueeze(0).repeat(2, *[1] * tensors[name].dim())
    elif kind == 3:
        tensors[name] = torch.full_like(tensors[name].double(), math.nan)
    else:
        tensors[name] = tensors[name].to(torch.int8)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)


def bytes_case(rng, folder, saved):
    """A change of bytes is always found, and its file is named."""
    name = str(rng.choice([*FILES[:2], *sorted(set(saved) - set(FILES))]))
    content = bytearray(saved[name])
    place = int(rng.integers(len(content)))
    kind = rng.integers(3)
    if kind == 0:
        content[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del content[place:]
    else:
        content[place:place] = (
            rng.integers(0, 256, int(rng.integers(1, 9))).astype(np.uint8).tobytes()
        )
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} "):
        Fit.load(folder)


def structure_case(rng, folder, saved):
    """A change under new checksums is an error, or the fit predicts finite numbers."""
    manifest = None
    change = [change_manifest, change_hdf5, change_tensors][rng.integers(3)]
    manifest = change(rng, folder)
    if manifest is None:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    if isinstance(manifest, dict):
        others = sorted(set(saved) - {"manifest.json"})
        manifest = sealed(manifest, "manifest.json", folder, others)
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    result = Fit.load(folder)
    new = pd.DataFrame({"x": [0.0, 1.0], "site": ["a", "new"]})
    result.predict(new, unseen="marginal", draws=3)


@pytest.mark.parametrize("first", BLOCKS)
@pytest.mark.parametrize("case", [bytes_case, structure_case], ids=lambda case: case.__name__)
@pytest.mark.usefixtures("little_memory")
def test_random_changes_of_a_fit(case, first, saved, tmp_path):
    for number in range(first, first + BLOCK // 2):
        for name, content in saved.items():
            (tmp_path / name).write_bytes(content)
        check(case, number, tmp_path, saved)
