"""What stage two makes, read by those who never heard of it: webdataset, datasets, its own README."""

import re
from pathlib import Path

import numpy as np
import pytest

from flowmatch.pairs.dataset import PairData
from flowmatch.pairs.layout import Layout
from scripts.run_page import blocks
from tests import pairset, stock, store
from tests.pairset import generate
from tests.stages import UNET

ROOT = Path(__file__).parents[2]

KINDS = {  # classes, shape, network, shards, pairs a shard, block
    "points with labels": (3, (2,), {}, 3, 10, 4),
    "points, one shard": (None, (2,), {}, 1, 7, 3),
    "images with labels": (4, (3, 8, 8), {"name": "UNet2DModel", **UNET}, 1, 5, 2),
    "images": (None, (1, 8, 8), {"name": "UNet2DModel", **UNET}, 2, 5, 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_stock_readers_read_every_kind_of_set(tmp_path, kind):
    """The last block of each shard is shorter; a shard set aside is no part of the set."""
    classes, shape, net, number, size, block = KINDS[kind]
    assert size % block
    pairset.make_teacher(tmp_path / "flow", classes, shape, **net)
    more = [f"shards={number}", f"shard_size={size}", f"block={block}"]
    generate(*pairset.words(tmp_path, *more))
    folder = tmp_path / "pairs"
    (folder / "pairs-000000.tar.bad").write_bytes(b"set aside")
    card = (folder / "README.md").read_text().replace("path/of/this/folder", str(folder))
    recipes = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(recipes) >= 2
    checks = [
        f"assert x0.shape[1:] == x1.shape[1:] == {shape}",
        f"assert sum(len(row['x1.npy']) for row in pairs) == {number * size}",
    ]
    read = stock.read(folder, tmp_path, *recipes, *checks)
    data = PairData(folder)
    batch = data.batch(np.arange(len(data)))
    assert len(read) == 5
    names = {"x0.npy": "x0", "x1.npy": "x1"} | ({"y.npy": "label"} if classes else {})
    for who, found in read.items():
        assert set(found) == set(names), who
        for name, ours in names.items():
            assert np.array_equal(found[name], batch[ours].numpy()), (who, name)


def test_the_recipe_for_other_trainers_gives_shuffled_pairs(tmp_path):
    """The code of the guide: so many steps, of pairs that belong together, from all tars and blocks."""
    layout = Layout((1, 8, 8), "float16", True, 300, 64)
    x0, x1, _ = store.finish(tmp_path, layout, 3)
    (code,) = [
        code for _, code in blocks((ROOT / "docs/guides/pairs.md").read_text()) if "unpack" in code
    ]
    code = code.replace("runs/digits/pairs", str(tmp_path)).replace(
        "pass  #", "seen.append((x0, x1))  #"
    )
    seen = []
    exec(compile(code, "pairs.md", "exec"), {"seen": seen})
    assert [len(batch[0]) for batch in seen] == [64] * 100
    numbers = {row.tobytes(): i for i, row in enumerate(x0)}
    found = [
        (numbers[a.numpy().tobytes()], b) for batch in seen for a, b in zip(*batch, strict=True)
    ]
    assert all(np.array_equal(b.numpy(), x1[i]) for i, b in found)
    order = np.array([i for i, _ in found])
    assert len(np.unique(order)) > 800  # of 900: drawn with replacement, 7 tars an epoch's worth
    assert (np.diff(order) == 1).mean() < 0.05  # neighbours do not stay together
