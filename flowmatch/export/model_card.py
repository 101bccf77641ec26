"""The model card of an exported folder: how to sample it with diffusers, and how good it is."""

from dataclasses import dataclass, replace

from flowmatch.config import step_words
from flowmatch.export import provenance
from flowmatch.export.provenance import Origin
from flowmatch.models.autoencoder import Autoencoder
from flowmatch.models.teachers import Teacher

STOCK = """from diffusers import DiffusionPipeline
image = DiffusionPipeline.from_pretrained("FOLDER")({}).images[0]"""
REMOTE = 'custom_pipeline="pipeline", trust_remote_code=True'
OURS = f"""from diffusers import DiffusionPipeline
sample = DiffusionPipeline.from_pretrained("FOLDER", {REMOTE})({{}}).images[0]"""
EXACT = """from diffusers import FlowMatchEulerDiscreteScheduler
exact = FlowMatchEulerDiscreteScheduler.from_pretrained("FOLDER", subfolder="scheduler_1")"""
EXACT_N = "`scheduler_N/` is exact for N steps only"
DDPM_NOTES = f"""\
Always pass `num_inference_steps`; the default of the pipeline is 1000. The scheduler of this folder
takes any number of steps, with the small error listed below. {EXACT_N}. To sample exactly in one step:

```python
{EXACT}
pipe = DiffusionPipeline.from_pretrained("FOLDER", scheduler=exact)
image = pipe(num_inference_steps=1).images[0]
```
"""
ONE_STEP = "It samples in exactly one Euler step."
FOR_STEPS = "It samples in {}, equal Euler steps: it was trained at their times alone."
WINDOWS = "It samples in {} equal Euler steps, or a multiple of them."
ONE_STEP_NOTES = """\
Always pass `num_inference_steps=1`; the default of the pipeline is 1000. The scheduler of this folder,
also stored in `scheduler_1/`, is exact for one step.
"""
ONE_STEP_ONLY = "For one step only: always pass `num_inference_steps=1`.\n"
LABELS_NOTES = f"""\
Always pass `class_labels`: one label, or a list of batch_size labels. Without it the pipeline draws
random labels, including the null class. The scheduler of this folder takes {{steps}}, with the small
error listed below. Exact sampling and guidance need the pipeline file in this folder; {{exact}}:

```python
{EXACT}
pipe = DiffusionPipeline.from_pretrained("FOLDER", scheduler=exact, {REMOTE})
image = pipe(class_labels=0, guidance_scale=1.0, num_inference_steps=1).images[0]
```
"""
LABELS_ANY = {"steps": "any number of steps", "exact": EXACT_N}
LABELS_ONE = {"steps": "one step", "exact": "`scheduler_1/` is exact"}
HALF_NOTES = f"""
With `dtype=torch.bfloat16` this pipeline fails at pictures and arrays (TypeError in diffusers:
numpy has no bfloat16). Use `output_type="pt"`, or `dtype=torch.float16`, or the pipeline file of
this folder, which keeps its state in float32:

```python
DiffusionPipeline.from_pretrained("FOLDER", dtype=torch.bfloat16, {REMOTE})
```
"""
LATENT_NOTES = """
Samples are the values that were trained on. Latents are decoded with the VAE that encoded the data:
`vae.decode(sample[None] / vae.config.scaling_factor)`.
"""
LDM_NOTES = f"""\
Always pass `num_inference_steps`; the default of the pipeline is 50. It samples latents and decodes them
with the VAE in `vqvae/`. The scheduler of this folder takes any number of steps, with the small error
listed below. {EXACT_N}, and needs the pipeline file in this folder:

```python
{EXACT}
pipe = DiffusionPipeline.from_pretrained("FOLDER", scheduler=exact, {REMOTE})
image = pipe(num_inference_steps=1).images[0]
```
"""
OUR_NOTES = "diffusers has no pipeline for this network, so this folder contains one"
GRID = """. It uses the
uniform grid for any number of steps. Always pass `num_inference_steps`.
"""
GRIDS = """ It takes any number of
steps, on a uniform or a shifted grid (`shift=`), by Euler, Heun, AB2 and other solvers (`solver=`)."""
CARD = """---
library_name: diffusers
{front}tags: [flow-matching, rectified-flow, reflow]
---

# A {few}-step rectified flow

A {network} trained with flowmatch, after {rounds} of reflow. {steps}
{picture}
```python
{snippet}
```

{notes}
## Quality

{table}{read}{training}
## Fidelity of this folder

Largest difference between a sample of this folder and one of flowmatch's own Euler solver (images in
[0, 1]). It was measured when the folder was made, in a new process without flowmatch:

{differences}

`pipeline.py` adds guidance and a float32 state, and samples images and points. It needs torch and
diffusers only; load it with `{remote}`.
`scheduler_flowmatch/` needs flowmatch: load it with
`flowmatch.RectifiedFlowScheduler.from_pretrained("FOLDER", subfolder="scheduler_flowmatch")`.{grids}

Weights: sha256 {digest}. Provenance: `manifest.json`.
"""


@dataclass(frozen=True)
class Kind:
    """The way in which a network is exported."""

    name: str  # class of the pipeline, for model_index.json
    stock: bool  # whether DiffusionPipeline.from_pretrained(folder) loads it without our code
    snippet: str  # code that loads and samples; FOLDER stands for the folder
    notes: str  # text of the card about steps, schedulers and labels
    draws: bool = True  # whether its samples are pictures


