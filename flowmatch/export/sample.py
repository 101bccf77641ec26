"""`flowmatch sample EXPORT`: a few samples of an export, as PNG files or one array."""

import argparse
import json
from pathlib import Path
from typing import Any

from flowmatch.config import UserError, expanded
from flowmatch.runs import manifest, storage, trusted

OWN = (
    "latent",
    "latents_scale",
    "latents_shift",
    "id2label",
)  # what ours keeps in model_index.json


def main(argv: list[str]) -> None:
    """Sample an export from the command line."""
    from flowmatch.runs.command import exit_codes

    parser = argparse.ArgumentParser("flowmatch sample", allow_abbrev=False)
    parser.add_argument("export", help="folder of an export, or a model's name on the hub")
    parser.add_argument("--steps", type=int, default=1, help="network evaluations a sample")
    parser.add_argument("--out", default="samples", help="folder for the files")
    parser.add_argument("--count", type=int, default=16, help="number of samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--labels", type=words, help="classes, numbers or names, separated by commas"
    )
    parser.add_argument("--prompt", help="what to sample, for a pipeline that reads prompts")
    parser.add_argument("--trust", help="module of the network's class, if that is your own")
    call = parser.parse_args(argv)
    with exit_codes("sample"):
        trusted.take([f"trust={call.trust}"] if call.trust else [])
        export, out = expanded(call.export), Path(expanded(call.out))
        more = call.labels, call.prompt
        print(sample(export, call.steps, out, call.count, call.seed, *more))


def words(text: str) -> list[str]:
    """Split words that are separated by commas."""
    return [part.strip() for part in text.split(",")]


def numbers(labels: list[str], names: dict[Any, str], classes: int) -> list[int]:
    """Return the numbers of classes that are given by number or name. Raises UserError."""
    known = {name: int(k) for k, name in names.items()}
    found = [known.get(word, int(word) if word.isdecimal() else classes) for word in labels]
    if any(number >= classes for number in found):
        what = f"expected 0 to {classes - 1}" if classes else "the network takes no labels"
        named = f", or {', '.join(known)}" if known else ""
        raise UserError(f"--labels {','.join(labels)}: {what}{named}")
    return found


def sample(
    export: str,
    steps: int,
    out: Path,
    count: int,
    seed: int,
    labels: list[str] | None = None,
    prompt: str | None = None,
) -> str:
    """Sample an export, and write `00.png`, ... or, for points and latents, `samples.npy`.

    Args:
        export: folder of an export, or a model's name on the hub.
        steps: number of steps; the folder's exact scheduler for it is used where there is one.
        out: folder of the files, made if absent.
        count: number of samples.
        seed: seed of the noise.
        labels: classes, by number or name, repeated up to the count.
        prompt: for a pipeline that reads prompts; by default the one of its card.

    Returns:
        A line that says what was written.

    Raises:
        UserError: where there is no export, a file of it has changed, a number is out of range, or `out`
            lies in a sealed folder.
    """
    ranges = {"steps": (steps, 1, 1000), "count": (count, 1, 100_000), "seed": (seed, 0, 2**63 - 1)}
    faults = [
        f"--{name} {value}: expected a number from {low} to {high}"
        for name, (value, low, high) in ranges.items()
        if not low <= value <= high
    ]
    if faults:
        raise UserError(faults)
    storage.check_folder(out, "--out")
    folder = Path(export)
    if folder.exists() and not (folder / "model_index.json").is_file():
        if (folder / "pytorch_lora_weights.safetensors").is_file():
            raise UserError(
                f"{export} is an adapter alone: sample it with the code of its README.md"
            )
        raise UserError(f"{export}: not an export: it has no model_index.json")
    sealed = manifest.find(folder, "export")
    inside = sealed is not None and out.resolve().is_relative_to(folder.resolve())
    if inside or manifest.sealed(out):
        raise UserError(f"--out={out} lies in a sealed folder; name another one")
    if sealed is not None:
        manifest.verify(folder, "export", sealed)
    if sealed is not None and "ways" in sealed["facts"]:
        from flowmatch.export import text_sample

        if labels:
            raise UserError("--labels: this pipeline reads prompts; give --prompt")
        drawn = text_sample.draw(folder, sealed["facts"], steps, prompt, count, seed)
        return text_sample.write(drawn, out)
    if prompt is not None:
        raise UserError(f"--prompt: {export} is no export of a pipeline that reads prompts")
    import numpy as np
    import torch

    from flowmatch.models.velocity import classes_of, sample_shape

    try:
        pipe = _load(export, folder, steps)
    except UserError:
        raise
    except Exception as error:  # damaged files, and classes of diffusers, raise anything
        told = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{export}: no pipeline could be read there: {told}") from None
    if not hasattr(pipe, "unet"):
        raise UserError(f"{export}: {type(pipe).__name__} is not the pipeline of an export")
    classes = classes_of(pipe.unet) or 0
    named = getattr(pipe, "id2label", {}) or (sealed or {"facts": {}})["facts"].get("id2label")
    chosen = numbers(labels or [], named or {}, classes)
    pipe.set_progress_bar_config(disable=True)
    shape = sample_shape(pipe.unet)
    more: dict[str, Any] = {}
    if len(shape) == 1:
        more["output_type"] = "np"  # points
    elif len(shape) != 3:
        more["output_type"] = "np"
    elif shape[0] not in (1, 3) and not decodes(pipe):
        more["output_type"] = "latent"
    if chosen:
        more["class_labels"] = [chosen[i % len(chosen)] for i in range(count)]
    generator = torch.Generator().manual_seed(seed)
    images = pipe(batch_size=count, num_inference_steps=steps, generator=generator, **more).images
    out.mkdir(parents=True, exist_ok=True)
    if isinstance(images, list):
        for number, image in enumerate(images):
            image.save(out / f"{number:02d}.png")
        return f"wrote {len(images)} images into {out}"
    np.save(out / "samples.npy", np.asarray(images))
    return f"wrote {out / 'samples.npy'}: {list(np.asarray(images).shape)}"


def decodes(pipe: Any) -> bool:
    """Tell whether a pipeline has a VAE."""
    return any(getattr(pipe, name, None) is not None for name in ("vae", "vqvae"))


def _load(export: str, folder: Path, steps: int) -> Any:
    from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

    import flowmatch
    from flowmatch.models import networks

    index = folder / "model_index.json"
    name = json.loads(index.read_text())["_class_name"] if index.is_file() else None
    if name == "ReflowPipeline" or name == ["pipeline", "ReflowPipeline"]:
        # from our own classes: no code of the folder is run
        unet = networks.load(export, "export", "unet")
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(export, subfolder="scheduler")
        known = json.loads(index.read_text())
        more = {key: known[key] for key in OWN if key in known}
        if known.get("vae", [None])[0]:
            more["vae"] = networks.load(export, "export", "vae")
        return flowmatch.ReflowPipeline(unet, scheduler, **more)
    exact = folder / f"scheduler_{steps}"
    if name == "DDPMPipeline" and exact.is_dir():
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(exact)
        return DiffusionPipeline.from_pretrained(export, scheduler=scheduler)
    return DiffusionPipeline.from_pretrained(export)
