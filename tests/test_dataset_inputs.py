"""Torch datasets as inputs: what they hold, how they are read, and fits to them."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from armed_pyro import Adversary, ClusteredData, Fit, MixedEffects, Schedule, fit
from armed_pyro.rows.array_inputs import ArrayInputs
from armed_pyro.rows.dataset_inputs import DatasetInputs, ItemReader
from armed_pyro.rows.inputs import InputSpec, JoinedInputs

ROWS, SITES = 240, 8
BRIEF = Schedule(steps=40, folds=1)


class Scans(Dataset):
    """An image with the site's brightness, an age, tokens of any length, and an outcome."""

    def __init__(self, n=ROWS, seed=0):
        rng = np.random.default_rng(seed)
        self.site = np.arange(n) % SITES
        self.age = rng.normal(size=n).astype(np.float32)
        self.length = rng.integers(1, 6, size=n)
        slope = 0.5 * rng.normal(size=SITES)
        self.signal = rng.normal(size=n).astype(np.float32)
        self.y = self.signal + slope[self.site] * self.age + rng.normal(size=SITES)[self.site]
        self.y += 0.3 * rng.normal(size=n)

    def __len__(self):
        return len(self.site)

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(int(i))
        noise = torch.randn(1, 6, 6, generator=generator)
        return {
            "image": self.signal[i] + 0.1 * noise,
            "age": torch.tensor([self.age[i]]),
            "tokens": torch.arange(self.length[i]) + 1,
            "y": self.y[i],
            "site": "abcdefgh"[self.site[i]],
        }


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Linear(5, 1)

    def forward(self, image, age):
        return self.head(torch.cat([self.act(self.conv(image)).mean((2, 3)), age], 1))


def padded(items):
    """Tokens of one length, and their mask."""
    tokens = nn.utils.rnn.pad_sequence([item["tokens"] for item in items], batch_first=True)
    return {"tokens": tokens, "attention_mask": tokens > 0}


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 3), nn.Linear(3, 1)

    def forward(self, tokens, attention_mask):
        kept = attention_mask[..., None].float()
        return self.head((kept * self.embed(tokens)).sum(1) / kept.sum(1).clamp(min=1))


def scans(workers=0, dataset=None, **settings):
    dataset = Scans() if dataset is None else dataset
    table = pd.DataFrame({"site": dataset.site, "age": dataset.age, "y": dataset.y})
    options = {"outcome": "y", "clusters": ["site"], "slopes": ["age"], "inputs": ["image", "age"]}
    return ClusteredData.from_dataset(dataset, table=table, workers=workers, **options | settings)


def network(kind=Both):
    torch.manual_seed(0)
    return kind()


def program(kind=Both, terms="(1 + age | site)", **settings):
    return MixedEffects(network(kind), terms, **settings)


# ------------------------------------------------------------------------------------- reading


def test_columns_come_from_the_table_or_from_the_items():
    dataset = Scans(20)
    of_table = scans(dataset=dataset)
    of_items = ClusteredData.from_dataset(
        dataset, outcome="y", clusters={"site": "site"}, inputs="image", workers=2
    )
    np.testing.assert_allclose(of_items.outcome, dataset.y)
    assert of_items.groupings["site"].labels().tolist() == list("abcdefgh" * 2 + "abcd")
    assert of_table.slope_names == ("age",)
    assert (of_table.n_features, of_table.n_rows) == (0, 20)
    function = ClusteredData.from_dataset(
        dataset, outcome=lambda item: item["y"] > 0, clusters={"site": dataset.site}
    )
    assert function.classes == (False, True)


def test_inputs_are_read_when_they_are_loaded():
    class Counting(Scans):
        read = 0

        def __getitem__(self, i):
            Counting.read += 1
            return super().__getitem__(i)

    data = scans(dataset=Counting(50))
    assert Counting.read == 0
    part = data.take([4, 9]).take([1])
    loaded = part.inputs.load()
    assert Counting.read == 1
    torch.testing.assert_close(loaded["image"][0], Scans(50)[9]["image"])
    assert list(loaded) == ["image", "age"]


