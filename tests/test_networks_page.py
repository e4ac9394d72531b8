"""docs/networks.md: its examples run, one after the other."""

import re
import warnings
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "networks.md"


def test_the_examples_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
    result, longer = names["result"], names["longer"]
    assert "age" in set(result.variance_components()["term"])
    assert longer.history.settled == 40 or longer.history.fold_steps
    assert names["scores"].shape == (3,)
    assert len(blocks) == 4
