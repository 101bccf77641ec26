"""The farthest pairs are left out, exactly those, and epochs are exact over the rest."""

import numpy as np
import pytest

from flowmatch.config import UserError
from flowmatch.pairs import dataset, truncation
from flowmatch.pairs.dataset import PairData
from flowmatch.pairs.layout import Layout
from flowmatch.pairs.mixture import Mixture
from flowmatch.pairs.truncation import costs, truncate
from flowmatch.runs.command import execute, load
from pipelines import reflow
from tests import pairset
from tests.store import finish

LAYOUT = Layout((3, 2), "float16", False, 20, 8)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99, 0.001])
def test_what_is_kept_is_what_numpy_keeps(tmp_path, share, monkeypatch):
    monkeypatch.setattr(dataset, "READ", 50)  # several reads, the last a short one
    x0, x1, _ = finish(tmp_path, LAYOUT, 3)
    cost = ((x1.astype(float) - x0.astype(float)) ** 2).sum((1, 2))
    data = PairData(tmp_path)
    np.testing.assert_allclose(costs(data), cost, rtol=1e-6)
    ids, told = truncate(data, share)
    number = 60 - int(60 * share)
    kept = np.sort(np.argsort(cost, kind="stable")[:number])
    assert ids.tolist() == kept.tolist()
    assert f"{number} of 60 pairs of {tmp_path} are kept" in told
    assert float(told.split("= ")[1]) == pytest.approx(np.sort(cost)[number - 1], rel=1e-5)


def test_epochs_are_exact_over_what_is_kept(tmp_path):
    """Mixed with a whole set: every third place, each kept pair once an epoch, the others never."""
    finish(tmp_path / "a", LAYOUT, 3)
    finish(tmp_path / "b", LAYOUT, 1)
    data = PairData(tmp_path / "a")
    kept, _ = truncate(data, 0.1)
    mixture = Mixture([(data, 2.0), (PairData(tmp_path / "b"), 1.0)], 27, 0)
    mixture.keep(0, kept)
    assert mixture.shares.tolist() == [18, 9]
    steps = [mixture(np.arange(27 * step, 27 * (step + 1)))["x0"][:18] for step in range(6)]
    first = {
        row.numpy().tobytes(): i
        for i, row in enumerate(PairData(tmp_path / "a").batch(range(60))["x0"])
    }
    seen = [first[row.numpy().tobytes()] for step in steps for row in step]
    assert len(seen) == 2 * 54
    for epoch in (seen[:54], seen[54:]):
        assert sorted(epoch) == kept.tolist()
    assert seen[:54] != seen[54:]


def test_reflow_says_what_it_keeps_and_takes_another_share_for_other_content(tmp_path, capsys):
    pairset.make_teacher(tmp_path / "flow")
    pairset.generate(*pairset.words(tmp_path))
    words = [f"start={tmp_path}/flow", f"run_dir={tmp_path}/r", "device=cpu"]
    words += ["fit.steps=2", "fit.batch_size=9"]

    def run(entry):
        pairs = f"pairs=[{{path: {tmp_path}/pairs{entry}}}]"
        execute(reflow.STAGE, load(reflow.ReflowConfig, [*words, pairs])[0], False)

    run(", truncate: 0.1")
    out = capsys.readouterr().out
    assert "reflow: 27 pairs of [2] in 1 set" in out
    assert "reflow: 27 of 30 pairs of" in out
    assert "2 steps of 9: 0.7 epochs" in out
    with pytest.raises(UserError, match=r"pairs"):
        run("")


def test_a_set_read_group_by_group_is_not_truncated(tmp_path):
    finish(tmp_path, LAYOUT, 3)
    with pytest.raises(UserError, match=r"truncate=0.1 reads the whole set first"):
        truncation.check(PairData(tmp_path, group=1), 0.1)


def test_what_is_cheap_to_find_is_found_before_a_set_is_read(tmp_path, monkeypatch):
    pairset.make_teacher(tmp_path / "flow")
    pairset.make_teacher(tmp_path / "other", shape=(3,))
    pairset.generate(*pairset.words(tmp_path))
    monkeypatch.setattr(PairData, "batch", lambda data, ids: pytest.fail("the set is read"))

    def fails(what, *more, group=0, start="other", path="pairs"):
        entry = f"{{path: {tmp_path / path}, truncate: 0.1, group: {group}}}"
        words = [f"pairs=[{entry}]", f"start={tmp_path / start}", f"run_dir={tmp_path}/r"]
        words += ["device=cpu", "fit.steps=2", "fit.batch_size=9", *more]
        with pytest.raises(UserError, match=what):
            execute(reflow.STAGE, load(reflow.ReflowConfig, words)[0], False)

    fails(r"holds \[2\]; the network at start= takes \[3\]")
    fails("reads the whole set first", group=1, start="nowhere")
    eyes = f"loss={{name: feature, features: {tmp_path / 'nowhere'}}}"
    fails("nowhere does not exist", eyes, start="flow")
    fails("holds the result of train_flow", path="flow")
