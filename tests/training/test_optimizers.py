"""The optimizer of one byte a parameter: near AdamW, resumed bit for bit, masked, and refused."""

import pytest
import torch
from safetensors.torch import load_file

from flowmatch.config import UserError
from flowmatch.models import networks
from flowmatch.models.config import NetConfig
from flowmatch.training.config import FitConfig
from flowmatch.training.loop import check
from flowmatch.training.optimizers import AdamW, AdamW8bit
from tests.stages import UNET
from tests.training.test_loop import images, train

pytest.importorskip("torchao")
SHORT = {"steps": 6, "batch_size": 8, "save_every": 3, "log_every": 1, "warmup": 2}
CPU = torch.device("cpu")


def wide():
    """A network with layers that are large enough."""
    net = UNET | {"block_out_channels": [32, 32], "norm_num_groups": 8}
    return networks.build(NetConfig(name="UNet2DModel", **net), (1, 8, 8), None, 0)


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """Compile nothing: torchao compiles an update for each shape."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def test_it_follows_adamw_and_its_checkpoint_is_smaller(tmp_path):
    rates = {"ema_decay": 0.0}
    _, exact = train(tmp_path / "a", images, wide(), **SHORT, **rates)
    _, coarse = train(tmp_path / "b", images, wide(), optimizer="adamw_8bit", **SHORT, **rates)
    one, two = ([line["loss"] for line in lines] for lines in (exact, coarse))
    assert one != two
    assert one == pytest.approx(two, rel=1e-2)
    kept = [
        load_file(tmp_path / name / "checkpoints/step_00000006/optimizer.safetensors")
        for name in "ab"
    ]
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in kept]
    quantised = {name for name in kept[1] if name.endswith(".codes")}
    assert quantised
    assert all(kept[1][name].dtype == torch.uint8 for name in quantised)
    assert sizes[1] < sizes[0]


def test_a_stopped_run_resumes_bit_for_bit(tmp_path):
    def stopping(counters):
        if counters[0] // 8 >= 5:
            raise RuntimeError("stopped")
        return images(counters)

    words = SHORT | {"optimizer": "adamw_8bit"}
    files, whole = train(tmp_path / "a", images, wide(), **words)
    with pytest.raises(RuntimeError, match="stopped"):
        train(tmp_path / "b", stopping, wide(), **words)
    again, lines = train(tmp_path / "b", images, wide(), **words)
    assert [line["loss"] for line in lines] == [line["loss"] for line in whole]
    assert again == files
    net = "net/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "a" / net).read_bytes() == (tmp_path / "b" / net).read_bytes()


@pytest.mark.parametrize("kind", [AdamW, AdamW8bit])
def test_a_gradient_that_is_not_finite_reaches_no_weight(kind):
    weight = torch.nn.Parameter(torch.ones(64, 64))
    one = kind([weight], FitConfig(steps=1, batch_size=1, lr=0.1), CPU)
    weight.grad = torch.full_like(weight, float("nan"))
    one.mask(torch.tensor(True))
    one.optimizer.step()
    assert torch.equal(weight, torch.ones(64, 64))
    weight.grad = torch.ones_like(weight)
    one.mask(torch.tensor(False))
    one.set_lr(0.2)
    one.optimizer.step()
    assert torch.allclose(weight, torch.full((64, 64), 0.8), atol=0.06)


def test_what_it_cannot_be_combined_with_is_refused():
    config = FitConfig(steps=1, batch_size=2, optimizer="adamw_8bit")
    check(config, "cpu", 1)
    with pytest.raises(UserError, match="adamw_8bit cannot be combined with fit.shard=true"):
        check(config.model_copy(update={"shard": True}), "cpu", 2)
