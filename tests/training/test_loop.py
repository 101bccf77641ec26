"""The loop: pure draws, one global batch however it is split, exact resume, nothing non-finite kept."""

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flowmatch.config import UserError
from flowmatch.flow import coupling, objectives
from flowmatch.flow.config import LossConfig, ObjectiveConfig, TimesConfig
from flowmatch.flow.noise import Order
from flowmatch.models import networks
from flowmatch.models.config import NetConfig
from flowmatch.models.velocity import Velocity
from flowmatch.runs.config import StageConfig
from flowmatch.runs.folder import RunFolder
from flowmatch.training import ema
from flowmatch.training.config import FitConfig
from flowmatch.training.draw import draw
from flowmatch.training.loop import check, check_net, fit, split_batch
from flowmatch.training.state import SCALER, State
from pipelines import train_flow
from tests import stages

POINTS = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def stream(counters):
    return {"x1": POINTS[Order(300, 0)(counters)]}


def net(classes=None):
    return networks.build(NetConfig(name="VelocityMLP", hidden=16), (2,), classes, 0)


def unet(dropout=0.0, levels=1, **more):
    config = NetConfig(
        name="UNet2DModel",
        block_out_channels=[8] * levels,
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=["DownBlock2D"] * levels,
        up_block_types=["UpBlock2D"] * levels,
        add_attention=False,
        dropout=dropout,
        **more,
    )
    return networks.build(config, (1, 4, 4), None, 0)


def images(counters):
    return {"x1": IMAGES[counters % 50]}


def train(folder, stream=stream, network=None, on_log=None, **values):
    """Run the loop; return the files' bytes and the metrics."""
    values = {"steps": 40, "batch_size": 32, "log_every": 10, "save_every": 16, "lr": 1e-2} | values
    config = StageConfig(run_dir=str(folder), device="cpu")
    with RunFolder("train_flow", config, {}) as opened:
        files = fit(
            network or net(),
            stream,
            coupling.independent,
            opened,
            FitConfig(**values),
            TimesConfig(),
            objectives.build(ObjectiveConfig(), LossConfig()),
            seed=3,
            device="cpu",
            on_log=on_log,
        )
    folder = Path(folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {name: (folder / name).read_bytes() for name in files}, [json.loads(x) for x in lines]


def weights(folder):
    return networks.load(Path(folder) / "net", "net").state_dict()


def test_draws_do_not_depend_on_how_a_batch_is_cut():
    def drawn(counters):
        return draw(stream, coupling.independent, TimesConfig(), 0.5, None, 7, counters)

    whole = drawn(np.arange(64))
    order = np.random.default_rng(0).permutation(64)
    for part in np.array_split(order, 5):
        cut = drawn(part)
        for name in ("x0", "x1", "t"):
            assert torch.equal(getattr(cut, name), getattr(whole, name)[part])
    assert len(torch.unique(whole.x0[:, 0])) == 64
    assert abs(drawn(np.arange(5000)).x0.std() - 1) < 0.03


def test_labels_are_dropped_one_by_one_at_the_given_share():
    def labelled(counters):
        return {"x1": torch.zeros(len(counters), 2), "label": torch.from_numpy(counters % 5)}

    counters = np.arange(8000)
    drawn = draw(labelled, coupling.independent, TimesConfig(), 0.2, 5, 7, counters)
    assert drawn.label is not None
    dropped = (drawn.label == 5).float()
    assert dropped.mean().item() == pytest.approx(0.2, abs=0.015)
    assert torch.equal(drawn.label[dropped == 0], torch.from_numpy(counters % 5)[dropped == 0])
    # no whole batches, and no tie to the times
    assert dropped.reshape(-1, 100).mean(1).std() < 0.06
    assert abs(np.corrcoef(dropped.numpy(), drawn.t.numpy())[0, 1]) < 0.04


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "expected"),
    [(128, None, 2, (64, 1)), (128, 16, 2, (16, 4)), (128, 500, 1, (128, 1)), (6, 2, 3, (2, 1))],
)
def test_the_global_batch_is_the_setting(batch, micro, processes, expected):
    config = FitConfig(steps=1, batch_size=batch, micro_batch=micro)
    assert split_batch(config, processes) == expected


