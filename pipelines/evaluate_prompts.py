"""Evaluation on prompts, without a reference set: how near a student is to its teacher's own run.

Held-out prompts, the same noise for all rows, from a stream that no pair uses. The teacher's own run,
with its scheduler and its guidance, is the target; the teacher with fewer steps stands beside the
student. Pictures are decoded by the pipeline itself. Nothing is trained here.
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowmatch.config import UserError, content, dump, require, together
from flowmatch.evaluation.config import EvaluatePromptsConfig
from flowmatch.runs import command, folder, manifest, process

if TYPE_CHECKING:
    from torch import Tensor

    from flowmatch.data.dataset import Data
    from flowmatch.evaluation.comparisons import Comparison
    from flowmatch.evaluation.feature_choice import FeatureChoice
    from flowmatch.evaluation.judges import Judge
    from flowmatch.evaluation.picture_files import PictureFiles
    from flowmatch.evaluation.prompt_rows import Draw, Row
    from flowmatch.evaluation.prompt_scoring import Scores
    from flowmatch.models.decoding import Decoder
    from flowmatch.models.text import TextTeacher


@dataclass
class Plan(folder.Plan):
    """The models, what decodes and judges their samples, and the draw of noise and prompts.

    decode: None where the pipeline returns no pictures. compared: by key.
    """

    teacher: "TextTeacher"
    student: "TextTeacher | None"
    decode: "Decoder | None"
    draw: "Draw"
    real: "Data | None"
    choice: "FeatureChoice"
    judge: "Judge | None"
    compared: "dict[str, Comparison]"

    def reopen(self) -> bool | None:
        """Run again for pictures that a finished evaluation has not written."""
        from flowmatch.evaluation import picture_files

        place = self.config.samples_to
        if place is None or picture_files.written(place, self.fingerprint):
            return None
        return True

    @property
    def fingerprint(self) -> str:
        """Hash of the config's content and the inputs."""
        return manifest.fingerprint({"config": content(self.config), "inputs": self.inputs})


def plan(config: EvaluatePromptsConfig) -> Plan:
    """Check the config, and load models, data and judges."""
    from flowmatch.data import dataset
    from flowmatch.evaluation import comparisons, feature_choice, judges
    from flowmatch.evaluation.prompt_rows import Draw
    from flowmatch.models import decoding, students

    def check_config() -> str:
        require("matplotlib", "eval", "evaluate_prompts")
        require("torchmetrics", "eval", "evaluate_prompts")
        faults = []
        if not config.steps or min(config.steps) < 1:
            faults.append(f"steps={config.steps}: expected one or more numbers, from 1")
        for name in ("samples", "compute_batch"):
            if (given := getattr(config, name)) % config.per_prompt:
                faults.append(
                    f"{name}={given}: expected a multiple of per_prompt={config.per_prompt}"
                )
        if config.classes and config.judge:
            faults.append("classes and judge both judge the pictures; leave one out")
        if config.classes and config.classifier is None:
            faults.append("classes are those of a classifier; set classifier=")
        if config.classifier and not (config.classes or config.judge or config.reference):
            faults.append("classifier has no effect; set classes= or reference=, or leave it out")
        for name in ("features", "inception_weights"):
            default = EvaluatePromptsConfig.model_fields[name].default
            if config.reference is None and getattr(config, name) != default:
                faults.append(f"{name} has no effect without reference; leave it out")
        if faults:
            raise UserError(faults)
        return process.worker_device(process.device_of(config))

    def load_models() -> "tuple[TextTeacher, TextTeacher | None]":
        teacher = load_teacher(config)
        if config.student is None:
            return teacher, None
        return teacher, students.load(teacher, config.student, "student")

    def load_reference() -> "Data | None":
        if config.reference is None:
            return None
        return dataset.load(config.reference, "reference")

    device, (teacher, student), real = together(check_config, load_models, load_reference)
    draw = Draw(
        config.seed, config.samples, config.per_prompt, teacher.prompts.texts, teacher.shape
    )
    decode, shape, reason = decoding.find(teacher)
    choice, judge, compared = together(
        partial(feature_choice.choose_for_pictures, config, real, shape, reason),
        partial(judges.find, config, shape, reason, device),
        partial(comparisons.find, config, shape, reason, device),
    )
    if reason and config.samples_to is not None:
        raise UserError(f"samples_to={config.samples_to}: there are no pictures: {reason}")
    inputs = {"teacher": teacher.digest, "prompts": teacher.facts["prompts"]["digest"]}
    if student is not None:
        inputs["student"] = student.digest
    if real is not None:
        inputs["reference"] = real.digest
    models: Any = {"teacher": teacher} | ({} if student is None else {"student": student})
    if choice.module is not None:
        feature_choice.check_independent(choice.module, models)
    if config.classifier is not None:
        inputs["classifier"] = manifest.digest(config.classifier)
    inputs |= choice.inputs | {name: found.digest for name, found in compared.items()}
    groups = config.samples // config.per_prompt
    shown = f"{reason}; compared as latents alone" if decode is None else f"{list(shape)}"
    lines = [
        f"{config.samples:,} samples a row: {groups:,} prompts, {config.per_prompt} of each, of "
        f"{len(teacher.prompts):,} held out; pictures: {shown}",
        f"{evaluations(config, teacher, student):,} network evaluations a sample in all rows, on "
        f"{device}",
        *teacher.lines[:1],
    ]
    if student is not None:
        lines += remarks(config, teacher, student)
    opened = (teacher, student, decode, draw, real, choice, judge, compared)
    made = Plan(config, inputs, lines, *opened)
    made.reopen()  # refuses a folder of other pictures
    return made


