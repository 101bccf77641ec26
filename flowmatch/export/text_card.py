"""The model card of a student that reads prompts: the code that samples it, and what is inside."""

import inspect
import re
from pathlib import Path
from typing import Any

from flowmatch.config import step_words
from flowmatch.export import provenance
from flowmatch.export.provenance import Origin
from flowmatch.export.text_export import EXACT, Choice, Found, Trial, Way
from flowmatch.models.adapters import COMFYUI, DIFFUSERS
from flowmatch.models.text import TextTeacher

CARD = """---
library_name: diffusers
{front}tags: [{tags}flow-matching, rectified-flow, reflow]
---

# {pipeline} in {few} step{s}

{intro}
{picture}
```python
{snippet}
```

{notes}

## Quality

{table}{read}{training}
## Fidelity of this folder

Largest difference between the last state of the pipeline and that of N Euler steps of flowmatch,
relative to the largest value, measured when the folder was made; the times that the network sees were
compared, too. A new process then loaded the folder with the code above{without} and gave the same
samples{rounding}.

{differences}

Weights: sha256 {digest}. Provenance: `manifest.json`.
"""
WHOLE = """\
The `{network}` of {source}, trained with flowmatch after {rounds} of reflow. All other parts are the
teacher's."""
ADAPTER = f"""\
An adapter (LoRA) of the `{{network}}` of {{source}}, trained with flowmatch after {{rounds}} of reflow.
`{DIFFUSERS}` is for diffusers, `{COMFYUI}` the same for ComfyUI."""
ROUNDING = ", but for rounding: the table is of the adapter in the network's weights"
BASE = "path/to/the/pipeline"  # in a card, where the teacher is a folder
LEFT = "Leave the guidance as you call the teacher{given}: it is an input of the network."
BAKED = (
    "Pass {off}. The guidance of the teacher's run ({given}) is inside the student; with another value "
    "the pipeline would guide it a second time."
)
TAGS = {"images": "text-to-image", "frames": "text-to-video", "audios": "text-to-audio"}
STATED = ("num_inference_steps", "sigmas", "timesteps")  # by the number of steps


def load_code(pipe: Any, base: str = "") -> str:
    """Write the code that loads the pipeline; FOLDER stands for the path of the export.

    Args:
        pipe: The pipeline.
        base: The teacher's, where the folder holds an adapter of it alone.
    """
    # Of parts that are None diffusers wants to be told, unless their class may lack them.
    optional = type(pipe)._optional_components
    empty = [name for name, part in pipe.components.items() if part is None]
    told = "".join(f", {name}=None" for name in empty if name not in optional)
    code = f'pipe = DiffusionPipeline.from_pretrained("{base or "FOLDER"}"{told})'
    named = f'weight_name="{DIFFUSERS}"'  # which diffusers cannot guess offline
    return code + (f'\npipe.load_lora_weights("FOLDER", {named})' if base else "")


def way_code(way: Way, guider: bool, adapter: bool = False) -> str:
    """Write the code that chooses a scheduler and disables the guider, where these are needed.

    Args:
        way: How to sample.
        guider: Whether the pipeline's guider is disabled.
        adapter: Whether all but the schedulers is loaded from elsewhere.
    """
    lines = []
    if adapter or way.place != "scheduler":
        named = f'{way.name}.from_pretrained("FOLDER", subfolder="{way.place}")'
        lines.append(f"pipe.scheduler = {named}")
    return "\n".join([*lines, *(["pipe.guider.disable()"] if guider else [])])


def imports(way: Way, adapter: bool = False) -> str:
    """Write the imports that `load_code` and `way_code` need."""
    ours = not type(way.scheduler).__module__.startswith("diffusers")
    stock = (adapter or way.place != "scheduler") and not ours
    names = ", ".join(["DiffusionPipeline", *([way.name] if stock else [])])
    more = f"\nfrom flowmatch import {way.name}" if ours and way.place != "scheduler" else ""
    return f"from diffusers import {names}{more}"


def call_code(prompt: str, arguments: dict[str, Any], output: str) -> str:
    """Write the code that samples one prompt."""
    words = ", ".join([repr(prompt), *(f"{name}={value!r}" for name, value in arguments.items())])
    return f"sample = pipe({words}){f'.{output}' if output else '[0]'}[0]"