def test_blocks_and_workers_give_the_same_inputs():
    alone, shared = scans().inputs, scans(workers=2).inputs
    whole = alone.load()["image"]
    for source in (alone, shared):
        blocks = [block["image"] for block in source.blocks(64)]
        assert [len(block) for block in blocks] == [64, 64, 64, 48]
        torch.testing.assert_close(torch.cat(blocks), whole)


def test_augmentation_is_of_training_batches_and_follows_from_the_seed():
    def augment(item):
        noise = torch.randn(()) + np.random.random()  # noqa: NPY002
        return {**item, "image": item["image"] + noise}

    batches = [torch.arange(5), torch.arange(5, 10)]
    made = {}
    for workers in (0, 2):
        inputs = scans(workers, augment=augment).inputs
        torch.manual_seed(workers)
        made[workers] = [b["image"] for b in inputs.training_batches(batches, 7)]
        assert torch.equal(
            inputs.take(torch.arange(5)).load()["image"],
            scans().inputs.take(torch.arange(5)).load()["image"],
        )
    assert all(map(torch.equal, made[0], made[2]))
    other = next(iter(scans(augment=augment).inputs.training_batches(batches, 8)))["image"]
    assert not torch.equal(other, made[0][0])
    plain = next(iter(scans(augment=augment).inputs.plain().training_batches(batches, 7)))
    assert torch.equal(plain["image"], scans().inputs.take(batches[0]).load()["image"])


def test_reading_items_leaves_the_generators_alone():
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    scans(augment=lambda item: {**item, "r": torch.rand(1)}).inputs.load()
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002


def test_arrays_in_structures_are_not_copied():
    arrays = {"image": np.zeros((9, 1, 2, 2), np.uint8), "age": torch.arange(9.0)}
    inputs = ArrayInputs(arrays, torch.arange(9))
    taken = inputs.take(torch.tensor([8, 1]))
    assert taken.arrays["image"] is arrays["image"]
    assert taken.load()["image"].dtype == torch.uint8
    assert taken.load()["age"].tolist() == [8.0, 1.0]
    assert InputSpec.of(inputs.load()).values == 5
    joined = JoinedInputs.of(inputs, taken).take(torch.tensor([10, 0, 9]))
    assert joined.load()["age"].tolist() == [1.0, 0.0, 8.0]


def test_structures_of_arrays_are_fitted():
    dataset = Scans()
    image = np.stack([dataset[i]["image"].numpy() for i in range(ROWS)])
    arrays = {"image": image, "age": dataset.age[:, None]}
    data = ClusteredData.from_arrays(arrays, dataset.y, {"site": dataset.site})
    result = fit(program(terms="(1 | site)"), data, schedule=BRIEF, progress=False)
    assert result.predict(data).expected.shape == (1000, ROWS)
    assert result.model.data_facts().inputs.values == 37


# ---------------------------------------------------------------------------------------- fits


@pytest.mark.slow
def test_random_slopes_beside_an_image_are_estimated():
    """sd of the slopes on age, 0.5 in truth, from a network that sees image and age."""
    dataset = Scans(600, seed=1)
    schedule = Schedule(steps=600, net_learning_rate=0.02)
    result = fit(
        program(), scans(dataset=dataset), schedule=schedule, validation=None, progress=False
    )
    table = result.variance_components().set_index(["factor", "term", "statistic"])
    row = table.loc["site", "age", "sd"]
    effects = result.random_effects().query("term == 'age'")["mean"].to_numpy()
    by_site = [
        np.polyfit(dataset.age[s := dataset.site == k], dataset.y[s] - dataset.signal[s], 1)[0]
        for k in range(SITES)
    ]
    centred = np.array(by_site) - np.mean(by_site)
    assert np.corrcoef(effects, centred)[0, 1] > 0.97
    assert abs(row["median"] - np.std(by_site, ddof=1)) < 3 * row["sd"]


