"""What only a GPU can show: no hidden waits, each precision, exact resume, and the chain itself."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from flowmatch.config import UserError
from flowmatch.export.pipeline import ReflowPipeline
from flowmatch.export.scheduler import RectifiedFlowScheduler
from flowmatch.flow import coupling, grids, objectives, samplers, solvers, toy
from flowmatch.flow.config import LossConfig, ObjectiveConfig, TimesConfig
from flowmatch.models import networks, two_time
from flowmatch.models.config import NetConfig
from flowmatch.models.velocity import Velocity
from flowmatch.pairs.dataset import PairData
from flowmatch.pairs.generator import PairGenerator
from flowmatch.runs import manifest
from flowmatch.runs.command import execute, load
from flowmatch.runs.config import StageConfig
from flowmatch.runs.folder import RunFolder
from flowmatch.training.config import FitConfig
from flowmatch.training.loop import fit
from flowmatch.training.state import State
from pipelines import evaluate, export, generate_pairs, reflow, train_classifier, train_flow
from tests.pairset import make_teacher
from tests.stages import MODELS, UNET

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
ROOT = Path(__file__).parent.parent
IMAGES = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
NET = {"name": "UNet2DModel", **UNET, "block_out_channels": [16, 32]}


class Stopped(Exception):
    pass


@pytest.fixture(autouse=True)
def the_same_kernels(monkeypatch):
    """Let cuBLAS and cuDNN choose kernels that add in one order."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def images(counters):
    return {"x1": IMAGES[counters % len(IMAGES)]}


def train(folder, device="cuda", stream=images, objective=None, dropout=0.0, **values):
    """Run the loop; give the losses and the weights of the average."""
    values = {"steps": 40, "batch_size": 32, "log_every": 10, "save_every": 20, "lr": 2e-3} | values
    AcceleratorState._reset_state(True)  # one precision a process, else
    network = networks.build(NetConfig(**NET, dropout=dropout), (1, 8, 8), None, 0)
    with RunFolder("train_flow", StageConfig(run_dir=str(folder), device=device), {}) as opened:
        fit(
            network,
            stream,
            coupling.independent,
            opened,
            FitConfig(warmup=5, **values),
            TimesConfig(),
            objective or objectives.build(ObjectiveConfig(), LossConfig()),
            seed=3,
            device=device,
        )
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    weights = networks.load(folder / "net", "net").state_dict()
    return [json.loads(line)["loss"] for line in lines], weights


def stage(name, *words):
    """Run a stage on the GPU, to its end; a classifier is trained on the CPU."""
    AcceleratorState._reset_state(True)
    device = [] if name is train_classifier else ["device=cuda"]
    config, _ = load(MODELS[name], [*device, *words])
    execute(name.STAGE, config)


def test_no_update_waits_for_the_gpu(tmp_path, monkeypatch):
    """torch raises at the first call that would; only reading the loss and saving may."""
    waits = []

    def allowed(method):
        def inner(state):
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("default")
            try:
                return method(state)
            finally:
                waits.append((method.__name__, state.step))
                first = waits[-1] == ("read", 10)  # by then all kernels are chosen
                torch.cuda.set_sync_debug_mode("error" if first else before)

        return inner

    for name in ("read", "save", "finish"):
        monkeypatch.setattr(State, name, allowed(getattr(State, name)))
    try:
        train(tmp_path, steps=30, save_every=15, dropout=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {("read", 10), ("read", 20), ("save", 15), ("finish", 30)} <= set(waits)


def test_generation_waits_for_the_gpu_only_to_write(tmp_path, monkeypatch):
    make_teacher(tmp_path / "flow", None, (1, 8, 8), **NET)
    made = PairGenerator.batches

    def strict(maker, k):
        whole = made(maker, k)
        yield next(whole)  # the first batch chooses its kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield from whole
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(PairGenerator, "batches", strict)
    generate(tmp_path, "pairs", "solver.name=heun")
    assert len(PairData(tmp_path / "pairs")) == 96


def test_float32_is_that_of_the_cpu(tmp_path):
    cpu, _ = train(tmp_path / "cpu", "cpu", steps=20, log_every=1)
    gpu, _ = train(tmp_path / "gpu", steps=20, log_every=1)
    assert gpu == pytest.approx(cpu, rel=1e-4)


@pytest.mark.parametrize(
    "values",
    [
        {"precision": "tf32"},
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"channels_last": True},
        {"checkpointing": True},
        {"micro_batch": 8},
        {"ema": [0.05, 0.1]},
        {"compile": True},
        {"compile": True, "precision": "bf16"},
    ],
    ids=str,
)
def test_a_key_of_speed_learns_the_same_and_resumes_exactly(tmp_path, values):
    plain, _ = train(tmp_path / "plain")
    whole, weights = train(tmp_path / "whole", **values)
    assert whole == pytest.approx(plain, rel=2e-2)

    def stopping(counters):
        if counters[0] // 32 >= 31:
            raise Stopped
        return images(counters)

    with pytest.raises(Stopped):
        train(tmp_path / "parts", stream=stopping, **values)
    resumed, again = train(tmp_path / "parts", **values)
    assert resumed == whole
    for name, tensor in weights.items():
        assert torch.equal(tensor, again[name]), name


