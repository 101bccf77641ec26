"""What is trained depends on the config alone, and who trains on what a launcher says completely."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from flowmatch.config import UserError
from flowmatch.runs import environment, ranks
from tests import forked

LAUNCHERS = ("OMPI_", "MV2_", "PMI_", "MPI_", "SLURM_", "MASTER_")
TF32 = SimpleNamespace(fit=SimpleNamespace(precision="tf32"))
COMPILED = SimpleNamespace(compile=True)


@pytest.fixture(autouse=True)
def bare():
    """No variable of a launcher; the environment is restored."""
    before = dict(os.environ)
    for name in before:
        if name.startswith((*environment.PREFIXES, *LAUNCHERS)) or name in ranks.OWN:
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    ("name", "wrong", "harmless", "way"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "1", "fit.micro_batch"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "false", "fit.shard=true"),
        ("ACCELERATE_USE_FSDP", "1", "False", "fit.shard=true"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "no", "fit.shard=true"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "", "fit.shard=true"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "NO", "fit.compile=true"),
        ("ACCELERATE_USE_SAGEMAKER", "true", "false", "torchrun"),
        ("NVIDIA_TF32_OVERRIDE", "1", "0", "fit.precision"),
        ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1", "0", "fit.precision"),
        ("ONEDNN_DEFAULT_FPMATH_MODE", "BF16", "STRICT", "fit.precision"),
        ("DNNL_DEFAULT_FPMATH_MODE", "BF16", "STRICT", "fit.precision"),
        ("DIFFUSERS_ATTN_BACKEND", "sage", "native", "torch's own"),
        ("USE_TORCH", "0", "auto", "leaves torch out"),
        ("USE_TORCH", "", "1", "leaves torch out"),
        ("USE_TF", "1", "0", "leaves torch out"),
        ("ATEN_CPU_CAPABILITY", "default", "", "the processor"),
        ("MKL_CBWR", "COMPATIBLE", "", "the processor"),
        ("MKL_ENABLE_INSTRUCTIONS", "SSE4_2", "", "the processor"),
    ],
)
def test_what_would_change_the_result_is_refused_by_name(name, wrong, harmless, way):
    os.environ[name] = harmless
    assert environment.settle() is None
    os.environ[name] = wrong
    with pytest.raises(UserError, match=re.escape(f"{name}={wrong} would change the res")) as error:
        environment.settle()
    assert way in error.value.faults[0]


def test_a_variable_is_refused_where_the_config_asks_for_what_it_takes_away():
    os.environ |= {"NVIDIA_TF32_OVERRIDE": "0", "TORCHDYNAMO_DISABLE": "1"}
    environment.check()
    with pytest.raises(UserError, match="NVIDIA_TF32_OVERRIDE=0"):
        environment.check(TF32)
    with pytest.raises(UserError, match="TORCHDYNAMO_DISABLE=1"):
        environment.check(COMPILED)


@pytest.mark.parametrize("config", [{"compile": True}, {"optimizer": "adamw_8bit"}])
def test_variables_of_the_compiler_are_refused_where_something_is_compiled(config):
    """torchao compiles the updates of adamw_8bit, whatever fit.compile says."""
    beside = {"TORCHINDUCTOR_CACHE_DIR": "/x", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    beside |= {"TORCHDYNAMO_VERBOSE": "1", "TORCHDYNAMO_DISABLE": "0"}
    changes = {"TORCHDYNAMO_DISABLE": "1", "TORCHINDUCTOR_USE_FAST_MATH": "1"}
    changes |= {"TORCHINDUCTOR_ONLINE_SOFTMAX": "0", "TORCHDYNAMO_SUPPRESS_ERRORS": "1"}
    changes |= {"TORCH_COMPILE_OVERRIDE_BACKENDS": "0:eager", "TORCHINDUCTOR_MAX_AUTOTUNE": "1"}
    fit = SimpleNamespace(**config)
    os.environ |= beside
    environment.check(SimpleNamespace(fit=fit))
    for name, value in changes.items():
        os.environ |= beside | {name: value}
        environment.check(SimpleNamespace(fit=SimpleNamespace()))
        with pytest.raises(UserError, match=f"{name}={value} would change the result") as error:
            environment.check(SimpleNamespace(fit=fit))
        assert str(next(iter(config.values()))).lower() in error.value.faults[0]
        del os.environ[name]


def test_what_is_ignored_is_taken_from_accelerate_and_named_in_a_line():
    usual = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_MODE": "default"}
    usual |= {"ACCELERATE_USE_CPU": "False", "ACCELERATE_DEBUG_MODE": ""}
    os.environ |= usual  # what the launcher always writes, or nothing
    assert environment.settle() is None
    assert not usual.keys() & os.environ.keys()
    os.environ |= usual | {"ACCELERATE_MIXED_PRECISION": "bf16", "FSDP_OFFLOAD_PARAMS": "true"}
    os.environ |= {"ACCELERATE_CPU_AFFINITY": "1"}  # how it runs, not what it computes
    line = environment.settle()
    assert line == (
        "ignored, because the config alone decides: ACCELERATE_MIXED_PRECISION=bf16 (see "
        "fit.precision), FSDP_OFFLOAD_PARAMS=true"
    )
    assert os.environ["ACCELERATE_CPU_AFFINITY"] == "1"
    assert environment.settle() is None  # once


def test_every_variable_that_accelerate_reads_is_known():
    """A new version may read more: look at what each does, then add it here or to `environment`."""
    import accelerate

    known = {*ranks.OWN, *(name for names in ranks.OTHERS for name in names)}
    known |= {"MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"}  # `ranks` checks these
    known |= {"NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "NO_COLOR", "CUDA_VISIBLE_DEVICES"}
    known |= {"PYTORCH_ENABLE_MPS_FALLBACK", "XLA_USE_BF16", "XLA_DOWNCAST_BF16", "USE_TORCH_XLA"}
    known |= {"PT_HPU_LAZY_MODE", "DEEPSPEED_USE_HPU", "FOO"}  # devices that stages do not use
    call = (
        r"(?:environ(?:\.get)?|parse_\w+_from_env|get_int_from_env)[(\[]\s*\[?(prefix|env_prefix)?"
    )
    folder = Path(accelerate.__file__).parent
    names = "accelerator.py state.py optimizer.py data_loader.py utils/*.py"
    files = [file for name in names.split() for file in folder.glob(name)]
    found = {
        name
        for file in files
        if file.stem != "launch"  # the launcher's side
        for prefix, name in re.findall(call + r'[ +]*"([A-Z][A-Z0-9_]+)"', file.read_text())
        if not prefix
    }
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" in found
    new = {name for name in found - known if not name.startswith(environment.PREFIXES)}
    assert not new, f"Accelerate reads {sorted(new)}"


def test_the_environment_leaves_no_trace_in_weights_and_seal(tmp_path):
    words = ["configs/ring.yaml", "data.samples=64", "net.hidden=8", "fit.batch_size=16"]
    words += ["fit.steps=3", "device=cpu"]
    loud = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_TORCH_DEVICE": "meta"}
    loud |= {"ACCELERATE_DEBUG_MODE": "maybe", "FORK_LAUNCHED": "maybe"}
    said = []
    for name, more in (("quiet", {}), ("loud", loud)):
        argv = ["pipelines.train_flow", *words, f"run_dir={tmp_path / name}"]
        said.append(forked.run(argv, env=os.environ | more, check=True).stdout)
    assert "ignored" not in said[0]
    assert said[1].count("train_flow: ignored, because the config alone decides: ACCELERATE") == 1
    for name in ("manifest.json", "net/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "quiet" / name).read_bytes() == (tmp_path / "loud" / name).read_bytes()


OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
OPEN_MPI |= {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
SRUN |= {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
TORCH = {"RANK": "1", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"RANK": "0", "WORLD_SIZE": "1"}, {}),
        ({"LOCAL_RANK": "-1"}, {"LOCAL_RANK": None}),
        (TORCH, {"MASTER_ADDR": None, "MASTER_PORT": "29500"}),
        (TORCH | {"LOCAL_WORLD_SIZE": "2"}, {"MASTER_ADDR": "127.0.0.1"}),
        (OPEN_MPI, TORCH | {"LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}),
        (OPEN_MPI | {"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": "0"}),  # a launcher inside mpirun
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, {"RANK": None}),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, TORCH | {"LOCAL_RANK": None, "MASTER_ADDR": None}),
        (SRUN, {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": None}),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, {"RANK": None}),  # the script of a job
        ({"SLURM_PROCID": "3"}, {"RANK": None}),
    ],
)
def test_the_numbers_of_every_launcher_are_taken_where_they_are_complete(given, expected):
    os.environ |= given
    ranks.settle()
    for name, value in expected.items():
        assert os.environ.get(name) == value, name


ARRAY = "expected a number; outside a job of several processes leave RANK and WORLD_SIZE out"


@pytest.mark.parametrize(
    ("given", "faults"),
    [
        ({"RANK": "", "WORLD_SIZE": ""}, [f"RANK='': {ARRAY}", f"WORLD_SIZE='': {ARRAY}"]),
        ({"RANK": "x", "WORLD_SIZE": "2"}, [f"RANK='x': {ARRAY}"]),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, [f"RANK='-1': {ARRAY}"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2: RANK is missing"]),
        ({"RANK": "1"}, ["RANK=1: WORLD_SIZE is missing"]),
        ({"RANK": "2", "WORLD_SIZE": "2"}, ["RANK=2, WORLD_SIZE=2: expected a RANK from 0 to"]),
        ({"RANK": "0", "WORLD_SIZE": "0"}, ["RANK=0, WORLD_SIZE=0: expected a RANK from 0 to"]),
        ({"PMI_RANK": "1"}, ["PMI_RANK=1: PMI_SIZE is missing"]),
        ({"MV2_COMM_WORLD_SIZE": "2"}, ["MV2_COMM_WORLD_SIZE=2: MV2_COMM_WORLD_RANK is missing"]),
        (TORCH, ["RANK=1, WORLD_SIZE=2: MASTER_ADDR is missing"]),
        (TORCH | {"MASTER_ADDR": ""}, ["RANK=1, WORLD_SIZE=2: MASTER_ADDR is missing"]),
        ({"LOCAL_RANK": "0"}, ["LOCAL_RANK=0: MASTER_ADDR is missing"]),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, ["PMI_RANK=1, PMI_SIZE=2: MASTER_ADDR is missing"]),
        (
            TORCH | {"MASTER_ADDR": "a", "MASTER_PORT": "port", "OMP_NUM_THREADS": "4,2"},
            ["MASTER_PORT='port': expected a number", "OMP_NUM_THREADS='4,2': expected a number"],
        ),
    ],
)
def test_a_job_that_is_half_described_is_refused_by_what_is_missing(given, faults):
    os.environ |= given
    with pytest.raises(UserError) as error:
        [check() for check in (ranks.settle, ranks.check_group)]
    found = error.value.faults
    assert len(found) == len(faults)
    assert all(line.startswith(fault) for line, fault in zip(found, faults, strict=True)), found


def test_those_that_need_no_group_need_no_address(tmp_path):
    """Members of an array make pairs; the same numbers do not train."""
    array = os.environ | {"RANK": "1", "WORLD_SIZE": "2"}
    words = ["configs/ring.yaml", "device=cpu", f"run_dir={tmp_path}"]
    pairs = forked.run(["pipelines.generate_pairs", *words, f"teacher={tmp_path}"], env=array)
    assert pairs.returncode == 2
    assert pairs.stderr.startswith("generate_pairs: rank 1: teacher=")
    assert "MASTER_ADDR" not in pairs.stderr
    flow = forked.run(["pipelines.train_flow", *words], env=array)
    assert (flow.returncode, flow.stderr.count("\n")) == (2, 1)
    assert flow.stderr.startswith("train_flow: rank 1: RANK=1, WORLD_SIZE=2: MASTER_ADDR is miss")
    empty = os.environ | {"RANK": "", "WORLD_SIZE": ""}  # the line of the guide, outside an array
    again = forked.run(["pipelines.generate_pairs", *words], env=empty)
    assert (again.returncode, again.stderr.count("\n")) == (2, 2)
    chain = forked.run(["flowmatch", "run", "ring"], env=array)
    assert chain.stderr.startswith("run: rank 1: WORLD_SIZE=2: the chain starts the processes")


@pytest.mark.slow
def test_only_needless_remarks_of_libraries_are_left_out():
    """In a process that has imported nothing yet: peft and diffusers import torchao."""
    code = "import peft, diffusers.models.modeling_utils; "
    code += "import logging; logging.getLogger('torchao').warning('x')"
    quiet = f"from flowmatch.runs import environment; environment.hush(); {code}"
    said = [
        subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
        for words in (code, quiet)
    ]
    assert "Unable to import `torchao`" in said[0].stderr
    assert said[1].stderr == "x\n"
