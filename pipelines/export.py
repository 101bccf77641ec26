"""Export: the student as a folder that stock diffusers loads, checked before it is sealed.

A fresh process without flowmatch loads the folder and samples; its pictures must equal those of our
own solver. model_index.json names stock classes wherever diffusers has a pipeline for the network.
"""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from flowmatch.config import LocalPath, UserError, option, required, together
from flowmatch.data.config import PromptsConfig
from flowmatch.export.fresh import Fresh
from flowmatch.models.config import CallConfig
from flowmatch.runs import command, folder, manifest, process
from flowmatch.runs.config import StageConfig
from flowmatch.runs.files import write_atomic
from flowmatch.runs.values import read_yaml

if TYPE_CHECKING:
    from flowmatch.export.model_card import Kind
    from flowmatch.models.autoencoder import Autoencoder
    from flowmatch.models.teachers import Teacher

WARNING = 0.01  # the same with the folder's own scheduler, above which the stage warns
CARD, PICTURE = "README.md", "samples.png"
SHOWN = 8  # samples of a row of the picture
MOST = 1000  # steps: the times of a stock scheduler


class ExportConfig(StageConfig):
    """Config of the export."""

    stage: ClassVar[str] = "export"

    student: LocalPath = required("a finished training stage (its EMA weights)", run=True)
    evaluation: LocalPath | None = option(
        None, "the student's finished evaluation, whose table goes into the card", run=True
    )
    steps: list[int] = option(
        [1, 2, 4],
        "numbers of steps that get an exact stock scheduler; left out, those that the student is for, "
        "if it is for some only",
    )
    vae: LocalPath | None = option(
        None,
        "for a student of latents: the VAE that decodes them (default: that of the run of encode whose "
        "latents it was trained on)",
        run=True,
    )
    pipeline: LocalPath | None = option(
        None, "with prompts: the teacher's pipeline, of which all but the network is kept", run=True
    )
    prompts: PromptsConfig | None = option(
        None, "the prompts of the student, for a pipeline that reads text"
    )
    call: CallConfig = option(
        CallConfig(), "with prompts: arguments of the pipeline's call (default: the student's)"
    )
    dtype: Literal["float32", "float16"] = option(
        "float32",
        "how the weights of a student without prompts are stored; float16 rounds them, and checks the "
        "rounded student. diffusers loads either as float32",
    )
    adapter: bool = option(
        False,
        "with prompts, for a student trained with lora: write its adapter alone, for load_lora_weights "
        "of the teacher's pipeline; default: the whole pipeline with the adapter in its weights",
    )
    license: str | None = option(
        None,
        "licence of the weights as the hub writes it, such as apache-2.0, for the card (default: with "
        "prompts the teacher's, else a line that asks for one)",
        run=True,
        pattern=r"^[a-z0-9][a-z0-9.-]*$",
    )
    push_to_hub: str | None = option(
        None,
        "name on the Hugging Face Hub, ORG/NAME, to which the sealed folder is uploaded",
        run=True,
    )

    def lost(self) -> list[str]:
        """List the card if it is missing or names another licence, and its picture."""
        try:
            card = (Path(self.run_dir) / CARD).read_text()
        except OSError:
            return [CARD]
        other = self.license is not None and f"\nlicense: {self.license}\n" not in card
        picture = f"({PICTURE})" in card and not (Path(self.run_dir) / PICTURE).is_file()
        return [CARD] * other + [PICTURE] * picture


@dataclass
class Plan(folder.Plan):
    """The student, the kind of its pipeline, and the table of its evaluation."""

    student: "Teacher"
    kind: "Kind | None"  # None for a student that reads prompts
    table: str
    vae: "Autoencoder | None" = None  # of a student of latents

    def reopen(self) -> bool | None:
        """Make a sealed folder again where it is to be uploaded and has not been."""
        name, written = self.config.push_to_hub, Path(self.config.run_dir) / "config.yaml"
        if name is None or not written.is_file():
            return None
        return read_yaml(str(written)).get("push_to_hub") != name or None


