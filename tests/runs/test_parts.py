"""Tensors in parts: any rows are read from the files of any number of processes."""

import json

import numpy as np
import pytest
import torch

from flowmatch.runs import parts
from flowmatch.runs.parts import Piece


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_rows_come_back_whatever_the_numbers_of_processes(tmp_path, world):
    rng = np.random.default_rng(world)
    whole = {f"w{n}": torch.randn(n, 3) for n in (1, 2, 4, 7)} | {"half": torch.randn(5).bfloat16()}
    names = []
    for rank in range(world):
        pieces = {}
        for name, tensor in whole.items():
            size = -(-len(tensor) // world)
            first = min(rank * size, len(tensor))
            rows = tensor[first : first + size]
            if len(rows) or not first:
                pieces[name] = Piece(rows.clone(), first, len(tensor))
        if rank == 0:
            pieces["step"] = Piece(torch.tensor(3.0))
        names.append(parts.write(tmp_path, "optimizer", rank, pieces))
    found = parts.read(tmp_path, names)["optimizer"]
    assert found.keys() == {*whole, "step"}
    assert parts.whole(found["step"]) == 3
    for name, tensor in whole.items():
        assert torch.equal(parts.whole(found[name]), tensor)
        for _ in range(5):
            first, end = sorted(rng.integers(0, len(tensor) + 1, 2).tolist())
            assert torch.equal(parts.some(found[name], first, end), tensor[first:end])


def test_a_part_says_which_rows_it_has(tmp_path):
    from safetensors import safe_open

    name = parts.write(tmp_path, "net", 1, {"w": Piece(torch.ones(2, 2), 2, 4)})
    assert name == "net.part-00001.safetensors"
    with safe_open(tmp_path / name, "pt") as file:
        assert json.loads(file.metadata()["rows"]) == {"w": [2, 4]}