def test_workers_do_not_change_a_fit_and_it_is_saved_and_loaded(tmp_path):
    game = Adversary("site", ["act"], weight=0.1)
    settings = {"schedule": BRIEF, "progress": False, "compile": "never"}
    alone = fit(program(adversary=game), scans(), **settings)
    data = scans(workers=2)
    shared = fit(program(adversary=game), data, **settings)
    assert alone.history.loss == shared.history.loss
    shared.save(tmp_path)
    loaded = Fit.load(tmp_path, Both())
    new = scans(dataset=Scans(40, seed=5)).take(slice(3, 30))
    expected = shared.predict(new, unseen="marginal").expected
    np.testing.assert_array_equal(loaded.predict(new, unseen="marginal").expected, expected)
    with pytest.raises(
        ValueError, match=r"lack the network's inputs.*Fit\.load\(folder, net, data"
    ):
        loaded.variance_components()
    whole = Fit.load(tmp_path, Both(), data=data)
    pd.testing.assert_frame_equal(whole.variance_components(), shared.variance_components())
    with pytest.raises(ValueError, match="must be the 240 training rows with their inputs"):
        Fit.load(tmp_path, Both(), data=data.take(slice(0, 100)))


def test_sequences_are_collated_by_the_user_and_keep_their_types():
    data = scans(collate=padded, inputs=None, slopes=())
    spec = data.inputs.spec.content["dict"]
    assert spec["tokens"]["tensor"][0] == "int64"
    assert spec["attention_mask"]["tensor"][0] == "bool"
    result = fit(program(Embedded, "(1 | site)"), data, schedule=BRIEF, progress=False)
    assert np.isfinite(result.predict(data).expected).all()


def test_new_clusters_adapt_and_tables_keep_their_encoding():
    result = fit(program(), scans(), schedule=BRIEF, progress=False)
    dataset = Scans(24, seed=9)
    table = pd.DataFrame({"site": 100, "age": dataset.age, "y": dataset.y})
    inputs = {"inputs": ["image", "age"], "schema": result.data.schema}
    support = ClusteredData.from_dataset(dataset, table=table, **inputs)
    unlabelled = ClusteredData.from_dataset(dataset, table=table.drop(columns="y"), **inputs)
    adapted = result.predict(unlabelled, unseen="adapt", support=support)
    marginal = result.predict(unlabelled, unseen="marginal")
    assert adapted.expected.std(0).mean() < marginal.expected.std(0).mean()


def test_a_loader_lends_its_collate_function_and_workers():
    loader = DataLoader(Scans(), collate_fn=padded, num_workers=2)
    data = ClusteredData.from_dataset(loader, outcome=Scans().y, clusters={"site": Scans().site})
    assert isinstance(data.inputs, DatasetInputs)
    assert data.inputs.workers == 2
    assert data.inputs.take(torch.arange(3)).load()["tokens"].dim() == 2


RESUMED = """
    import sys, torch
    from armed_pyro import Schedule, fit
    from tests.test_dataset_inputs import program, scans

    class Slow(type(scans().inputs.dataset)):
        def __getitem__(self, i):
            import time
            time.sleep(float(sys.argv[2]))
            return super().__getitem__(i)

    def augment(item):
        return {**item, "image": item["image"] + 0.1 * torch.randn(1)}

    data = scans(workers=2, dataset=Slow(), augment=augment)
    schedule = Schedule(steps=30, window=5, stages=0, batch_size=60)
    result = fit(program(), data, schedule=schedule, validation=None, compile="never",
                 checkpoint=sys.argv[1], resume=True, progress=False, refine=False)
    print(result.history.loss)
"""


