"""Sample an exported folder in a process that cannot import flowmatch: `export` runs it as a check.

usage: python sample_fresh.py, with a JSON object on the standard input: folder, pipeline (the class in
its model_index.json), steps, samples, seed, output_type (np or latent), labels (or null), decodes
(whether it has a VAE). It writes samples.pt to the working directory: steps -> {"exact": ..., "folder":
..., "latent": what a VAE decodes} -> [samples, ...], images in [0, 1].

Or, for a pipeline that reads prompts: load (the code of its card), ways (a list of code and call),
prompts, seed, noise (whether noise.pt holds it), device. It writes the last state of each way.
"""

import functools
import json
import sys
from typing import Any

sys.modules["flowmatch"] = None  # type: ignore[assignment]  # importing it is an error from here on

import torch  # noqa: E402
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler  # noqa: E402
from torch import Tensor  # noqa: E402

OURS = {"custom_pipeline": "pipeline", "trust_remote_code": True}


def draw(pipe: Any, steps: int, task: dict[str, Any]) -> Tensor:
    """Sample with the noise of the task's seed. Return [samples, ...]; images as [samples, C, H, W]."""
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


def sample_prompts(task: dict[str, Any]) -> None:
    """Run the code of a card: load once, and sample in each way from given noise."""
    if task["flowmatch"]:  # of a card that names our scheduler
        del sys.modules["flowmatch"]
    space: dict[str, Any] = {}
    exec(task["load"], space)
    pipe = space["pipe"]
    pipe.set_progress_bar_config(disable=True)
    pipe.to(task["device"])
    own, output = pipe.scheduler, None
    found: dict[str, Any] = {}
    for number, way in enumerate(task["ways"]):
        pipe.scheduler = own
        exec(way["code"], space)
        step, states = pipe.scheduler.step, list[Tensor]()

        @functools.wraps(step)
        def kept(*args: Any, _step: Any = step, _states: Any = states, **kwargs: Any) -> Any:
            result = _step(*args, **kwargs)
            _states.append(result[0] if isinstance(result, tuple) else result.prev_sample)
            return result

        pipe.scheduler.step = kept
        noise = {"latents": torch.load("noise.pt").to(task["device"])} if task["noise"] else {}
        torch.manual_seed(task["seed"])
        if task["generator"]:
            noise["generator"] = torch.Generator().manual_seed(task["seed"])
        output = pipe(prompt=task["prompts"], **way["call"], **noise)
        del pipe.scheduler.step
        found[str(number)] = states[-1].cpu()
    found["output"] = next(iter(output)) if isinstance(output, dict) else ""
    torch.save(found, "samples.pt")


def main(task: dict[str, Any]) -> None:
    """Load the folder as its users do, each way once, and sample with every number of steps."""
    torch.set_num_threads(1)
    if "load" in task:
        return sample_prompts(task)

    def load(**arguments: Any) -> Any:
        pipe = DiffusionPipeline.from_pretrained(task["folder"], **arguments)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    found: dict[str, dict[str, Tensor]] = {}
    if task["pipeline"] == "ReflowPipeline":
        pipe = load(**OURS)
        found = {str(n): {"exact": draw(pipe, n, task)} for n in task["steps"]}
        for n in task["steps"] if task["decodes"] else ():
            found[str(n)]["latent"] = draw(pipe, n, task | {"output_type": "latent"})
    else:
        # ConsistencyModelPipeline rejects the exact scheduler; the folder's own pipeline takes it
        code = {} if task["pipeline"] == "DDPMPipeline" else OURS
        schedulers = {
            n: FlowMatchEulerDiscreteScheduler.from_pretrained(
                task["folder"], subfolder=f"scheduler_{n}"
            )
            for n in task["steps"]
        }
        pipe, exact = load(), load(scheduler=schedulers[task["steps"][0]], **code)
        for n, scheduler in schedulers.items():
            exact.scheduler = scheduler
            found[str(n)] = {"exact": draw(exact, n, task), "folder": draw(pipe, n, task)}
            if task["decodes"]:
                found[str(n)]["latent"] = draw(exact, n, task | {"output_type": "latent"})
    torch.save(found, "samples.pt")


if __name__ == "__main__":
    main(json.load(sys.stdin))  # read after the imports, which run while the folder is written