def first_snippet(trial: Trial, choice: Choice, output: str, base: str | None = None) -> str:
    """Write the code that loads the folder and samples a prompt in the fewest steps.

    Args:
        trial: Of the choice.
        choice: What the folder holds.
        output: Name of the samples in the pipeline's output; "" where it is a tuple.
        base: Name of the teacher's pipeline of an adapter; default: as it was given.
    """
    adapter = bool(trial.base)
    steps, found = min(_possible(choice).items())
    way = found.way
    assert way is not None, "the pipeline takes so many steps"
    parts = [
        imports(way, adapter) + "\n",
        load_code(trial.pipe, trial.base and (base or trial.base)),
        way_code(way, trial.script.guider, adapter),
        call_code(trial.prompts[0], trial.arguments(steps, way), output),
    ]
    return "\n".join(part for part in parts if part)


def told(choice: Choice) -> list[str]:
    """Say in a line for each number of steps which scheduler was found, and how it differs."""
    lines = []
    for n, found in choice.steps.items():
        if found.way is None:
            lines.append(f"{n} steps: the pipeline cannot take them: {found.failure}")
            continue
        way = found.way
        line = f"{n} steps: {way.name} in {way.place}/, difference to flowmatch's own samples "
        lines.append(f"{line}{found.difference:.2g}")
        if way.place != "scheduler":
            lines[-1] += f"; with {choice.folder.name} in scheduler/ {found.folder:.2g}"
    return lines


def _possible(choice: Choice) -> dict[int, Found]:
    return {n: found for n, found in choice.steps.items() if found.way is not None}


def licence(source: str) -> dict[str, str]:
    """Return the entries on the licence in the card of a pipeline; none where it has no card.

    Args:
        source: A folder, or a name on the hub.
    """
    import yaml
    from huggingface_hub import ModelCard

    folder = Path(source)
    file = folder / "README.md"
    if folder.is_dir() and not file.is_file():
        return {}
    try:
        data = ModelCard.load(file if folder.is_dir() else source).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):  # offline, no card, no entries in it
        return {}
    names = ("license", "license_name", "license_link")
    return {name: str(data[name]) for name in names if data.get(name)}


def guidance(student: TextTeacher) -> dict[str, Any]:
    """Return the guidance of the teacher's call, by default where the call gives none.

    These are the arguments that switch it off, or else all those with a scale of guidance.
    """
    known = inspect.signature(student.pipe.__call__).parameters
    values = {name: student.call.get(name, known[name].default) for name in known}
    names = student.script.off or [n for n in known if re.search("(guidance|cfg)(_scale)?$", n)]
    return {name: values[name] for name in names if type(values[name]) in (int, float)}


def notes(trial: Trial, choice: Choice) -> str:
    """Write how to call the pipeline: steps, guidance, schedulers, other arguments."""
    student, script, lines = trial.student, trial.script, []
    taken = {n: found.way for n, found in _possible(choice).items() if found.way}
    lines.append(
        f"Always pass `num_inference_steps`: it was checked with {_listed(list(taken))}."
        + (
            f" It was trained for {step_words(student.for_steps)} only."
            if student.for_steps
            else ""
        )
    )
    lines += [
        f"{student.script.pipeline} cannot take {n} step{'s' * (n > 1)} ({found.failure})."
        for n, found in choice.steps.items()
        if found.way is None
    ]
    given = ", ".join(f"`{name}={value:g}`" for name, value in guidance(student).items())
    if script.off:
        off = ", ".join(f"`{name}={value:g}`" for name, value in script.off.items())
        lines.append(BAKED.format(off=off, given=given))
    elif script.guider:
        lines.append(BAKED.format(off="no guidance: `pipe.guider.disable()`", given="its guider"))
    else:
        lines.append(LEFT.format(given=f" ({given})" if given else ""))
    negative = student.prompts.negative or student.call.get("negative_prompt")
    if negative is not None:
        lines.append(f"Its negative prompt is inside, too: {negative!r}. Pass none.")
    call = trial.arguments(1, choice.folder).items()
    kept = {k: v for k, v in call if k not in STATED and k not in script.off}
    if kept:
        told = ", ".join(f"`{name}={value!r}`" for name, value in kept.items())
        lines.append(f"It was trained with {told}: pass the same.")
    folders = {n: way.place for n, way in taken.items() if way.place != "scheduler"}
    if folders:
        told = ", ".join(f"`{place}/` for {n}" for n, place in folders.items())
        lines.append(f"Exact schedulers lie in their own folders: {told}.")
    for n, way in taken.items():
        if way.call:
            told = ", ".join(f"`{name}={value}`" for name, value in way.call.items())
            lines.append(f"For {n} steps pass {told}: without it the pipeline takes other times.")
        if way.own_grid is not None:
            told = ", ".join(f"{1 - t:.3g}" for t in way.own_grid)
            lines.append(f"For {n} steps this pipeline lays its own noise levels: {told}.")
    return "\n".join(f"- {line}" for line in lines)