def load_teacher(config: EvaluatePromptsConfig) -> "TextTeacher":
    """Load the teacher, with the held-out prompts in the place of those of training."""
    import torch

    from flowmatch.data.prompts import PromptList
    from flowmatch.models import conditions, text

    teacher = text.load(
        config.teacher,
        "teacher",
        config.prompts,
        config.call,
        pipeline=config.pipeline,
        dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
        device=process.worker_device(process.device_of(config)),
    )
    texts = teacher.prompts.held_out
    if not texts:
        raise UserError(
            "prompts has no held-out ones, and a student looks better on prompts of its training; set "
            "prompts.held_out to a share such as 0.1, or to the path of another list"
        )
    listed = PromptList(texts, [], negative=teacher.prompts.negative)
    if not config.prompts.truncate:
        conditions.check_lengths(teacher.pipe, listed, teacher.call, "prompts.held_out")
    return replace(teacher, prompts=listed)


def evaluations(
    config: EvaluatePromptsConfig, teacher: "TextTeacher", student: "TextTeacher | None"
) -> int:
    """Count the network's evaluations of a sample in all rows, by the numbers of steps."""
    each = teacher.script.evaluations // teacher.script.steps
    few = sum(config.steps)
    return teacher.script.evaluations + few * each + (0 if student is None else few)


def remarks(
    config: EvaluatePromptsConfig, teacher: "TextTeacher", student: "TextTeacher"
) -> list[str]:
    """Say what makes a comparison with this student unusual: some steps only, another call."""
    from flowmatch.config import differences
    from flowmatch.evaluation import tables
    from flowmatch.models import teachers

    known = list(student.for_steps)
    others = known and not set(config.steps) <= set(known)
    lines = [tables.meant({"for_steps": known})] if others else []
    facts = teachers.read_made(str(config.student), "student")["facts"]
    changed = differences(facts["call"], teacher.call)
    if changed:
        lines.append(f"the student's pairs were made with another call: {'; '.join(changed)}")
    return lines


def run(plan: Plan) -> None:
    """Run all rows batch by batch, measure them, and seal the folder; or make again what is lost."""
    if not process.leads():
        return
    from flowmatch.evaluation import picture_files, prompt_results, prompt_rows, report, tables

    config: EvaluatePromptsConfig = plan.config
    with folder.RunFolder("evaluate_prompts", config, plan.inputs) as opened:
        rows, refused = prompt_rows.all_rows(plan.teacher, plan.student, config.steps)
        for steps, reason in refused.items():
            told = tables.steps_name(steps)
            process.say(f"evaluate_prompts: the teacher has no row of {told}: {reason}")
        to, texts = config.samples_to, plan.draw.texts
        files = None
        if to is not None and not picture_files.written(to, plan.fingerprint):
            files = picture_files.PictureFiles(to, texts)
        scores, pictures, prompts = sampled(plan, rows, files)
        place = Path(opened.folder)
        sealed = manifest.sealed(place)
        written = place / "metrics.json"
        result = (
            json.loads(written.read_bytes()) if sealed else summary(plan, rows, refused, scores)
        )
        device = plan.teacher.pipe._execution_device
        facts = report.machine(device, 1)
        prompt_results.write(place, result, pictures, prompts, dump(config), facts)
        if files is not None:
            files.close(plan.fingerprint, [row.entries() for row in rows])
        if not sealed:
            opened.seal(["metrics.json"])
        process.say(f"\n{prompt_results.markdown(result)}\nreport: {place / 'report.html'}")


