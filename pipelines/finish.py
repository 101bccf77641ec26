"""A short last stage: train a student on samples that it makes itself, with its pairs as an anchor.

Each update makes samples in one of `for_steps` numbers of Euler steps, and moves their distribution
towards that of the stored x1, or of real images with `data`. The loss of reflow on the pairs, at the
same times and weighed by `anchor`, keeps each noise where the teacher carried it. The result is a
student like that of reflow.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import pydantic

from flowmatch.config import LocalPath, UserError, counted, option, required, together
from flowmatch.data.config import DataConfig, PromptsConfig
from flowmatch.flow.config import LossConfig, TimesConfig
from flowmatch.models.config import CallConfig, LoraConfig
from flowmatch.pairs.config import PairsEntry
from flowmatch.runs import command, folder, manifest, process
from flowmatch.runs.config import StageConfig
from flowmatch.training.config import FitConfig, MethodConfig, keep_guidance

if TYPE_CHECKING:
    from flowmatch.data.dataset import Data
    from flowmatch.evaluation.matched_features import Matched
    from flowmatch.models.adapters import Writer
    from flowmatch.models.teachers import Teacher
    from flowmatch.pairs.mixture import Mixture
    from flowmatch.training.finishing import Critic
    from flowmatch.training.loop import OnLog
    from flowmatch.training.preview import Preview

MOST = 16  # Euler steps that an update may make


class FinishConfig(StageConfig):
    """Config of the finish."""

    stage: ClassVar[str] = "finish"
    DERIVED: ClassVar[dict[str, str]] = {"fit.steps": "fit.epochs"}

    pairs: list[PairsEntry] = required("sets of pairs, mixed in each batch by weight")
    start: LocalPath = required(
        "the student: a finished training stage (its EMA), or a diffusers model or pipeline",
        run=True,
    )
    fit: FitConfig = required("the training loop")
    lora: LoraConfig | None = option(
        None,
        "train a new adapter of the start, as reflow.lora does; a start that is an adapter is trained "
        "on; default: train all weights",
        shared=False,
    )
    for_steps: list[int] = option(
        [1], "numbers of Euler steps that the student is for, each as often as the others"
    )
    method: MethodConfig = option(MethodConfig(), "how samples are compared with the data")
    features: list[LocalPath] = option(
        ["random"],
        "what is compared: sealed folders of train_classifier, not the one that scores the student; "
        "files NAME.pt2 from torch.export.save (torch reads them with pickle: use only files that you "
        "trust); values, the values themselves (of large images averages over squares); random, a "
        "convolutional network with random weights",
        run=True,
    )
    decode: bool = option(
        False,
        "features see the pictures that the VAE decodes from latents, and data are pictures",
    )
    teacher: LocalPath | None = option(
        None,
        "method.name=dmd: the flow whose pairs these are: a finished train_flow, or a flow model of "
        "diffusers, of independent noise; with prompts a pipeline, or a finished train_flow of one",
        run=True,
    )
    data: DataConfig | None = option(
        None, "real images to compare with; default: the x1 of the pairs", shared=False
    )
    anchor: float = option(
        0.1, "weight of the loss on the pairs, at the times of for_steps; 0: none", ge=0
    )
    loss: LossConfig = option(LossConfig(name="pseudo_huber"), "loss on the pairs")
    pipeline: LocalPath | None = option(
        None, "with prompts: the pipeline of the network of a run folder", run=True
    )
    prompts: PromptsConfig | None = option(
        None, "the prompts of the pairs, for a pipeline that reads text"
    )
    call: CallConfig = option(CallConfig(), "with prompts: arguments of the pipeline's call")
    conditions: LocalPath | None = option(
        None,
        "with prompts: a finished encode_prompts of them, so that no text encoder is loaded; default: "
        "encode the prompts of each batch",
        run=True,
    )

    @pydantic.field_validator("for_steps")
    @classmethod
    def _rising(cls, value: list[int]) -> list[int]:
        if not value or sorted(set(value)) != value or not 1 <= value[0] <= value[-1] <= MOST:
            raise ValueError(f"expected rising numbers from 1 to {MOST}")
        return value

    @pydantic.field_validator("features")
    @classmethod
    def _some(cls, value: list[str]) -> list[str]:
        if not value or len(set(value)) != len(value):
            raise ValueError("expected one or more different features")
        return value

    @pydantic.model_validator(mode="before")
    @classmethod
    def _keep_guidance(cls, values: Any) -> Any:
        return keep_guidance(values)


@dataclass
class Plan(folder.Plan):
    """The student, its pairs, and what its samples are compared by.

    seen_features: digests of all features that a loss of the student or its teachers used.
    """

    stream: "Mixture"
    start: "Teacher"
    module: Any  # of the loss on the pairs
    matched: "Matched"
    data: "Data | None"
    round: int
    seen_features: set[str]
    teacher: "Teacher | None"  # of dmd
    guidance: float | None  # of its velocity
    writer: "Writer | None"  # of an adapter
    preview: "Preview | None"

    def measure(self) -> list[str]:
        """Time three updates, where nothing is sealed yet."""
        from flowmatch.training import critics, rehearsal

        config: FinishConfig = self.config
        if manifest.sealed(config.run_dir):
            return []
        device = process.worker_device(process.device_of(config))
        net, beside = self.start.net, critics.size(self.teacher, self.start.net)
        return rehearsal.lines(partial(train, self), config.fit, net, device, None, beside)


def plan(config: FinishConfig) -> Plan:
    """Check the config, open the pairs, and load the student."""
    from flowmatch.data import dataset
    from flowmatch.evaluation import decoded, matched_features
    from flowmatch.pairs import matching, mixture
    from flowmatch.pairs.mixture import Mixture
    from flowmatch.training import adapted, critics, loop, preview

    def check_loop() -> str:
        device = process.device_of(config)
        loop.check(config.fit, device, process.world_size())
        return device

    def check_features() -> None:
        if config.method.features:
            matched_features.check(config.features)
        decoded.check(config.loss)

    def load() -> "tuple[Teacher, Teacher | None, Writer | None]":
        start, teacher, writer = adapted.load_pair(
            config.start,
            config.teacher if config.method.name == "dmd" else None,
            config.prompts,
            config.call,
            config.lora,
            config.fit,
            config.seed,
            pipeline=config.pipeline,
            rows=config.conditions,
            device=process.worker_device(process.device_of(config)),
        )
        matching.check_finish(start, config.start, config.for_steps)
        loop.check_net(config.fit, start.net, start.classes)
        return start, teacher, writer

    device, _, _, _, (start, teacher, writer), data, *sets = together(
        check_loop,
        lambda: critics.check(config.method, config.fit),
        lambda: check_use(config),
        check_features,
        load,
        lambda: None if config.data is None else dataset.load(config.data),
        *(partial(mixture.open_set, n, entry, False) for n, entry in enumerate(config.pairs)),
    )
    micro, _ = loop.split_batch(config.fit, process.world_size())
    weights = [entry.weight for entry in config.pairs]
    place = process.worker_device(device)
    names = config.features if config.method.features else []
    known = {"precision": config.fit.precision, "device": place}
    whole = (start, config.start, sets)
    pictures = decoded.pictures(*whole, **known, key="decode=true") if config.decode else None
    shape = start.shape if pictures is None else pictures.shape
    _, guidance, _, stream, matched = together(
        lambda: matching.check_match(start, sets),
        lambda: teacher and matching.guidance_of(sets, teacher, config.method.guidance),
        lambda: matching.check_target(start, data, teacher, str(config.teacher), shape),
        lambda: Mixture(list(zip(sets, weights, strict=True)), config.fit.batch_size, config.seed),
        lambda: matched_features.load(names, micro, start.shape, place, config.seed, pictures),
    )
    inputs = {"start": start.digest} | matched.inputs
    inputs |= {f"pairs.{number}": found.digest for number, found in enumerate(sets)}
    see = decoded.of_loss(config.loss, *whole, micro, **known, seed=config.seed)
    inputs |= see.inputs
    others = {"data": data, "teacher": teacher}
    inputs |= {name: found.digest for name, found in others.items() if found is not None}
    if config.prompts is not None:
        inputs["prompts"] = start.facts["prompts"]["digest"]
    cuts, unseen = stream.leave_out(config.pairs)
    config = config.model_copy(update={"fit": config.fit.over(stream.count)})
    seen = config.fit.steps * config.fit.batch_size
    steps = ", ".join(map(str, config.for_steps))
    target = "stored x1" if data is None else f"{len(data):,} samples of data"
    how = f"beside {target}: {config.method.features} of {', '.join(names)}"
    if teacher is not None:
        besides = f"; {config.method.moments:g} times {how}" if names else ""
        guided = "" if guidance == 1 else f", guided by {guidance:g},"
        other = "a copy" if writer is None else "a second adapter of its network"
        how = f"by dmd, with the velocity of {config.teacher}{guided} and {other} that learns{besides}"
    lines = [
        f"{stream.count:,} pairs of {list(start.shape)} in {counted(len(sets), 'set')}, "
        f"{'with prompts' if config.prompts else 'with labels' if start.classes else 'no labels'}",
        *cuts,
        f"{type(start.net).__name__} of {start.net.num_parameters():,} parameters, on {device}",
        *(writer.lines(start.net) if writer else ()),
        f"{config.fit.steps} steps of {config.fit.batch_size}: {seen / stream.count:.1f} epochs",
        f"samples in {steps} step{'s' * (config.for_steps != [1])} {how}; weight of the pairs "
        f"{config.anchor:g}",
        *([pictures.line] if pictures else ()),
        *see.lines,
        *start.lines,
    ]
    last = max(found.sealed["facts"]["round"] for found in sets)
    every, laid = config.fit.sample_every, [start.student_grid(n) for n in config.for_steps]
    shown, told = preview.planned(every, start, config.start, sets[0], unseen, laid)
    round, used = max(start.round, last + 1), {*see.digests, *matched.digests}
    more = (stream, start, see.module, matched, data, round, used, teacher, guidance, writer, shown)
    return Plan(config, inputs, lines + told, *more)


def check_use(config: FinishConfig) -> None:
    """Raise UserError for keys that have no effect, or are missing."""
    faults, usual = [], FinishConfig.model_fields
    if config.method.name == "dmd" and config.teacher is None:
        faults.append(
            "method.name=dmd needs teacher=, the flow that made the pairs; method.name=moments does not"
        )
    if not config.method.features:
        given = {
            "features": config.features != usual["features"].get_default(),
            "data": config.data is not None,
            "decode": config.decode,
        }
        faults += [
            f"{key} has no effect with method.name=dmd, which compares velocities; leave it "
            "out, or set method.moments"
            for key, used in given.items()
            if used
        ]
    if not config.anchor and config.loss != usual["loss"].get_default():
        faults.append("loss has no effect with anchor=0; leave one of them out")
    if faults:
        raise UserError(faults)


def run(plan: Plan) -> None:
    """Train, and seal the folder."""
    from flowmatch.models import networks
    from flowmatch.models.digest import network_digest

    config: FinishConfig = plan.config
    facts = {"round": plan.round} | plan.stream.facts | plan.start.student_facts
    facts |= {"features": sorted(plan.seen_features)} if plan.seen_features else {}
    facts["for_steps"] = config.for_steps
    with folder.RunFolder("finish", config, plan.inputs, facts) as opened:
        files = train(plan, opened, config.fit)
        if process.leads():
            made = opened.folder / "net"
            if plan.writer is None:
                opened.seal(files, net=network_digest(networks.load(made, "net")))
            else:
                opened.seal(files, **plan.writer.facts(made))


def train(
    plan: Plan, opened: folder.RunFolder, how: FitConfig, on_log: "OnLog | None" = None
) -> list[str]:
    """Train the student of a plan; return its files."""
    from flowmatch.flow import coupling, losses
    from flowmatch.training.finishing import Finish
    from flowmatch.training.loop import fit

    config: FinishConfig = plan.config
    loss = losses.build(config.loss, plan.module)
    grids = [plan.start.student_grid(n).tolist() for n in config.for_steps]
    field = plan.start.field(plan.start.net)
    if config.prompts is not None and process.world_size() > 1:
        from flowmatch.models import text

        there = process.worker_device(process.device_of(config))
        text.freeze_unused(plan.start.net.to(there), field, plan.start.shape)
    return fit(
        plan.start.net,
        plan.stream,
        coupling.stored,
        opened,
        how,
        TimesConfig(zero=1.0),
        Finish(grids, critic(plan, how), config.anchor, loss, config.seed),
        seed=config.seed,
        device=config.device,
        field=field,
        writer=plan.writer,
        preview=plan.preview,
        on_log=on_log,
    )


def critic(plan: Plan, how: FitConfig) -> "Critic":
    """Build what compares samples with the data."""
    from flowmatch.training import critics, loop

    config: FinishConfig = plan.config
    micro, _ = loop.split_batch(how, process.world_size())
    method = config.method.model_copy(update={"guidance": plan.guidance})
    pictures = plan.matched.pictures
    seen = (plan.matched.modules, pictures.module if pictures else None)
    networks, samples = (plan.teacher, plan.start.net), (plan.stream, plan.data)
    return critics.build(method, how, *networks, *seen, *samples, micro, config.seed)


STAGE = command.Stage("finish", FinishConfig, plan, run, __doc__, grouped=True)

if __name__ == "__main__":
    command.main(STAGE)