def test_a_batch_that_does_not_split_names_one_that_does():
    config = FitConfig(steps=1, batch_size=250, micro_batch=16)
    with pytest.raises(UserError, match="not a multiple of 8 processes x micro_batch 16; use 256"):
        split_batch(config, 8)
    for batch, micro, processes in np.ndindex(30, 12, 5):
        batch, processes = batch + 1, processes + 1
        more = {"steps": 1, "micro_batch": micro or None}
        try:
            split_batch(FitConfig(batch_size=batch, **more), processes)
        except UserError as error:
            use = int(str(error).rsplit(" ", 1)[1])
            split_batch(FitConfig(batch_size=use, **more), processes)
            unit = processes * (micro if 0 < micro <= batch // processes else 1)
            assert abs(use - batch) < unit
    with pytest.raises(UserError, match="not a multiple of 3 processes; use 3"):
        split_batch(FitConfig(steps=1, batch_size=2), 3)
    with pytest.raises(UserError, match="needs a GPU"):
        check(FitConfig(steps=1, batch_size=2, precision="fp16"), "cpu", 1)


def test_what_a_run_could_not_use_is_refused_before_it(monkeypatch):
    from accelerate import tracking

    config = {"steps": 1, "batch_size": 2}
    check(FitConfig(**config, trackers=["tensorboard"]), "cpu", 1)
    with pytest.raises(UserError, match="tensorbord is unknown; Accelerate has .*tensorboard"):
        check(FitConfig(**config, trackers=["tensorbord"]), "cpu", 1)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
    with pytest.raises(UserError, match="wandb is not installed; pip install wandb"):
        check(FitConfig(**config, trackers=["wandb"]), "cpu", 1)
    check_net(FitConfig(**config, label_drop=0.2), net(classes=3), 3)
    with pytest.raises(UserError, match="label_drop=0.2: this network takes no labels"):
        check_net(FitConfig(**config, label_drop=0.2), net(), None)


def test_the_loss_falls_to_the_gaussian_floor_and_metrics_are_logged(tmp_path):
    _, lines = train(tmp_path, steps=200, log_every=50)
    assert [line["step"] for line in lines] == [50, 100, 150, 200]
    # a standard Gaussian target: no velocity gets below pi/2 a dimension (uniform t)
    assert lines[-1]["loss"] == pytest.approx(np.pi / 2, rel=0.08)
    assert lines[0]["loss"] > 1.15 * np.pi / 2
    assert lines[-1]["lr"] == pytest.approx(0, abs=1e-6)
    assert all(line["images_per_second"] > 0 for line in lines)


def test_the_caller_hears_what_is_logged_and_its_torch_stays_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    heard = []
    slow = lambda counters: time.sleep(0.01) or stream(counters)  # noqa: E731
    _, lines = train(
        tmp_path, slow, steps=6, log_every=2, on_log=lambda *words: heard.append(words)
    )
    assert torch.equal(torch.randn(3), expected)
    assert torch.backends.cudnn.allow_tf32
    assert [step for step, _ in heard] == [2, 4, 6]
    for (step, values), line in zip(heard, lines, strict=True):
        assert values.pop("waited") > 0
        assert {"step": step} | values == line


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    _, whole = train(tmp_path / "a", steps=20)
    _, cut = train(tmp_path / "b", steps=20, micro_batch=8)
    for a, b in zip(whole, cut, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    for name, tensor in weights(tmp_path / "a").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "b")[name], atol=1e-5, rtol=1e-4)


