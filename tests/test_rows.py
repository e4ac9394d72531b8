"""Mini-batches of rows, and the weights that keep them unbiased."""

import dataclasses

import pytest
import torch

from armed_pyro.rows.in_memory import HeldRows
from armed_pyro.rows.passes import Passes

SITE = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 2, 2, 3, 3])
DOSE = torch.tensor([0, 1] * 6)


def make_source(**roles):
    n = len(SITE)
    codes = {"site": SITE, "dose": DOSE}
    counts = {name: torch.bincount(one) for name, one in codes.items()}
    return HeldRows(torch.randn(n, 2), torch.arange(n * 1.0), codes, counts, **roles)


def cluster_of(rows, factor):
    membership = rows.memberships[factor]
    return membership.index[membership.position]


def test_all_rows():
    rows = make_source().all()
    assert len(rows) == 12
    assert rows.scale == 1
    for factor, codes in {"site": SITE, "dose": DOSE}.items():
        assert rows.memberships[factor].weight is None
        assert rows.memberships[factor].complete
        assert torch.equal(cluster_of(rows, factor), codes)


@pytest.mark.parametrize("limit", [None, 0, 3, 4])
def test_a_batch_keeps_rows_together_with_their_clusters(limit):
    n = len(SITE)
    roles = {name: torch.rand(n) for name in ("trials", "offset", "weights")}
    source = make_source(**roles)
    index = torch.tensor([11, 2, 7, 3])
    rows = source.batch(index, dense_up_to=limit)
    assert rows.scale == 3
    assert torch.equal(rows.y, index.float())
    assert torch.equal(rows.x, source.x[index])
    assert torch.equal(cluster_of(rows, "site"), SITE[index])
    assert torch.equal(cluster_of(rows, "dose"), DOSE[index])
    for name, values in roles.items():
        assert torch.equal(getattr(rows, name), values[index])
    # site has 4 clusters and dose 2; the default limit is 4 times the 4 rows.
    sparse = {"site": limit in (0, 3), "dose": limit == 0}
    for factor, one in rows.memberships.items():
        assert one.complete is not sparse[factor]
        assert (one.weight is not None) is sparse[factor]


def test_clusters_weigh_as_much_as_their_rows_in_the_batch():
    rows = make_source().batch(torch.tensor([0, 7, 8, 1]), dense_up_to=0)
    membership = rows.memberships["site"]
    assert membership.index.tolist() == [0, 1, 2]
    torch.testing.assert_close(membership.weight, 3 * torch.tensor([2 / 7, 1 / 1, 1 / 2]))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_over_a_partition_every_cluster_weighs_one(size):
    source, order = make_source(), torch.randperm(12, generator=torch.Generator().manual_seed(1))
    for factor, counts in source.counts.items():
        total = torch.zeros(len(counts))
        for index in order.split(size):
            one = source.batch(index, dense_up_to=0).memberships[factor]
            total.index_add_(0, one.index, one.weight)
        torch.testing.assert_close(total * size / 12, torch.ones(len(counts)))


@pytest.mark.parametrize("size", [1, 5, 12, 100])
def test_chunks_are_all_rows_in_order_with_all_clusters(size):
    chunks = list(make_source().chunks(size))
    assert torch.equal(torch.cat([rows.y for rows in chunks]), torch.arange(12.0))
    assert max(map(len, chunks)) == min(size, 12)
    for rows in chunks:
        assert rows.memberships["site"].index.tolist() == [0, 1, 2, 3]
        assert rows.memberships["site"].weight is None


