"""Sample an exported folder in a process that cannot import flowmatch: what `export` runs to check it.

usage: python sample_fresh.py TASK, a JSON object: folder, pipeline (the class of its
model_index.json), steps, samples, seed, output_type (np, or latent), labels (or null). Writes
samples.pt into the working directory, steps -> {"exact": ..., "folder": ...} -> [samples, ...],
images in [0, 1].
"""

import json
import sys
from typing import Any

sys.modules["flowmatch"] = None  # type: ignore[assignment]  # its import is an error from here on

import torch  # noqa: E402
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler  # noqa: E402
from torch import Tensor  # noqa: E402

OURS = {"custom_pipeline": "pipeline", "trust_remote_code": True}


def draw(pipe: Any, steps: int, task: dict[str, Any]) -> Tensor:
    """Sample with the noise of the task's seed."""
    pipe.set_progress_bar_config(disable=True)
    labels = {} if task["labels"] is None else {"class_labels": task["labels"]}
    x = pipe(
        batch_size=task["samples"],
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(task["seed"]),
        output_type=task["output_type"],
        return_dict=False,
        **labels,
    )[0]
    if task["output_type"] == "latent":
        return x
    return torch.from_numpy(x).permute(0, 3, 1, 2) if x.ndim == 4 else torch.from_numpy(x)


def main(task: dict[str, Any]) -> None:
    """Load the folder as its users do, and sample."""
    torch.set_num_threads(1)
    folder, load = task["folder"], DiffusionPipeline.from_pretrained
    found: dict[str, dict[str, Tensor]] = {}
    for n in task["steps"]:
        if task["pipeline"] == "ReflowPipeline":
            found[str(n)] = {"exact": draw(load(folder, **OURS), n, task)}
            continue
        exact = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder=f"scheduler_{n}")
        # ConsistencyModelPipeline cannot run it: the exact scheduler goes into the folder's own
        code = {} if task["pipeline"] == "DDPMPipeline" else OURS
        found[str(n)] = {
            "exact": draw(load(folder, scheduler=exact, **code), n, task),
            "folder": draw(load(folder), n, task),
        }
    torch.save(found, "samples.pt")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
