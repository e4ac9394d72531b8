"""Files of records: what is written is read, shuffled uniformly and sorted."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from armed_pyro.streaming.row_file import Buckets, Layout, RowFile

LAYOUT = Layout(2, ("y", "weights"), ("site", "dose"))


def records(n, seed=0):
    rng = np.random.default_rng(seed)
    numbers = {"y": np.arange(n, dtype=float), "weights": rng.random(n)}
    codes = {"site": rng.integers(7, size=n), "dose": rng.integers(2**31 - 1, size=n)}
    x = rng.normal(size=(n, 2))
    return LAYOUT.records(x, numbers, codes), x, numbers, codes


def test_records_become_the_rows_they_were_made_of():
    made, x, numbers, codes = records(20)
    counts = {name: torch.ones(1) for name in codes}
    rows = LAYOUT.rows(made, counts, torch.zeros(0, dtype=torch.float64))
    assert rows.x.dtype == torch.float64
    np.testing.assert_allclose(rows.x.numpy(), x, rtol=1e-6)
    np.testing.assert_allclose(rows.y.numpy(), numbers["y"])
    np.testing.assert_allclose(rows.weights.numpy(), numbers["weights"], rtol=1e-6)
    assert rows.trials is None
    assert rows.offset is None
    for name, one in codes.items():  # codes beyond what single precision holds, too
        assert np.array_equal(rows.codes[name].numpy(), one)


def test_stretches_are_read_in_the_order_asked_for(tmp_path):
    made, *_ = records(50)
    file = RowFile(tmp_path / "rows", LAYOUT.width)
    file.append(made[:30])
    file.append(made[30:])
    assert len(file) == 50
    starts, stops = np.array([40, 3, 5, 9]), np.array([45, 5, 9, 10])
    wanted = np.concatenate([made[a:b] for a, b in zip(starts, stops, strict=True)])
    assert np.array_equal(file.read(starts, stops).view(np.int32), wanted.view(np.int32))
    with pytest.raises(OSError, match="ends early"):
        file.read(np.array([49]), np.array([51]))
    file.close()
    file.close()


def dealt(folder, n, count, ordered, seed, key=None):
    """Numbers 0 to n - 1 after they were dealt out in blocks of 100 and joined."""
    rng = np.random.default_rng(seed)
    values = np.arange(n, dtype=np.float32)[:, None]
    with Buckets(folder, "bucket", count, 1) as buckets:
        for start in range(0, n, 100):
            block = values[start : start + 100]
            chosen = rng.integers(count, size=len(block)) if key is None else key(block[:, 0])
            buckets.add(block, chosen)
        file = buckets.join(folder / "joined", lambda some: ordered(rng, some))
    found = file.read(np.array([0]), np.array([n]))[:, 0]
    file.close()
    (folder / "joined").unlink()
    assert list(folder.iterdir()) == []
    return found


def shuffle(rng, some):
    return some[rng.permutation(len(some))]


def test_a_shuffle_draws_all_orders_with_the_same_probability(tmp_path):
    orders = dict.fromkeys(itertools.permutations(range(4)), 0)
    for seed in range(2400):
        orders[tuple(dealt(tmp_path, 4, 3, shuffle, seed).astype(int).tolist())] += 1
    assert stats.chisquare(list(orders.values())).pvalue > 0.001


def test_a_shuffle_mixes_rows_that_were_far_apart(tmp_path):
    n = 6000
    found = dealt(tmp_path, n, 7, shuffle, 1)
    assert np.array_equal(np.sort(found), np.arange(n))
    # Of a random order neither neighbours nor place and value are correlated.
    for one, other in [(found[1:], found[:-1]), (found, np.arange(n))]:
        assert abs(np.corrcoef(one, other)[0, 1]) * np.sqrt(n) < 4
    means = found.reshape(60, 100).mean(1)
    spread = np.sqrt((n**2 - 1) / 12 / 100 * (1 - 100 / n))
    assert stats.kstest((means - (n - 1) / 2) / spread, "norm").pvalue > 0.001


def test_rows_left_in_file_order_within_buckets_fail_that_test(tmp_path):
    n = 6000
    found = dealt(tmp_path, n, 7, lambda rng, some: some, 1)
    means = found.reshape(60, 100).mean(1)
    spread = np.sqrt((n**2 - 1) / 12 / 100 * (1 - 100 / n))
    assert stats.kstest((means - (n - 1) / 2) / spread, "norm").pvalue < 1e-6


def test_ranges_sorted_within_are_sorted(tmp_path):
    def ordered(rng, some):
        return some[np.argsort(-some[:, 0])]

    found = dealt(tmp_path, 1000, 4, ordered, 0, key=lambda values: 3 - values.astype(int) // 250)
    assert np.array_equal(found, np.arange(1000)[::-1])