@pytest.mark.slow
def test_a_killed_fit_resumes_to_the_same_result(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(RESUMED))
    command = [sys.executable, str(script)]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    path = tmp_path / "a.safetensors"
    killed = subprocess.Popen(
        [*command, str(path), "0.002"],
        env=environment,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    while not path.exists() and killed.poll() is None:
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    outputs = [
        subprocess.run(
            [*command, str(place), "0"], env=environment, stdout=subprocess.PIPE, check=True
        ).stdout
        for place in (path, tmp_path / "b.safetensors")
    ]
    assert outputs[0] == outputs[1]


SHARED = """
    import sys, torch
    from armed_pyro import Adversary, Schedule, fit
    from tests.test_dataset_inputs import Scans, program, scans

    torch.set_num_threads(1)
    schedule = Schedule(steps=400, batch_size=60, folds=1, net_learning_rate=0.02)
    game = Adversary("site", ["act"], weight=0.01)
    data = scans(dataset=Scans(400, seed=1), slopes=())
    model = program(terms="(1 | site)", adversary=game)
    result = fit(model, data, schedule=schedule, compile="never", progress=False)
    print(result.history.loss[-1], *result.variance_components()["median"][:1])
"""


@pytest.mark.slow
def test_two_processes_share_a_dataset(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(SHARED))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def started(rank, size):
        told = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        told = {name: str(value) for name, value in told.items()} if size > 1 else {}
        environment = {**os.environ, **told, "PYTHONPATH": str(Path.cwd())}
        command = [sys.executable, "-W", "ignore", str(script)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    outputs = [process.communicate(timeout=300)[0] for process in [started(0, 2), started(1, 2)]]
    assert outputs[0] == outputs[1] != ""
    alone = started(0, 1).communicate(timeout=300)[0]
    (loss, sd), (loss_alone, sd_alone) = (map(float, text.split()) for text in (outputs[0], alone))
    assert abs(loss - loss_alone) < 0.1
    assert abs(sd - sd_alone) < 0.15 * sd_alone


def test_memory_does_not_grow_with_the_number_of_images():
    """Rows of loaded batches that exist at the same time."""
    live = most = 0

    def release(rows):
        nonlocal live
        live -= rows

    def collate(items):
        nonlocal live, most
        batch = torch.stack([torch.full((3, 128, 128), float(item)) for item in items])
        live += len(batch)
        most = max(most, live)
        weakref.finalize(batch, release, len(batch))
        return batch

    y, site = np.random.default_rng(0).normal(size=1600), np.arange(1600) % 10
    data = ClusteredData.from_dataset(
        range(1600), outcome=y, clusters={"site": site}, collate=collate
    )
    net = nn.Sequential(nn.AvgPool2d(128), nn.Flatten(), nn.Linear(3, 1))
    bound = MixedEffects(net, "(1 | site)").bind(data)
    source = bound.encode(data)
    assert sum(len(batch.inputs) for batch in source.batches(64)) == 1600
    assert len(bound.compute(source).computed[""]) == 1600
    assert most <= 192


# -------------------------------------------------------------------------------------- errors


class Stream(IterableDataset):
    def __iter__(self):
        return iter([1])


@pytest.mark.parametrize(
    ("dataset", "settings", "error", "message"),
    [
        (Stream(), {}, TypeError, r"map-style, with dataset\[i\].*found Stream"),
        ([], {}, ValueError, "has no items"),
        (Scans(4), {"outcome": [1.0, 2.0]}, ValueError, r"each of the 4 items.*\(2,\)"),
        (Scans(4), {"outcome": "weight"}, ValueError, "no element 'weight'.*with the keys"),
        (
            Scans(4),
            {"outcome": "image"},
            ValueError,
            "Item 0 of the dataset has the shape",
        ),
        (Scans(4), {"table": pd.DataFrame({"y": [1.0]})}, ValueError, "1 rows and the dataset 4"),
        (
            Scans(4),
            {"clusters": {"weights": [1, 1, 2, 2]}},
            ValueError,
            "cannot be called 'weights'",
        ),
    ],
)
def test_datasets_that_cannot_be_used(dataset, settings, error, message):
    options = {"outcome": [1.0, 2.0, 1.0, 3.0], "clusters": {"site": [1, 1, 2, 2]}} | settings
    with pytest.raises(error, match=message):
        ClusteredData.from_dataset(dataset, **options)


def test_items_that_cannot_be_joined():
    reader = ItemReader(choose="tokens")
    with pytest.raises(ValueError, match=r"cannot be joined into a batch.*collate="):
        reader.inputs([Scans()[i] for i in range(5)])
    with pytest.raises(TypeError, match=r"must be tensors.*found (list|str)"):
        ItemReader(choose="site").inputs([Scans()[0]])
    with pytest.raises(ValueError, match=r"shape \(3,\), expected \(2, ...\)"):
        ItemReader(collate=lambda items: torch.zeros(3)).inputs([0, 1])