def kind_of(student: Teacher, vae: Autoencoder | None = None) -> Kind:
    """Choose the pipeline: a stock one for a UNet2DModel of images or latents, else ours.

    Args:
        student: The exported network.
        vae: What its samples are latents of.
    """
    kind, n = _kind_of(student, vae), student.windows
    if n is not None:
        least, all_n = n, f"multiples of {n} steps"
    elif len(student.for_steps) and not student.one_step:
        least, all_n = student.for_steps[0], step_words(student.for_steps)
    else:
        return kind
    snippet, notes = (_in(least, all_n, text) for text in (kind.snippet, kind.notes))
    return replace(kind, snippet=snippet, notes=notes)


def _in(n: int, all_n: str, text: str) -> str:
    """Make a text on one step one on n, and one on any number of steps one on those of all_n."""
    for one, many in (
        ("num_inference_steps=1", f"num_inference_steps={n}"),
        ('"scheduler_1"', f'"scheduler_{n}"'),
        ("in one step", f"in {step_words([n])}"),
        ("any number of steps", all_n),
    ):
        text = text.replace(one, many)
    return text


def _kind_of(student: Teacher, vae: Autoencoder | None) -> Kind:
    coded, one = latent(student) and vae is None, student.one_step
    square = len(student.shape) == 3 and student.shape[1] == student.shape[2]
    unet = type(student.net).__name__ == "UNet2DModel" and not coded
    if vae is not None and unet and student.classes is None and square and vae.plain:
        notes = ONE_STEP_ONLY + LDM_NOTES if one else LDM_NOTES
        return Kind("LDMPipeline", True, STOCK.format("num_inference_steps=1"), notes)
    unet = unet and vae is None
    if unet and student.classes is None:
        notes = ONE_STEP_NOTES if one else DDPM_NOTES
        snippet = STOCK.format("num_inference_steps=1")
        return Kind("DDPMPipeline", True, snippet, notes + HALF_NOTES)
    if unet and square:  # which is all that it draws
        snippet = STOCK.format("class_labels=0, num_inference_steps=1")
        notes = LABELS_NOTES.format(**(LABELS_ONE if one else LABELS_ANY))
        notes = ONE_STEP_ONLY + notes if one else notes
        notes += names_note(student)
        return Kind("ConsistencyModelPipeline", True, snippet, notes + HALF_NOTES)
    first = f'"{student.names[0]}"' if student.names else 0
    arguments = "num_inference_steps=1" + (f", class_labels={first}" if student.classes else "")
    if len(student.shape) != 3 or coded:
        arguments += f', output_type="{"latent" if coded else "np"}"'
    notes = f"{ONE_STEP_ONLY}{OUR_NOTES}.\n" if one else OUR_NOTES + GRID
    notes += LATENT_NOTES if coded else ""
    notes += names_note(student)
    draws = len(student.shape) == 3 and not coded
    return Kind("ReflowPipeline", False, OURS.format(arguments), notes, draws)


def names_note(student: Teacher) -> str:
    """List the names of the classes; nothing where they have none."""
    if not student.names:
        return ""
    listed = ", ".join(f"{k} `{name}`" for k, name in enumerate(student.names))
    return f"\nClasses: {listed}. The pipeline file of this folder takes them by name.\n"


def latent(student: Teacher) -> bool:
    """Return whether the samples are latents: it says so, or no picture has so many channels."""
    odd = len(student.shape) == 3 and student.shape[0] not in (1, 3)
    return student.latents is not None or odd


def describe(differences: dict[int, dict[str, float]], kind: Kind) -> str:
    """Write the table of differences in Markdown.

    Args:
        differences: Steps -> name (exact, folder) -> largest difference.
        kind: How the network is exported.
    """
    names = {
        "exact": "with the exact `scheduler_N/`"
        if kind.stock
        else "with the scheduler of the folder",
        "folder": "with the scheduler of the folder",
        "latent": "the same before decoding",
    }
    columns = [names[key] for key in next(iter(differences.values()))]
    lines = [f"| steps | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for n, found in differences.items():
        lines.append(f"| {n} | " + " | ".join(f"{d:.2g}" for d in found.values()) + " |")
    return "\n".join(lines)


def text(
    student: Teacher,
    kind: Kind,
    table: str,
    differences: dict[int, dict[str, float]],
    origin: Origin,
    license: str | None = None,
    picture: str = "",
) -> str:
    """Write the card.

    Args:
        student: The exported network.
        kind: How it is exported.
        table: Of the evaluation, Markdown.
        differences: Steps -> name -> largest difference, as in `describe`.
        origin: Of the student.
        license: Identifier of the licence, such as apache-2.0; None where there is none yet.
        picture: File of the samples beside the card, or "".
    """
    tag, n = "unconditional-image-generation" if kind.draws else "", student.windows
    steps = "It samples in one to four Euler steps." if n is None else WINDOWS.format(n)
    if student.for_steps:
        steps = ONE_STEP if student.one_step else FOR_STEPS.format(step_words(student.for_steps))
    shown, training = provenance.sections(origin, license, picture)
    return CARD.format(
        front=provenance.written(provenance.front(license, tag, origin)),
        picture=shown,
        read=provenance.READ if "real against real" in table else "",
        training=training,
        few="one" if student.one_step else "few",
        network=type(student.net).__name__,
        rounds="1 round" if student.round == 1 else f"{student.round} rounds",
        steps=steps,
        snippet=kind.snippet,
        notes=kind.notes,
        remote=REMOTE,
        grids="" if student.for_steps or n else GRIDS,
        table=table,
        differences=describe(differences, kind),
        digest=student.digest,
    ).replace("FOLDER", "path/to/this/folder")