def test_the_first_updates_are_adamw_and_ema_of_the_formulas(tmp_path):
    def losses_of(network):
        drawn = draw(stream, coupling.independent, TimesConfig(), 0.1, None, 3, np.arange(64))
        for step in range(2):
            cut = slice(32 * step, 32 * step + 32)
            x0, x1, t = drawn.x0[cut], drawn.x1[cut], drawn.t[cut, None]
            v = Velocity(network)((1 - t) * x0 + t * x1, drawn.t[cut])
            yield (v - (x1 - x0)).square().mean()

    reference = net()
    adamw = torch.optim.AdamW(reference.parameters(), betas=(0.9, 0.99), weight_decay=0.1)
    ema = [p.detach().clone() for p in reference.parameters()]
    for step, loss in enumerate(losses_of(reference)):
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.7)
        adamw.param_groups[0]["lr"] = 1e-2 * (step / 4)  # warm-up over 4 updates
        adamw.step()
        decay = min(0.999, (1 + step) / (10 + step)) if step else 0.0
        ema = [
            decay * e + (1 - decay) * p.detach()
            for e, p in zip(ema, reference.parameters(), strict=True)
        ]
    train(
        tmp_path,
        steps=2,
        warmup=4,
        decay="constant",
        weight_decay=0.1,
        max_grad_norm=0.7,
        log_every=1,
    )
    for mine, expected in zip(weights(tmp_path).values(), ema, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-5)


def test_two_widths_are_kept_through_a_stop(tmp_path, monkeypatch):
    """Each is the average of the formula over the weights of every update; resumed, the same bytes."""
    seen, widths = [], [0.05, 0.2]
    honest = State.update

    def watched(state, *words):
        counted = honest(state, *words)
        seen.append([p.detach().clone() for p in state.parameters])
        return counted

    with monkeypatch.context() as patch:
        patch.setattr(State, "update", watched)
        whole, _ = train(tmp_path / "whole", steps=20, ema=widths)
    for folder, width in zip(("net", "net_2"), widths, strict=True):
        average = [torch.zeros_like(p) for p in seen[0]]
        for n, parameters in enumerate(seen, 1):
            decay = ema.power_decay(n, ema.gamma(width))
            average = [
                decay * a + (1 - decay) * p for a, p in zip(average, parameters, strict=True)
            ]
        found = networks.load(tmp_path / "whole" / folder, "net").parameters()
        for one, other in zip(found, average, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)

    def stopping(counters):
        if counters[0] // 32 >= 18:
            raise InterruptedError
        return stream(counters)

    with pytest.raises(InterruptedError):
        train(tmp_path / "cut", stream=stopping, steps=20, ema=widths)
    cut, _ = train(tmp_path / "cut", steps=20, ema=widths)
    assert cut == whole
    assert any(name.startswith("net_2/") for name in whole)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The usual run, undisturbed: files and metrics."""
    return train(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("stop_at", [1, 17, 31, 33])
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, whole_run, stop_at):
    undisturbed, lines = whole_run

    class Stopped(Exception):
        pass

    def stopping(counters):
        if counters[0] // 32 >= stop_at:
            raise Stopped
        return stream(counters)

    with pytest.raises(Stopped):
        train(tmp_path / "b", stream=stopping)
    seen = []

    def watched(counters):
        seen.append(int(counters[0]) // 32)
        return stream(counters)

    resumed, again = train(tmp_path / "b", stream=watched)
    assert resumed == undisturbed
    assert min(seen) == stop_at // 16 * 16  # from the newest checkpoint, not from the start
    assert [(x["step"], x["loss"], x["lr"]) for x in again] == [
        (x["step"], x["loss"], x["lr"]) for x in lines
    ]


def test_what_is_frozen_resumes_bit_for_bit_too(tmp_path):
    """AdamW keeps nothing of the frequencies of a Fourier embedding."""

    def fourier():
        return unet(time_embedding_type="fourier")

    calls = {"steps": 4, "batch_size": 8, "log_every": 1, "save_every": 2}
    whole, lines = train(tmp_path / "whole", stream=images, network=fourier(), **calls)

    def stopping(counters):
        if counters[0] >= 3 * 8:
            raise InterruptedError
        return images(counters)

    with pytest.raises(InterruptedError):
        train(tmp_path / "cut", stream=stopping, network=fourier(), **calls)
    cut, again = train(tmp_path / "cut", stream=images, network=fourier(), **calls)
    assert cut == whole
    assert [(x["step"], x["loss"]) for x in again] == [(x["step"], x["loss"]) for x in lines]
    frozen = "time_proj.weight"
    assert torch.equal(weights(tmp_path / "cut")[frozen], fourier().state_dict()[frozen])


def test_sigterm_before_the_first_update_leaves_nothing_to_resume_from(tmp_path, monkeypatch):
    honest = State.__init__

    def stopped(state, *words):
        honest(state, *words)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(State, "__init__", stopped)
        with pytest.raises(SystemExit) as left:
            train(tmp_path / "a", steps=4, log_every=2)
    assert left.value.code == 75
    assert not (tmp_path / "a/checkpoints").exists()  # of no update there is no optimizer's state
    resumed, _ = train(tmp_path / "a", steps=4, log_every=2)
    assert resumed == train(tmp_path / "b", steps=4, log_every=2)[0]


@pytest.mark.parametrize(("precision", "where"), [("fp16", "cpu"), ("fp32", "meta")])
def test_a_resume_puts_the_count_of_updates_where_adamw_reads_it(
    tmp_path, monkeypatch, precision, where
):
    """The fused one on the device; fp16's on the CPU, or every parameter's update waits for it."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    train(tmp_path, steps=4, log_every=2)
    real = Accelerator(cpu=True)  # whose optimizer moves a state where it is let to
    monkeypatch.setitem(AcceleratorState._shared_state, "device", torch.device("meta"))
    accelerator = SimpleNamespace(
        device=torch.device("meta"),
        prepare_model=lambda net, evaluation_mode: net,
        prepare_optimizer=real.prepare_optimizer,
    )
    config = FitConfig(steps=8, batch_size=32, precision=precision)
    opened = RunFolder("train_flow", StageConfig(run_dir=str(tmp_path)), {})
    state = State(net(), config, accelerator, opened)
    assert state.step == 4
    for found in state.adamw.optimizer.state.values():
        assert (found["step"].device.type, found["exp_avg"].device.type) == (where, "meta")


