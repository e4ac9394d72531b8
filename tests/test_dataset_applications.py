"""The applications of docs/networks.md: images on disk, and sequences of tokens."""

import numpy as np
import pytest

from armed_pyro import Schedule
from armed_pyro.analysis.applications import images_on_disk, token_sequences

pytestmark = pytest.mark.filterwarnings("ignore:there are fewer rows")
BRIEF = Schedule(steps=30, folds=1)


def test_images_on_disk_run(tmp_path):
    result, area = images_on_disk.run(tmp_path, 60, BRIEF)
    assert 0 <= area <= 1
    assert result.model.adversaries[0].taps == ("pool",)


def test_token_sequences_run():
    result, r2 = token_sequences.run(100, BRIEF)
    assert np.isfinite(r2)
    assert result.model.adversaries[0].taps == ("encoder:masked",)


@pytest.mark.slow
def test_token_sequences_are_learned():
    result, r2 = token_sequences.run(1200, Schedule(steps=3000, folds=1, net_learning_rate=0.01))
    assert r2 > 0.8
    table = result.variance_components().query("factor == 'clinic' and statistic == 'sd'")
    assert table["lower"].item() < token_sequences.EFFECT < table["upper"].item()