def plan(config: ExportConfig) -> Plan:
    """Check the config, and load the student and its evaluation."""
    from flowmatch.evaluation import prompt_results, tables
    from flowmatch.export import model_card, network_folder, push
    from flowmatch.models import teachers, two_time

    def check_config() -> None:
        faults = []
        if not config.steps or min(config.steps) < 1 or max(config.steps) > MOST:
            faults.append(f"steps={config.steps}: expected one or more numbers, from 1 to {MOST:,}")
        if config.device not in ("auto", "cpu") and config.prompts is None:
            faults.append(
                f"device={config.device}: an export is checked on the CPU; leave device out"
            )
        given = {"pipeline": config.pipeline, "call": config.call.model_dump()}
        for key, value in (given | {"adapter": config.adapter}).items():
            if value and config.prompts is None:
                faults.append(f"{key}: for a student that reads prompts; set prompts, too")
        if config.dtype != "float32" and config.prompts is not None:
            faults.append(
                f"dtype={config.dtype}: a student that reads prompts keeps its teacher's; leave it out"
            )
        if faults:
            raise UserError(faults)

    def load_student() -> "tuple[Teacher, str]":
        if config.prompts is not None:
            from flowmatch.export import text_folder

            device = process.worker_device(process.device_of(config))
            words = (config.student, config.prompts, config.call, config.pipeline, device)
            read = text_folder.open_student(*words, config.adapter)
            return read, read.digest
        try:
            found = teachers.read_made(config.student, "student")["facts"]
        except UserError:  # told below, or no training stage
            found = {}
        if "script" in found:
            raise UserError(
                f"student={config.student} reads prompts: set prompts= to their list, and pipeline= to "
                f"the teacher's {found['script']['pipeline']}"
            )
        student = teachers.load(config.student, "student")
        digest = student.digest
        if student.diffusion is not None:
            raise UserError(
                f"student={config.student} is a diffusion model, which predicts "
                f"{student.diffusion.prediction}; an export is of a velocity: name a reflow of it"
            )
        if student.two_times:  # stock networks take one time: r = 1 goes into a bias
            folded = two_time.fold(student.net)
            student = dataclasses.replace(student, net=folded, for_steps=(1,))
        if config.dtype == "float16":
            student.net.half().float()  # in place: rounded
        return student, digest

    def check_upload() -> None:
        if config.push_to_hub is not None:
            push.check_push(config.push_to_hub)

    def read_evaluation() -> dict[str, Any] | None:
        if config.evaluation is None:
            return None
        sealed = manifest.read(config.evaluation, "evaluation", ["evaluate", "evaluate_prompts"])
        manifest.verify(config.evaluation, "evaluation", sealed)
        return sealed

    _, _, (student, digest), evaluation = together(
        check_config, check_upload, load_student, read_evaluation
    )
    steps = student.export_steps(config.steps, "steps" in config.model_fields_set)
    config = config.model_copy(update={"steps": steps})
    inputs, table = {"student": digest}, "Not evaluated.\n"
    if config.evaluation is not None:
        if evaluation["inputs"].get("student") != digest:
            raise UserError(
                f"evaluation={config.evaluation} scored another student than {config.student}: delete "
                f"{config.evaluation} and {config.run_dir} to make both again"
            )
        inputs["evaluation"] = manifest.digest(config.evaluation)
        prompts = evaluation["stage"] == "evaluate_prompts"
        write = prompt_results.markdown if prompts else tables.markdown
        table = tables.read(Path(config.evaluation), "evaluation", write)[1]
    vae = None
    if config.prompts is None:
        vae = network_folder.load_vae(student, config.student, config.vae)
    if vae is not None:
        inputs["vae"] = vae.digest
    kind = None if config.prompts else model_card.kind_of(student, vae)
    name = student.facts["script"]["pipeline"] if kind is None else kind.name
    lines = [
        f"{type(student.net).__name__} of {student.net.num_parameters():,} parameters, as {name}"
        + ", the adapter alone" * config.adapter,
        f"checked in a fresh process without flowmatch at {config.steps} steps",
    ]
    return Plan(config, inputs, lines, student, kind, table, vae)


def run(plan: Plan) -> None:
    """Write the folder, check it, and seal it; rank 0 alone."""
    if not process.leads():
        return
    config: ExportConfig = plan.config
    with folder.RunFolder("export", config, plan.inputs) as opened:
        built = opened.scratch.build("export")
        shown, written, facts = (write_pipeline if plan.kind is None else write_network)(
            plan, built
        )
        if manifest.sealed(opened.folder):  # its card or picture was lost
            for name in config.lost():
                if (built / name).is_file():
                    opened.scratch.place(built / name, opened.folder / name)
        else:
            for path in sorted(built.iterdir()):
                opened.scratch.place(path, opened.folder / path.name)
            opened.seal(written, round=plan.student.round, **kept(plan.student), **facts)
        if config.push_to_hub is not None:
            upload(opened.folder, config.push_to_hub)
    process.say(f"\n{shown.replace('FOLDER', config.run_dir)}")


def upload(folder: Path, name: str) -> None:
    """Upload a sealed folder; where that fails, break the seal, so that the command can be repeated."""
    from flowmatch.export import push

    try:
        process.say(f"export: uploaded to {push.push(folder, name)}")
    except UserError:
        (folder / manifest.NAME).unlink()
        raise


