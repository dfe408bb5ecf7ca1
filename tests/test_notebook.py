"""Behaviour: the notebook runs from its first cell to its last, and what it trains is better than before."""

import re

from tests.snippets import cells, run


def test_the_notebook_runs(tmp_path):
    printed = run(cells("examples/quickstart.ipynb"), tmp_path)
    before, after = map(float, re.search(r"validation loss (\S+) -> (\S+)", printed).groups())
    assert after < before / 5, printed  # a smaller run than the demo's, which ends at a hundredth
    assert (tmp_path / "quickstart-run" / "report.html").is_file()
    assert (tmp_path / "quickstart-merged" / "model.safetensors").is_file()
    assert '"product":"tray"' in printed  # the answer is an order in JSON, of what the message says