def sampled(
    plan: Plan, rows: "list[Row]", files: "PictureFiles | None"
) -> "tuple[Scores, dict[str, Tensor], list[str]]":
    """Run all rows batch by batch; return their scores, and pictures of the first prompts."""
    import torch
    from tqdm import tqdm

    from flowmatch.evaluation.prompt_results import COLUMNS
    from flowmatch.evaluation.prompt_scoring import Scores, still
    from flowmatch.models.precision import arithmetic, deterministic

    config, texts = plan.config, plan.draw.texts
    device = plan.teacher.pipe._execution_device
    module = plan.choice.module
    scores = Scores(
        config.per_prompt,
        plan.judge,
        [*plan.compared.values()],
        embedded=plan.real is not None,
        module=None if module is None else module.to(device),
        device=device,
    )
    kept: dict[str, list[Tensor]] = {row.name: [] for row in rows}
    prompts: list[str] = []
    total = config.samples * sum(row.evaluations for row in rows)
    with (
        torch.inference_mode(),
        arithmetic(config.precision, device),
        deterministic(),
        tqdm(total=total, unit="evaluation", unit_scale=True, **process.bar_options()) as bar,
    ):
        for ids, x0, numbers in plan.draw.batches(config.compute_batch):
            words = [texts[i] for i in numbers.tolist()]
            shown = ids % config.per_prompt == 0
            for row in rows:
                bar.set_description(row.name)
                x = row.carry(x0.to(device), numbers).float()
                if not x.isfinite().all():
                    raise UserError(f"{row.name}: samples contain NaN or inf; check the model")
                seen = None if plan.decode is None else plan.decode(x, words)
                if row.own:
                    scores.begin(numbers, x, seen, words)
                scores.add(row.name, x, seen, words)
                if seen is not None and len(prompts) < COLUMNS:
                    kept[row.name] += still(seen)[torch.from_numpy(shown)]
                if seen is not None and files is not None:
                    files.add(row.name, ids, numbers, seen)
                bar.update(row.evaluations * len(ids))
            if len(prompts) < COLUMNS:
                prompts += [word for word, first in zip(words, shown, strict=True) if first]
            told = [f"{r.name} {scores.rms(r.name):.3g}" for r in rows if not r.own]
            bar.set_postfix_str(", ".join(told), refresh=False)
    first = {name: torch.stack(found[:COLUMNS]) for name, found in kept.items() if found}
    return scores, first, prompts[:COLUMNS]


def summary(
    plan: Plan, rows: "list[Row]", refused: dict[int, str], scores: "Scores"
) -> dict[str, Any]:
    """Gather the content of metrics.json."""
    from flowmatch.data import dataset
    from flowmatch.evaluation import features, metrics
    from flowmatch.flow import noise

    config, teacher, student = plan.config, plan.teacher, plan.student
    protocol: dict[str, Any] = {
        "samples": config.samples,
        "prompts": len(set(plan.draw.numbers().tolist())),
        "per_prompt": config.per_prompt,
        "noise": f"Philox, seed {config.seed}, stream {noise.EVALUATION}",
        "pipeline": teacher.script.pipeline,
        "call": teacher.whole_call,
        "arithmetic": config.precision,
        "state": list(teacher.shape),
        "deviation": scores.deviation,
    }
    if refused:
        protocol["not_run"] = {str(steps): reason for steps, reason in refused.items()}
    result: dict[str, Any] = {"protocol": protocol}
    if student is not None:
        result["student"] = {"round": student.round, "form": student.student_facts["form"]}
        if student.for_steps:
            result["student"]["for_steps"] = list(student.for_steps)
    result["rows"] = []
    real: Tensor | None = None
    if plan.real is not None:
        n = min(plan.real.count, max(config.samples, 2))
        device = teacher.pipe._execution_device
        pictures = dataset.reference(replace(plan.real, flip=False), n, config.seed)["x1"]
        real = features.embed(pictures.to(device), plan.choice.module)
        half = len(real) // 2
        result["floor"] = {"distance": metrics.frechet(real[:half], real[half:])}
        protocol |= {"reference": plan.real.digest, "real_samples": n}
        protocol["features"] = {"name": config.features, **plan.choice.facts}
    for row in rows:
        found = row.entries()
        found |= scores.measures(row.name, rows[0].name, config.seed)
        if real is not None:
            found["distance"] = {"value": scores.distance(row.name, real)}
        result["rows"].append(found)
    return result


STAGE = command.Stage("evaluate_prompts", EvaluatePromptsConfig, plan, run, __doc__, alone=True)

if __name__ == "__main__":
    command.main(STAGE)