def test_what_fp16s_scaler_has_learnt_goes_on(tmp_path):
    def opened():
        accelerator = SimpleNamespace(
            device=torch.device("cpu"),
            scaler=torch.amp.GradScaler("cpu"),
            prepare_model=lambda net, evaluation_mode: net,
            prepare_optimizer=lambda optimizer, device_placement: optimizer,
            reduce=lambda x, how: x,
            gather=lambda x: x,
            wait_for_everyone=lambda: None,
        )
        config = FitConfig(steps=8, batch_size=32, precision="fp16")
        return State(net(), config, accelerator, RunFolder("x", StageConfig(run_dir=folder), {}))

    folder = str(tmp_path)
    state = opened()
    scaler = state.accelerator.scaler
    scaler.scale(torch.zeros(()))
    missing = "State.save keeps these of GradScaler.state_dict(), which has other names now"
    assert set(SCALER) <= scaler.state_dict().keys(), missing
    scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**13, "_growth_tracker": 7})
    state.step = 4
    state.save()
    found = opened()
    assert found.step == 4
    assert found.accelerator.scaler.state_dict() == scaler.state_dict()


def test_a_fused_adamw_skips_the_update_where_found_inf_is_set():
    """The attribute is GradScaler's way to tell a fused optimizer; there is no public one."""
    weight = torch.nn.Parameter(torch.ones(3))
    adamw = torch.optim.AdamW([weight], fused=True)
    for found in (1.0, 0.0):
        weight.grad = torch.ones(3)
        adamw.found_inf = torch.tensor(found)
        adamw.step()
        changed = "optimizer.found_inf of State.update no longer skips an update on the device"
        assert bool((weight == 1).all()) == bool(found), changed
        assert adamw.state[weight]["step"] == 1 - found


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_a_step_that_is_not_finite_reaches_nothing_and_is_named(tmp_path, poison):
    def poisoned(counters):
        batch = stream(counters)
        batch["x1"] = torch.where(
            torch.from_numpy(counters == 21 * 32 + 5)[:, None], poison, batch["x1"]
        )
        return batch

    network = net()
    with pytest.raises(UserError, match="not finite at step 22;"):
        train(tmp_path, stream=poisoned, network=network)
    assert all(p.isfinite().all() for p in network.parameters())
    saved = sorted((tmp_path / "checkpoints").iterdir())
    assert [p.name for p in saved] == ["step_00000016"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20]


