"""What all processes of a job must have alike, so that they train one model."""

import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any

import flowmatch
from flowmatch import config as configs
from flowmatch.runs import group, process, trusted
from flowmatch.runs.experiment import root
from flowmatch.runs.folder import Plan

# on which numbers depend, where they are installed
LIBRARIES = (
    *("torch", "diffusers", "accelerate", "numpy", "scipy", "pillow", "transformers", "peft"),
    *("torchao", "datasets", "webdataset", "triton"),
)


def facts(plan: Plan, work: bool) -> dict[str, Any]:
    """List what decides the result, and the order in which the processes meet.

    Args:
        plan: The plan of this process.
        work: Whether there is work to do in the run folder that it sees.
    """
    config = plan.config
    found = configs.flatten(configs.content(config))
    if hasattr(config, "fit"):  # run fields too: who saves when decides who waits for whom
        found |= configs.flatten(config.fit.model_dump(mode="json"), "fit")
    found |= {f"(input) {name}": digest for name, digest in plan.inputs.items()}
    found |= {f"(version) {name}": version_of(name) for name in LIBRARIES}
    found["(version) flowmatch"] = flowmatch.__version__
    found["(code) flowmatch"] = code_digest()
    found |= {f"(code) {name}": digest for name, digest in trusted.digests().items()}
    found["(device)"] = process.device_of(config)
    found["(processes)"] = process.world_size()
    found["(run_dir) unfinished"] = work
    return found


def version_of(name: str) -> str:
    """Return the version of a library, or that it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def code_digest() -> str:
    """Hash the source files of the package and of its stages."""
    package = Path(__file__).parents[1]
    files = [*package.rglob("*.py"), *(root() / "pipelines").glob("*.py")]
    digest = hashlib.sha256()
    for name, file in sorted((str(file.relative_to(file.parents[1])), file) for file in files):
        digest.update(f"{name}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def stall_seconds(config: Any) -> float:
    """Return the seconds after which a silent process of a config counts as lost."""
    return float(getattr(getattr(config, "fit", None), "stall_seconds", group.STALL))