def test_fp16_halves_its_scale_and_loses_no_step(tmp_path):
    def steep(v, plain, x0, x1, t, w, cond):
        return 1e7 * (v(x0, t, cond) - x1).square().flatten(1).mean(1)

    losses, _ = train(tmp_path, objective=steep, precision="fp16", steps=30, save_every=30)
    assert len(losses) == 3
    assert losses[2] < losses[0]
    with pytest.raises(UserError, match="not finite at step 1"):
        train(tmp_path / "never", objective=lambda *a: steep(*a) * torch.inf, precision="fp16")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_not_finite_stops_the_run_and_reaches_no_checkpoint(tmp_path, precision):
    def spoilt(counters):
        batch = images(counters)
        return {"x1": torch.where(torch.tensor(counters[0] // 32 == 24), torch.nan, batch["x1"])}

    with pytest.raises(UserError, match="not finite at step 25"):
        train(tmp_path, stream=spoilt, precision=precision)
    with RunFolder("train_flow", StageConfig(run_dir=str(tmp_path)), {}) as opened:
        step, saved = opened.checkpoints.restore(40)
    assert step == 20
    assert all(tensor.isfinite().all() for tensor in saved["net"].values())


def test_solvers_and_samplers_are_those_of_the_cpu():
    ring = toy.ring()
    x0 = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grid = grids.uniform_grid(12)
    for name in ("euler", "midpoint", "heun", "rk4", "ab2"):
        there = solvers.integrate(ring, x0.cuda(), grid, name)
        torch.testing.assert_close(
            there.cpu(), solvers.integrate(ring, x0, grid, name), atol=1e-9, rtol=0
        )
    sampled = [
        samplers.sde(ring, x.float(), grid, samplers.FreshNoise(seed=0, ids=range(64)))
        for x in (x0, x0.cuda())
    ]
    torch.testing.assert_close(sampled[1].cpu(), sampled[0], atol=1e-4, rtol=1e-4)


def test_a_pipeline_on_the_gpu_is_the_solver_in_every_dtype():
    net = networks.build(NetConfig(**NET), (1, 8, 8), None, 0).cuda().eval()
    for solver, shift in (("euler", 1.0), ("heun", 1.0), ("ab2", 3.0)):
        for dtype, close in ((torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)):
            pipe = ReflowPipeline(
                unet=networks.build(NetConfig(**NET), (1, 8, 8), None, 0).to("cuda", dtype).eval(),
                scheduler=RectifiedFlowScheduler(solver=solver, shift=shift),
            )
            pipe.set_progress_bar_config(disable=True)
            found = pipe(
                4,
                num_inference_steps=4,
                generator=torch.Generator().manual_seed(1),
                output_type="np",
            ).images
            x0 = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)
            with torch.no_grad():
                grid = grids.shift_grid(4, shift)
                expected = solvers.integrate(Velocity(net), x0.float().cuda(), grid, solver)
            want = (expected.cpu() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
            assert np.abs(found - want).max() < close, (solver, dtype)


def generate(root, name, *words):
    sizes = ("shards=3", "shard_size=32", "block=8", "compute_batch=16", "solver.steps=4")
    stage(generate_pairs, f"run_dir={root / name}", f"teacher={root / 'flow'}", *sizes, *words)


def hashes(folder):
    return manifest.find(folder, "run_dir")["outputs"]


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_pairs_are_the_same_bytes_whoever_makes_them(tmp_path, precision):
    make_teacher(tmp_path / "flow", None, (1, 8, 8), **NET)
    words = ("solver.name=heun", "dtype=float32", f"precision={precision}")
    generate(tmp_path, "one", *words)
    command = [sys.executable, "-m", "pipelines.generate_pairs", "device=cuda", "shards=3"]
    command += ["shard_size=32", "block=8", "compute_batch=16", "solver.steps=4", *words]
    command += [f"run_dir={tmp_path / 'two'}", f"teacher={tmp_path / 'flow'}"]
    workers = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [worker.wait(120) for worker in workers] == [0, 0]
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")

    config, _ = load(generate_pairs.PairsConfig, ["device=cpu", *command[4:]])
    config = config.model_copy(update={"run_dir": str(tmp_path / "cpu"), "precision": "fp32"})
    execute(generate_pairs.STAGE, config, False)
    ids = np.arange(96)
    there, here = (PairData(tmp_path / name).batch(ids) for name in ("one", "cpu"))
    assert torch.equal(there["x0"], here["x0"])
    off = (there["x1"] - here["x1"]).abs().max()
    assert off < {"fp32": 1e-4, "tf32": 1e-2, "bf16": 0.1}[precision]
    if precision != "fp32":
        assert off > 1e-5  # it was another arithmetic


def test_meanflow_takes_its_exact_slope_on_the_gpu(tmp_path):
    network = two_time.add(networks.build(NetConfig(**NET), (1, 8, 8), None, 0), 0)
    mean = ObjectiveConfig(name="meanflow", step=0.0)
    found = {}
    for device in ("cpu", "cuda"):
        objective = objectives.build(mean, LossConfig())
        x0, x1 = IMAGES[:8].to(device), IMAGES[8:16].to(device)
        t, w = (torch.linspace(0.1, 0.8, 8, device=device) for _ in range(2))
        v = Velocity(network.to(device))
        found[device] = objective(v, v, x0, x1, t, w, None, 0).detach().cpu()
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-3, atol=1e-4)


def test_the_whole_chain(tmp_path):
    """Stages 1 to 3, with the classifier that the loss looks through, evaluation and export."""
    at = SimpleNamespace(
        **{n: tmp_path / n for n in ("flow", "pairs", "eyes", "reflow", "evaluate", "export")}
    )
    short = ("fit.steps=60", "fit.batch_size=64", "fit.log_every=20")
    small = [f"net.{key}={json.dumps(value)}" for key, value in NET.items()]
    stage(train_flow, "configs/digits.yaml", *small, *short, f"run_dir={at.flow}")
    generate(tmp_path, "pairs", "precision=bf16")
    words = ("configs/digits.yaml", "section=features", "steps=60", f"run_dir={at.eyes}")
    stage(train_classifier, *words)
    stage(
        reflow,
        *("configs/digits.yaml", *short, f"run_dir={at.reflow}", f"start={at.flow}"),
        *(f"pairs=[{{path: {at.pairs}}}]", f"loss.features={at.eyes}", "fit.precision=bf16"),
    )
    stage(
        evaluate,
        *("configs/digits.yaml", "samples=256", "steps=[1,2]", "converged_steps=4"),
        *(f"run_dir={at.evaluate}", f"teacher={at.flow}", f"student={at.reflow}"),
    )
    rows = json.loads((at.evaluate / "metrics.json").read_text())["student"]["rows"]
    assert all(np.isfinite(row["distance"]) for row in rows)
    stage(
        export,
        *("configs/digits.yaml", f"run_dir={at.export}", f"student={at.reflow}"),
        f"evaluation={at.evaluate}",
    )
    assert (at.export / "model_index.json").exists()


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2"])
def test_a_step_of_the_scheduler_waits_for_no_value_on_the_gpu(solver):
    """Also of a copy of a time, which is known to be in turn by the result alone."""
    scheduler = RectifiedFlowScheduler(solver=solver)
    for time in (lambda t: t, torch.clone):
        scheduler.set_timesteps(4, device="cuda")
        scheduler.set_begin_index(0)
        x = torch.randn(2, 3, 8, 8, device="cuda", dtype=torch.float16)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for t in scheduler.timesteps:
                x = scheduler.step(x, time(t), x, return_dict=False)[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert x.isfinite().all()
    scheduler.set_timesteps(4, device="cuda")
    scheduler.set_begin_index(0)
    assert scheduler.step(x, scheduler.timesteps[-1].clone(), x)[0].isnan().all()