@pytest.mark.parametrize("chosen", [[0], [2, 1], [3, 0, 1], [0, 1, 2, 3]])
def test_whole_clusters_come_with_all_their_rows(chosen):
    roles = {name: torch.rand(len(SITE)) for name in ("trials", "offset", "weights")}
    source = make_source(**roles, computed={"": torch.rand(len(SITE), 3)})
    rows = source.whole_clusters("site", torch.tensor(chosen))
    expected = torch.cat([(one == SITE).nonzero()[:, 0] for one in chosen])
    assert torch.equal(rows.y, expected.float())
    assert torch.equal(rows.x, source.x[expected])
    assert torch.equal(rows.computed[""], source.computed[""][expected])
    for name, values in roles.items():
        assert torch.equal(getattr(rows, name), values[expected])
    assert rows.scale == 4 / len(chosen)
    own = rows.memberships["site"]
    assert own.index.tolist() == chosen
    assert torch.equal(cluster_of(rows, "site"), SITE[expected])
    torch.testing.assert_close(own.weight, torch.full((len(chosen),), 4 / len(chosen)))
    assert not own.complete


def test_of_whole_clusters_those_of_other_factors_are_all_drawn():
    rows = make_source().whole_clusters("site", torch.tensor([1]))
    assert len(rows) == 1
    other = rows.memberships["dose"]
    assert (other.index.tolist(), other.weight, other.complete) == ([0, 1], None, True)
    assert torch.equal(cluster_of(rows, "dose"), DOSE[SITE == 1])


def test_what_the_network_made_of_rows_goes_with_them():
    computed = {"": torch.rand(len(SITE), 1), "layer": torch.rand(len(SITE), 2, 3)}
    source = make_source(computed=computed)
    assert source.all().computed is computed
    index = torch.tensor([4, 0, 11])
    for name, values in source.batch(index).computed.items():
        assert torch.equal(values, computed[name][index])
    for name, values in computed.items():
        assert torch.equal(torch.cat([rows.computed[name] for rows in source.chunks(5)]), values)
    assert make_source().batch(index).computed is None


def test_rows_without_factors_or_outcome():
    source = HeldRows(torch.zeros(3, 1), None, {}, {})
    assert source.batch(torch.tensor([1])).y is None
    assert [len(rows) for rows in source.chunks(2)] == [2, 1]
    with pytest.raises(ValueError, match="no outcome"):
        source.all().outcome()
    known = dataclasses.replace(source, y=torch.ones(3)).all()
    assert torch.equal(known.outcome(), torch.ones(3))


# --- passes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 12])
def test_a_pass_in_batches_has_no_row_twice(size):
    source = make_source()
    batches = list(source.batches(size, torch.Generator().manual_seed(2), dense_up_to=0))
    assert [len(rows) for rows in batches] == [size] * (12 // size)
    drawn = torch.cat([rows.y for rows in batches]).long()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    assert torch.equal(drawn, order[: len(drawn)])
    for rows in batches:
        assert torch.equal(cluster_of(rows, "site"), SITE[rows.y.long()])
        assert rows.scale == 12 / size


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_pass_in_clusters_has_no_cluster_twice(size):
    batches = list(make_source().cluster_batches("site", size))
    assert [len(rows.memberships["site"].index) for rows in batches] == [size] * (4 // size)
    drawn = torch.cat([rows.memberships["site"].index for rows in batches])
    assert len(drawn.unique()) == len(drawn)
    for rows in batches:
        assert len(rows) == int(torch.isin(SITE, rows.memberships["site"].index).sum())


def test_passes_differ_and_can_be_resumed_from_any_batch():
    source = make_source()
    torch.manual_seed(0)
    passes = Passes(lambda generator: source.batches(5, generator))
    drawn, states = [], [passes.state()]
    for _ in range(6):
        drawn.append(next(passes).y)
        torch.rand(3)  # what else training draws
        states.append(passes.state())
    assert not torch.equal(torch.cat(drawn[:2]), torch.cat(drawn[2:4]))
    random = torch.get_rng_state()
    expected = [next(passes).y for _ in range(4)]
    for taken in (5, 6):
        torch.set_rng_state(random)
        resumed = Passes(passes.begin)
        resumed.restore(states[taken])
        again = [next(resumed).y for _ in range(10 - taken)]
        for one, other in zip(again, [*drawn, *expected][taken:], strict=True):
            assert torch.equal(one, other)