def write_pipeline(plan: Plan, built: Path) -> tuple[str, list[str], dict[str, Any]]:
    """Write and check the pipeline of a student that reads prompts.

    Returns code to sample it, its files, and facts for the manifest.
    """
    from flowmatch.export import provenance, text_card, text_export, text_folder

    config: ExportConfig = plan.config
    student: Any = plan.student
    trial = text_export.Trial(student, config.seed, str(config.pipeline) if config.adapter else "")
    with Fresh(cpu=trial.noise.device.type == "cpu") as fresh:
        choice = text_export.choose(trial, config.steps)
        adapter = text_folder.save_adapter(config.student, choice, built) if config.adapter else []
        written = adapter or text_folder.save(student, choice, built)
        ways = text_folder.expected(trial, choice)
        task = text_folder.task(trial, ways, built, Path(fresh.scratch.name))
        student.pipe.to("cpu")  # the fresh process needs the room
        most = text_folder.UNMERGED if config.adapter else text_folder.EXACT
        output = text_folder.check(built, ways, fresh.sample(task), most)
    source = str(config.pipeline)
    grid = Path(config.evaluation or "") / "grid.png"
    picture = PICTURE if config.evaluation is not None and grid.is_file() else ""
    if picture:
        shutil.copyfile(grid, built / PICTURE)
    more = (provenance.trace(config.student), config.license, picture)
    text = text_card.text(trial, choice, plan.table, source, output, *more)
    write_atomic(built / CARD, text)
    for line in text_card.told(choice):
        process.say(f"export: {line}")
    shown = text_card.first_snippet(trial, choice, output)
    return shown, written, text_folder.facts(trial, choice)


def write_network(plan: Plan, built: Path) -> tuple[str, list[str], dict[str, Any]]:
    """Write and check the pipeline of one network; return as `write_pipeline` does."""
    import torch

    from flowmatch.evaluation import tables
    from flowmatch.export import model_card, network_folder, provenance

    config: ExportConfig = plan.config
    student, kind = plan.student, plan.kind
    assert kind is not None
    with Fresh() as fresh:
        if config.dtype != "float32":
            student.net.to(getattr(torch, config.dtype))
        written = network_folder.write(built, student, kind, config.steps, plan.vae)
        student.net.float()
        how = (config.steps, config.seed, fresh, plan.vae)
        differences = network_folder.compare(built, student, kind, *how)
        picture = PICTURE if draw(plan, built / PICTURE) else ""
        more = (provenance.trace(config.student), config.license, picture)
        card = model_card.text(student, kind, plan.table, differences, *more)
        write_atomic(built / CARD, card)
        for steps, found in differences.items():
            where = {"exact": f"scheduler_{steps}/", "folder": "scheduler/"}
            told = ", ".join(
                f"{value:.2g} with {where.get(name, name)}" for name, value in found.items()
            )
            count = tables.steps_name(steps)
            process.say(f"export: {count}: difference to flowmatch's own samples {told}")
        if max(found.get("folder", 0) for found in differences.values()) > WARNING:
            process.say(
                f"export: warning: with the folder's own scheduler pixels differ by more than "
                f"{WARNING:.0%}; use scheduler_N/ where N is one of {config.steps}"
            )
    return kind.snippet, written, {}


def draw(plan: Plan, file: Path) -> bool:
    """Draw samples of a network for its card; return whether they can be drawn."""
    import torch

    from flowmatch.export import model_card, network_folder
    from flowmatch.training import pictures

    student, config = plan.student, plan.config
    if not pictures.drawable(student.shape) or (model_card.latent(student) and plan.vae is None):
        return False
    count = 500 if len(student.shape) == 1 else SHOWN
    rows = {}
    for n in sorted(config.steps)[:4]:
        x = network_folder.own_samples(student, n, config.seed, count)
        if plan.vae is not None:
            with torch.no_grad():
                x = plan.vae.decode(x) / 2 + 0.5
        rows[f"{n} step{'s' * (n > 1)}"] = x.clamp(0, 1).numpy() if x.ndim == 4 else x.numpy()
    drawn = pictures.draw(rows)
    if drawn is not None:
        pictures.on_white(drawn).save(file)
    return drawn is not None


def kept(student: "Teacher") -> dict[str, Any]:
    """Return what an export remembers of its student, for a stage that takes it as a teacher."""
    facts: dict[str, Any] = {"for_steps": list(student.for_steps)} if student.for_steps else {}
    facts |= {"features": sorted(student.features)} if student.features else {}
    facts |= {"windows": student.windows} if student.windows else {}
    return facts | ({} if "script" in student.facts else student.student_facts)


STAGE = command.Stage("export", ExportConfig, plan, run, __doc__, alone=True)

if __name__ == "__main__":
    command.main(STAGE)
