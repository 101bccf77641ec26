"""The card of an exported folder: how a network is sampled in diffusers, and what is to be known."""

from dataclasses import dataclass

from flowmatch.models import teachers

STOCK = """from diffusers import DiffusionPipeline
image = DiffusionPipeline.from_pretrained("FOLDER")({}).images[0]"""
REMOTE = 'custom_pipeline="pipeline", trust_remote_code=True'
OURS = f"""from diffusers import DiffusionPipeline
sample = DiffusionPipeline.from_pretrained("FOLDER", {REMOTE})({{}}).images[0]"""
EXACT = """from diffusers import FlowMatchEulerDiscreteScheduler
exact = FlowMatchEulerDiscreteScheduler.from_pretrained("FOLDER", subfolder="scheduler_1")"""
EXACT_N = "`scheduler_N/` is exact for N steps and for no others"
DDPM_NOTES = f"""\
Always pass `num_inference_steps`: the pipeline's own default is 1000. The folder's scheduler is
right for any number of steps, to the difference below. {EXACT_N}; one step is best sampled so:

```python
{EXACT}
pipe = DiffusionPipeline.from_pretrained("FOLDER", scheduler=exact)
image = pipe(num_inference_steps=1).images[0]
```
"""
ONE_STEP = "it samples in one Euler step, and in no other number of them."
ONE_STEP_NOTES = """\
Always pass `num_inference_steps=1`: the pipeline's own default is 1000. The folder's scheduler, the
same as in `scheduler_1/`, is exact for that one step.
"""
ONE_STEP_ONLY = "For one step only: always pass `num_inference_steps=1`.\n"
LABELS_NOTES = f"""\
`class_labels` is one label, or a list of batch_size. Always pass it: without it the pipeline draws
labels at random, the null class among them. The folder's scheduler is right for {{right}},
to the difference below. Exact sampling, and guidance, need the pipeline that lies in this folder;
{{exact}}:

```python
{EXACT}
pipe = DiffusionPipeline.from_pretrained("FOLDER", scheduler=exact, {REMOTE})
image = pipe(class_labels=0, guidance_scale=1.0, num_inference_steps=1).images[0]
```
"""
LABELS_ANY = {"right": "any number of steps", "exact": EXACT_N}
LABELS_ONE = {"right": "that step", "exact": "`scheduler_1/` is exact"}
LATENT_NOTES = """
Samples are latents, as they come. `vae.decode(sample[None] / vae.config.scaling_factor)`, by the VAE
that coded the data, makes pictures of them.
"""
OUR_NOTES = "diffusers has no pipeline for this network, so its own lies in this folder"
GRID = """; it sets the uniform grid
of any number of steps by itself. Always pass `num_inference_steps`.
"""
GRIDS = """: any number of
steps, uniform or short at the noise (`shift=`), by Euler, Heun, AB2 and others (`solver=`)"""
CARD = """---
library_name: diffusers
tags: [flow-matching, rectified-flow, reflow]
---

# A {few}-step rectified flow

A {network}, reflowed {round} time(s) with flowmatch: {steps}

```python
{snippet}
```

{notes}
## Quality

{table}
## Fidelity of this folder

Largest difference of a value to flowmatch's own Euler solver, sampled in a fresh process without
flowmatch when this folder was made (images in [0, 1]):

{differences}

`pipeline.py` (guidance, float32 state, images and points) needs torch and diffusers alone, and loads
with `custom_pipeline="pipeline", trust_remote_code=True`. `scheduler_flowmatch/` is for
`flowmatch.RectifiedFlowScheduler.from_pretrained("FOLDER", subfolder="scheduler_flowmatch")`, with the
package installed{grid}.

The student's weights: sha256 {digest}. Provenance: `manifest.json`.
"""


@dataclass(frozen=True)
class Kind:
    """How a network is exported."""

    name: str  # class of the pipeline in model_index.json
    stock: bool  # whether DiffusionPipeline.from_pretrained(folder) loads it without our code
    snippet: str  # the lines that load and sample, FOLDER standing for the folder
    notes: str  # what the card says about steps, schedulers and labels


def kind_of(student: teachers.Teacher) -> Kind:
    """Choose the pipeline: a stock one for a UNet2DModel of pictures, ours for everything else."""
    coded, one = latent(student), student.one_step
    unet = type(student.net).__name__ == "UNet2DModel" and not coded
    if unet and student.classes is None:
        notes = ONE_STEP_NOTES if one else DDPM_NOTES
        return Kind("DDPMPipeline", True, STOCK.format("num_inference_steps=1"), notes)
    if unet:
        snippet = STOCK.format("class_labels=0, num_inference_steps=1")
        notes = LABELS_NOTES.format(**(LABELS_ONE if one else LABELS_ANY))
        notes = ONE_STEP_ONLY + notes if one else notes
        return Kind("ConsistencyModelPipeline", True, snippet, notes)
    arguments = "num_inference_steps=1" + (", class_labels=0" if student.classes else "")
    if len(student.shape) < 3 or coded:
        arguments += f', output_type="{"latent" if coded else "np"}"'
    notes = f"{ONE_STEP_ONLY}{OUR_NOTES}.\n" if one else OUR_NOTES + GRID
    notes += LATENT_NOTES if coded else ""
    return Kind("ReflowPipeline", False, OURS.format(arguments), notes)


def latent(student: teachers.Teacher) -> bool:
    """Tell whether its samples are latents: three axes, and no picture's number of channels."""
    return len(student.shape) == 3 and student.shape[0] not in (1, 3)


def describe(differences: dict[int, dict[str, float]], kind: Kind) -> str:
    """Write the table of differences for the card."""
    names = {
        "exact": "with the exact `scheduler_N/`" if kind.stock else "with the folder's scheduler",
        "folder": "with the folder's own scheduler",
    }
    columns = [names[key] for key in next(iter(differences.values()))]
    lines = [f"| steps | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for n, found in differences.items():
        lines.append(f"| {n} | " + " | ".join(f"{d:.2g}" for d in found.values()) + " |")
    return "\n".join(lines)


def text(
    student: teachers.Teacher, kind: Kind, table: str, differences: dict[int, dict[str, float]]
) -> str:
    """Write the card. table: of the evaluation, Markdown. differences: steps -> name -> largest one."""
    return CARD.format(
        few="one" if student.one_step else "few",
        network=type(student.net).__name__,
        round=student.round,
        steps=ONE_STEP if student.one_step else "it samples in one to four Euler steps.",
        snippet=kind.snippet,
        notes=kind.notes,
        grid="" if student.one_step else GRIDS,
        table=table,
        differences=describe(differences, kind),
        digest=student.digest,
    ).replace("FOLDER", "path/to/this/folder")
