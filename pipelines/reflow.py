"""Stage three: reflow. Train again, from the teacher's weights, on the pairs of stage two.

Same loop, same path, same target x1 - x0; but x0 and x1 belong together, so the lines that the network
learns do not cross, and few Euler steps follow them. With `times.zero=1`, from a reflowed start:
distillation to one step, after which the student samples in one step only. With
`objective.name=meanflow`: the average velocity between any two times, by a second time in the network.
With `objective.name=segments` or `cmt`, from pairs with states: lines that begin along the path. With
`for_steps`: at the times of a few samplers alone.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import pydantic

from flowmatch.config import (
    LocalPath,
    UserError,
    counted,
    option,
    required,
    step_words,
    together,
)
from flowmatch.data.config import PromptsConfig
from flowmatch.flow.config import LossConfig, ObjectiveConfig, TimesConfig
from flowmatch.models.config import CallConfig, LoraConfig
from flowmatch.pairs.config import PairsEntry
from flowmatch.runs import command, folder, manifest, process
from flowmatch.runs.config import StageConfig
from flowmatch.training.config import FitConfig, keep_guidance

if TYPE_CHECKING:
    from torch import Tensor

    from flowmatch.flow.trajectories import Lines
    from flowmatch.models.adapters import Writer
    from flowmatch.models.teachers import Teacher
    from flowmatch.pairs.mixture import Mixture
    from flowmatch.training.loop import OnLog
    from flowmatch.training.preview import Preview

MOST = 1000  # steps: the times of a stock scheduler


class ReflowConfig(StageConfig):
    """Config of stage three."""

    stage: ClassVar[str] = "reflow"
    others: ClassVar[tuple[str, ...]] = process.OTHERS
    DERIVED: ClassVar[dict[str, str]] = {"fit.steps": "fit.epochs"}

    pairs: list[PairsEntry] = required("sets of pairs, mixed in each batch by weight")
    start: LocalPath = required(
        "start weights: a finished training stage (its EMA), or a diffusers model or pipeline; a "
        "network that predicts noise or data is trained to predict the velocity",
        run=True,
    )
    fit: FitConfig = required("the training loop")
    lora: LoraConfig | None = option(
        None,
        "train an adapter of the start, which stays as it is, in the half precision of fit.precision if "
        "that is bf16 or fp16; default: train all of its weights",
    )
    objective: ObjectiveConfig = option(ObjectiveConfig(), "what the network learns from the pairs")
    times: TimesConfig = option(
        TimesConfig(name="noise_heavy", zero=0.5),
        "density of the training times; default: half at exactly 0, where one-step sampling evaluates "
        "the network, the others near it",
    )
    for_steps: list[int] = option(
        [],
        "numbers of Euler steps that the student is for, such as [1, 2, 4]: it is trained at the times "
        "of these alone, each number as often; default: at all times",
    )
    loss: LossConfig = option(LossConfig(name="pseudo_huber"), "loss on the velocity")
    pipeline: LocalPath | None = option(
        None, "with prompts and a run folder as the start: the pipeline of its network", run=True
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
    def _rising(cls, value: list[int], info: pydantic.ValidationInfo) -> list[int]:
        if value and not (sorted(set(value)) == value and value[0] >= 1 and value[-1] <= MOST):
            raise ValueError(f"expected rising numbers from 1 to {MOST:,}")
        usual = cls.model_fields["times"].default
        if value and info.data.get("times", usual) != usual:
            told = f"{{name: {usual.name}, zero: {usual.zero}}}"
            raise ValueError(f"sets the times; leave times out, or at {told}")
        return value

    @property
    def at_steps(self) -> list[int]:
        """The numbers of steps at whose times alone the student is trained; none for all times."""
        return self.for_steps or [1] * (self.times.zero == 1)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _keep_guidance(cls, values: Any) -> Any:
        return keep_guidance(values)


@dataclass
class Plan(folder.Plan):
    """The network to train, its pairs, and the feature module of the loss.

    seen_features: digests of all classifiers that a loss of the student or its teachers used.
    """

    net: Any
    stream: "Mixture"
    module: Any
    round: int
    seen_features: set[str]
    start: "Teacher"
    writer: "Writer | None"
    preview: "Preview | None"
    lined: "Lines | None"  # of an objective on trajectories
    grids: "list[Tensor]"  # of the numbers of steps that it is for

    def measure(self) -> list[str]:
        """Time three updates, where nothing is sealed yet."""
        from flowmatch.models import flops
        from flowmatch.training import rehearsal

        config: ReflowConfig = self.config
        if manifest.sealed(config.run_dir):
            return []
        device = process.worker_device(process.device_of(config))
        plain = config.objective.name != "meanflow"
        more: Any = {"trained": True}
        cost = flops.of_network(self.start, self.net, config.lora, **more) if plain else None
        return rehearsal.lines(partial(train, self), config.fit, self.net, device, cost)


def plan(config: ReflowConfig) -> Plan:
    """Check the config, open the pairs, and load the start."""
    from flowmatch.evaluation import decoded
    from flowmatch.flow import objectives, trajectories
    from flowmatch.models import adapters
    from flowmatch.pairs import matching, mixture
    from flowmatch.pairs.mixture import Mixture
    from flowmatch.training import adapted, loop, preview

    def check_loop() -> str:
        device = process.device_of(config)
        loop.check(config.fit, device, process.world_size())
        return device

    def load_start() -> "Teacher":
        start = load(config, process.worker_device(process.device_of(config)))
        loop.check_net(config.fit, start.net, start.classes)
        return start

    device, _, _, _, start, *sets = together(
        check_loop,
        lambda: adapted.check(config.lora, config.fit, config.objective.name),
        lambda: objectives.check(
            config.objective,
            config.loss,
            config.times,
            config.fit,
            config.prompts is not None,
            config.for_steps,
        ),
        lambda: decoded.check(config.loss),
        load_start,
        *(
            partial(mixture.open_set, number, entry, config.objective.on_states)
            for number, entry in enumerate(config.pairs)
        ),
    )
    weights = [entry.weight for entry in config.pairs]
    micro, _ = loop.split_batch(config.fit, process.world_size())
    _, stream, net, lined = together(
        lambda: matching.check_match(start, sets),
        lambda: Mixture(list(zip(sets, weights, strict=True)), config.fit.batch_size, config.seed),
        lambda: network(start, config),
        lambda: trajectories.build(
            config.objective,
            {f"{data.key}={data.folder}": data.times for data in sets},
            config.for_steps,
        ),
    )
    writer = None
    if config.lora is not None:
        writer = adapters.writer(config.lora, start)
        adapted.add(net, config.lora, writer, config.seed)
    inputs = {"start": start.digest}
    inputs |= {f"pairs.{number}": data.digest for number, data in enumerate(sets)}
    if config.prompts is not None:
        inputs["prompts"] = start.facts["prompts"]["digest"]
    see = decoded.of_loss(
        config.loss,
        start,
        config.start,
        sets,
        micro,
        precision=config.fit.precision,
        device=process.worker_device(device),
        seed=config.seed,
    )
    inputs |= see.inputs
    cuts, unseen = stream.leave_out(config.pairs)
    count = stream.count
    config = config.model_copy(update={"fit": config.fit.over(count)})
    seen = config.fit.steps * config.fit.batch_size
    only = f", for {step_words(config.at_steps)} only, at their times" if config.at_steps else ""
    laid = [start.student_grid(n) for n in config.at_steps]
    lines = [
        f"{count:,} pairs of {list(start.shape)} in {counted(len(sets), 'set')}, "
        f"{'with prompts' if config.prompts else 'with labels' if start.classes else 'no labels'}",
        *cuts,
        f"{type(net).__name__} of {net.num_parameters():,} parameters, on {device}",
        *process.untested(device),
        *(writer.lines(net) if writer else ()),
        f"{config.fit.steps} steps of {config.fit.batch_size}: {seen / count:.1f} epochs{only}",
        *(lined.told if lined else ()),
        *see.lines,
        *start.lines,
    ]
    last = max(data.sealed["facts"]["round"] for data in sets)
    every = config.fit.sample_every
    shown, told = preview.planned(every, start, config.start, sets[0], unseen, laid, lined)
    more = (net, stream, see.module, last + 1, see.digests, start, writer, shown, lined, laid)
    return Plan(config, inputs, lines + told, *more)


def load(config: ReflowConfig, device: str) -> "Teacher":
    """Load the start: a flow or diffusion model, or the network of a pipeline that reads prompts."""
    if config.prompts is None:
        from flowmatch.models import teachers

        return teachers.load(config.start, "start")
    from flowmatch.models import adapters, text

    prompts, call, place = config.prompts, config.call, config.pipeline
    dtype = adapters.dtype_of(config.lora, config.fit.precision)
    more: Any = {"pipeline": place, "rows": config.conditions, "device": device, "dtype": dtype}
    return text.load(config.start, "start", prompts, call, **more)


def run(plan: Plan) -> None:
    """Train, and seal the folder."""
    from flowmatch.models import networks
    from flowmatch.models.digest import network_digest

    config: ReflowConfig = plan.config
    facts = {"round": plan.round} | plan.stream.facts | plan.start.student_facts
    if plan.seen_features:
        facts["features"] = sorted(plan.seen_features)
    if config.at_steps:
        facts["for_steps"] = config.at_steps
    elif plan.lined is not None and plan.lined.windows:
        facts["windows"] = plan.lined.windows
    with folder.RunFolder("reflow", config, plan.inputs, facts) as opened:
        files = train(plan, opened, config.fit)
        if process.leads():
            if plan.writer is None:
                facts = {"net": network_digest(networks.load(opened.folder / "net", "net"))}
            else:
                facts = plan.writer.facts(opened.folder / "net")
            opened.seal(files, **facts)


def train(
    plan: Plan, opened: folder.RunFolder, how: FitConfig, on_log: "OnLog | None" = None
) -> list[str]:
    """Train the network of a plan; return its files."""
    from flowmatch.flow import coupling, objectives
    from flowmatch.training.loop import fit

    config: ReflowConfig = plan.config
    field = plan.start.field(plan.net)
    if config.prompts is not None and process.world_size() > 1 and not how.shard:
        from flowmatch.models import text

        there = process.worker_device(process.device_of(config))
        text.freeze_unused(plan.net.to(there), field, plan.start.shape)
    return fit(
        plan.net,
        plan.stream,
        coupling.stored,
        opened,
        how,
        plan.grids or config.times,
        objectives.build(config.objective, config.loss, plan.module),
        seed=config.seed,
        device=config.device,
        field=field,
        writer=plan.writer,
        preview=plan.preview,
        on_log=on_log,
        lines=plan.lined,
    )


def network(start: "Teacher", config: ReflowConfig) -> Any:
    """Return the network to train: the start's, with a second time where the objective needs one.

    Raises UserError where the network has no place for one, or has one that would stay untrained.
    """
    from flowmatch.models import two_time

    has = two_time.argument(start.net) is not None
    if config.objective.name == "meanflow":
        if config.objective.step == 0 and two_time.has_attention(start.net):
            raise UserError(
                f"start={config.start} has attention, and torch has no forward-mode derivative of its "
                "fused kernels, which objective.step=0 needs; use objective.step=0.05"
            )
        return start.net if has else two_time.add(start.net, config.seed)
    if has:
        raise UserError(
            f"start={config.start} takes a second time (MeanFlow), which objective.name="
            f"{config.objective.name} would leave untrained; use objective.name=meanflow, or start from "
            "the flow before it"
        )
    return start.net


STAGE = command.Stage("reflow", ReflowConfig, plan, run, __doc__, grouped=True)

if __name__ == "__main__":
    command.main(STAGE)