def test_bf16_trains_and_keeps_float32_weights(tmp_path):
    from accelerate.state import AcceleratorState

    seen = set()
    network = net()
    network.first.register_forward_hook(lambda layer, x, out: seen.add(out.dtype))
    AcceleratorState._reset_state(True)  # Accelerate has one precision for a process
    try:
        _, lines = train(tmp_path, network=network, precision="bf16", steps=60, log_every=20)
    finally:
        AcceleratorState._reset_state(True)
    assert seen == {torch.bfloat16}
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {torch.float32}
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_dropout_is_the_same_after_a_resume_and_off_in_what_is_saved(tmp_path):
    class Stopped(Exception):
        pass

    def stopping(counters):
        if counters[0] // 32 >= 6:
            raise Stopped
        return images(counters)

    undisturbed, _ = train(
        tmp_path / "a", stream=images, network=unet(0.3), steps=8, save_every=4, log_every=4
    )
    with pytest.raises(Stopped):
        train(
            tmp_path / "b", stream=stopping, network=unet(0.3), steps=8, save_every=4, log_every=4
        )
    resumed, _ = train(
        tmp_path / "b", stream=images, network=unet(0.3), steps=8, save_every=4, log_every=4
    )
    assert resumed == undisturbed


def test_an_update_that_fp16_skips_is_logged_and_kept_once(tmp_path, whole_run, monkeypatch):
    """As its scaler does: twice the same samples, at the step of a log line and a checkpoint."""
    updates, skip = State.update, [10, 16, 16]

    def update(self, loss, cost):
        if self.step in skip:
            skip.remove(self.step)
            self.optimizer.zero_grad(set_to_none=True)
            return False
        return updates(self, loss, cost)

    monkeypatch.setattr(State, "update", update)
    files, lines = train(tmp_path)
    assert not skip
    assert files == whole_run[0]
    same = [
        [
            {k: x for k, x in line.items() if k not in ("images_per_second", "memory_gb")}
            for line in each
        ]
        for each in (lines, whole_run[1])
    ]
    assert same[0] == same[1]


def test_tensorboard_gets_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ["data={source: ring, samples: 64}", "net={name: VelocityMLP, hidden: 8}"]
    words += ["fit.batch_size=16", "fit.steps=6", "fit.log_every=2", "fit.trackers=[tensorboard]"]
    stages.run(train_flow, f"run_dir={tmp_path}", *words)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    events = list(tmp_path.rglob("events.out.tfevents.*"))
    assert {file.parent for file in events} == {tmp_path / "tensorboard"}
    seen = {}
    for file in events:
        accumulator = EventAccumulator(str(file)).Reload()
        if "loss" in accumulator.Tags()["scalars"]:
            seen = {e.step: e.value for e in accumulator.Scalars("loss")}
    assert seen == {line["step"]: pytest.approx(line["loss"], rel=1e-6) for line in lines}
