"""Variables of the environment that would change what a stage computes, under the same seal.

The config alone decides. What would change the result is refused by its name, with the key to use; what
Accelerate would read and a stage does not want is taken away, and named in a line.
"""

import functools
import logging
import os
import re
from collections.abc import Iterator

from flowmatch.config import Config, UserError

OFF = ("", "0", "false", "no", "off", "n", "f")
ON = ("1", "true", "yes", "on", "y", "t")
SEEN = ("1", "ON", "YES", "TRUE", "AUTO")  # values by which diffusers takes torch
SHARD = "fit.shard=true shards a network"
PRECISION = "the keys of precision decide (fit.precision, precision)"
PROCESSOR = "the processor decides which instructions it uses"
# variable -> the values that change nothing, and what to use
REFUSED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("", "1"), "fit.micro_batch accumulates"),
    "ACCELERATE_DYNAMO_BACKEND": (OFF, "fit.compile=true compiles the network"),
    "ACCELERATE_USE_DEEPSPEED": (OFF, SHARD),
    "ACCELERATE_USE_FSDP": (OFF, SHARD),
    "ACCELERATE_USE_MEGATRON_LM": (OFF, SHARD),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (OFF, SHARD),
    "ACCELERATE_USE_SAGEMAKER": (OFF, "accelerate launch and torchrun start several processes"),
    "NVIDIA_TF32_OVERRIDE": (("", "0"), PRECISION),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": (OFF, PRECISION),
    "ONEDNN_DEFAULT_FPMATH_MODE": (("", "strict"), PRECISION),
    "DNNL_DEFAULT_FPMATH_MODE": (("", "strict"), PRECISION),
    "DIFFUSERS_ATTN_BACKEND": (("", "native"), "attention is torch's own"),
    "ATEN_CPU_CAPABILITY": (("",), PROCESSOR),
    "MKL_CBWR": (("",), PROCESSOR),
    "MKL_ENABLE_INSTRUCTIONS": (("",), PROCESSOR),
}
# of a compiled network, and of adamw_8bit, which torchao compiles
COMPILER = ("TORCH_COMPILE_", "TORCHDYNAMO_", "TORCH_DYNAMO_", "TORCHINDUCTOR_")
COMPILER_OFF = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE", "TORCHDYNAMO_SUPPRESS_ERRORS")
BESIDE = re.compile(  # where it compiles and what it prints, not what it computes
    "ASSERT|BUNDLE|CACHE|DEBUG|LOG|PGO|PROF|REPLAY|REPORT|REPRO|SAVE|THREADS$|TIMEOUT|TRACE|VERBOSE|WORKER"
)
WAYS = {"MIXED_PRECISION": "fit.precision", "USE_CPU": "device", "TORCH_DEVICE": "device"}
PREFIXES = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "FORK_LAUNCHED")
USUAL = ("ACCELERATE_DYNAMO_",)  # the launcher always writes these; they belong to the backend
KEPT = ("ACCELERATE_CPU_AFFINITY", "ACCELERATE_LOG_LEVEL")  # how it runs, not what it computes

# logger -> the remark of it that diffusers and peft cause where torchao is installed: they import all of
# it, and flowmatch uses neither its kernels for GPUs nor files with its tensors
NEEDLESS = {
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
    "torch.utils._pytree": "%s is an Enum subclass",
    "torchao": "Failed to load ",
}


@functools.cache  # once
def hush() -> None:
    """Leave out the remarks of NEEDLESS, and no other."""

    def needed(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(NEEDLESS[record.name])

    for name in NEEDLESS:
        logging.getLogger(name).addFilter(needed)


def check(config: Config | None = None) -> None:
    """Check that no variable changes what a config computes.

    Raises:
        UserError: One does; a line for each.
    """
    faults = []
    for name, value, way in _wrong(config):
        faults.append(f"{name}={value} would change the result; unset it: {way}")
    if faults:
        raise UserError(faults)


def _wrong(config: Config | None) -> Iterator[tuple[str, str, str]]:
    for name, (harmless, way) in REFUSED.items():
        value = os.environ.get(name, "")
        if value.strip().lower() not in harmless:
            yield name, value, way
    # diffusers' rule, which leaves its classes without torch
    if os.environ.get("USE_TORCH", "auto").upper() not in SEEN:
        yield "USE_TORCH", os.environ["USE_TORCH"], "diffusers leaves torch out"
    if os.environ.get("USE_TF", "").upper() in SEEN[:-1]:
        yield "USE_TF", os.environ["USE_TF"], "diffusers leaves torch out"
    parts = [getattr(config, "fit", None), config]
    tf32 = any(getattr(part, "precision", None) == "tf32" for part in parts)
    if tf32 and os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":
        yield "NVIDIA_TF32_OVERRIDE", "0", PRECISION
    compiled = ["compile=true" for part in parts if getattr(part, "compile", False)]
    if getattr(parts[0], "optimizer", None) == "adamw_8bit":
        compiled.append("fit.optimizer=adamw_8bit")
    for name in sorted(name for name in os.environ if compiled and name.startswith(COMPILER)):
        value = os.environ[name]
        usual = OFF if name in COMPILER_OFF else ("",)
        if BESIDE.search(name) is None and value.lower() not in usual:
            yield name, value, f"or leave {compiled[0]} out"


def settle(config: Config | None = None) -> str | None:
    """Check the variables, and take away those that Accelerate would read.

    Returns:
        A line that names what was set to no effect, or None.

    Raises:
        UserError: A variable changes what the config computes.
    """
    check(config)
    ignored = []
    for name in sorted(name for name in os.environ if name.startswith(PREFIXES)):
        value = os.environ[name].strip().lower()
        if name in KEPT and (name != "ACCELERATE_CPU_AFFINITY" or value in ON):
            continue
        given = os.environ.pop(name)
        if value not in OFF and name not in REFUSED and not name.startswith(USUAL):
            way = WAYS.get(name.removeprefix("ACCELERATE_"))
            ignored.append(f"{name}={given}" + (f" (see {way})" if way else ""))
    if os.environ.get("DIFFUSERS_ATTN_BACKEND") == "":  # which diffusers takes for a name
        del os.environ["DIFFUSERS_ATTN_BACKEND"]
    if not ignored:
        return None
    return f"ignored, because the config alone decides: {', '.join(ignored)}"