def describe(choice: Choice) -> str:
    """Write the table of differences in Markdown."""
    lines = [f"| steps | scheduler | difference | with `scheduler/` ({choice.folder.name}) |"]
    lines.append("|---|---|---|---|")
    for n, found in choice.steps.items():
        if found.way is None:
            lines.append(f"| {n} | not possible | | |")
            continue
        own = "fails" if found.folder == float("inf") else f"{found.folder:.2g}"
        exact = " (exact)" if found.difference <= EXACT else ""
        named = f"`{found.way.place}/` ({found.way.name})"
        lines.append(f"| {n} | {named} | {found.difference:.2g}{exact} | {own} |")
    return "\n".join(lines)


def text(
    trial: Trial,
    choice: Choice,
    table: str,
    source: str,
    output: str,
    origin: Origin,
    license: str | None = None,
    picture: str = "",
) -> str:
    """Write the card.

    Args:
        trial: Of the choice.
        choice: What the folder holds.
        table: Of the evaluation, Markdown.
        source: The teacher's pipeline: a folder, or a name on the hub.
        output: Name of the samples in the pipeline's output.
        origin: Of the student.
        license: Identifier of its licence; by default the teacher's.
        picture: File of the samples beside the card, or "".
    """
    student, steps = trial.student, _possible(choice)
    first = min(steps)
    taught = licence(source)
    own: dict[str, Any] = (
        taught if license in (None, taught.get("license")) else {"license": license}
    )
    entries = own | {k: v for k, v in {"pipeline_tag": TAGS.get(output)}.items() if v}
    if not Path(source).is_dir():
        entries |= {"base_model": source}
        entries |= {"base_model_relation": "adapter"} if trial.base else {}
    if origin.datasets:
        entries |= {"datasets": origin.datasets}
    shown, training = provenance.sections(origin, own.get("license"), picture)
    ours = any("flowmatch" in imports(found.way) for found in steps.values() if found.way)
    intro = (ADAPTER if trial.base else WHOLE).format(
        network=student.script.network,
        source=f"`{source}`" if "base_model" in entries else f"a {student.script.pipeline}",
        rounds="1 round" if student.round == 1 else f"{student.round} rounds",
    )
    few = str(max(steps)) if len(steps) == 1 else f"{first} to {max(steps)}"
    card = CARD.format(
        front=provenance.written(entries),
        picture=shown,
        read=provenance.READ if "real against real" in table else "",
        training=training,
        pipeline=student.script.pipeline,
        few=few,
        s="" if few == "1" else "s",
        intro=intro,
        tags="lora, " if trial.base else "",
        snippet=first_snippet(trial, choice, output, BASE if Path(source).is_dir() else source),
        notes=notes(trial, choice) + _terms(taught),
        table=table,
        without="" if ours else ", without flowmatch,",
        rounding=ROUNDING if trial.base else "",
        differences=describe(choice),
        digest=student.digest,
    )
    return card.replace("FOLDER", "path/to/this/folder")


def _terms(entries: dict[str, str]) -> str:
    if "license" not in entries:
        return "\n- The teacher's licence holds for this student, too; its card names none."
    told = " ".join(entries[k] for k in ("license_name", "license_link") if k in entries)
    return (
        f"\n- The teacher's licence holds for this student, too: {entries['license']} {told}".rstrip()
        + "."
    )


def _listed(numbers: list[int]) -> str:
    return " and ".join([", ".join(map(str, numbers[:-1])), str(numbers[-1])][len(numbers) < 2 :])
