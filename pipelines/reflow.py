"""Stage three: reflow. Train again, from the teacher's weights, on the pairs of stage two.

Same loop, same path, same target x1 - x0; but x0 and x1 belong together, so the lines that the network
learns do not cross, and few Euler steps follow them. With `times.zero=1`, from a reflowed start:
distillation to one step, after which the student samples in one step only. With
`objective.name=meanflow`: the average velocity between any two times, by a second time in the network.
With `objective.name=segments` or `cmt`, from pairs with states: lines that begin along the path.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import pydantic

from flowmatch.config import LocalPath, UserError, counted, option, require, required, together
from flowmatch.data.config import PromptsConfig
from flowmatch.flow.config import LossConfig, ObjectiveConfig, TimesConfig
from flowmatch.models.config import CallConfig, LoraConfig
from flowmatch.pairs.config import PairsEntry
from flowmatch.runs import command, folder, manifest, process
from flowmatch.runs.config import StageConfig
from flowmatch.training.config import FitConfig

if TYPE_CHECKING:
    from flowmatch.flow.trajectories import Lines
    from flowmatch.models.adapters import Writer
    from flowmatch.models.teachers import Teacher
    from flowmatch.pairs.dataset import PairData
    from flowmatch.pairs.mixture import Mixture
    from flowmatch.training.loop import OnLog
    from flowmatch.training.preview import Preview


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

    @pydantic.model_validator(mode="before")
    @classmethod
    def _keep_guidance(cls, values: Any) -> Any:
        """The student of guided pairs needs no null prompt: drop none, unless asked to."""
        if (
            isinstance(values, dict)
            and values.get("prompts")
            and isinstance(values.get("fit"), dict)
        ):
            return values | {"fit": {"label_drop": 0.0} | values["fit"]}
        return values


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
    from flowmatch.evaluation import features
    from flowmatch.flow import objectives, trajectories
    from flowmatch.models import adapters
    from flowmatch.pairs import matching, mixture
    from flowmatch.pairs.mixture import Mixture
    from flowmatch.training import loop

    def check_loop() -> str:
        device = process.device_of(config)
        loop.check(config.fit, device, process.world_size())
        return device

    def check_features() -> None:
        if config.loss.features is not None:
            features.check(config.loss.features, "loss.features")

    def load_start() -> "Teacher":
        start = load(config, process.worker_device(process.device_of(config)))
        loop.check_net(config.fit, start.net, start.classes)
        return start

    device, _, _, _, start, *sets = together(
        check_loop,
        lambda: check_lora(config),
        lambda: objectives.check(
            config.objective, config.loss, config.times, config.fit, config.prompts is not None
        ),
        check_features,
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
            config.objective, {f"{data.key}={data.folder}": data.times for data in sets}
        ),
    )
    writer = None
    if config.lora is not None:
        writer = adapters.writer(config.lora, start)
        adapters.add(net, config.lora, config.seed)
    inputs = {"start": start.digest}
    inputs |= {f"pairs.{number}": data.digest for number, data in enumerate(sets)}
    if config.prompts is not None:
        inputs["prompts"] = start.facts["prompts"]["digest"]
    seen_features = {*start.features}
    for data in sets:
        seen_features.update(data.sealed["facts"].get("features", ()))  # of its teacher
    module = None
    if config.loss.features is not None:
        module, inputs["features"], digest = features.perceptual(
            config.loss.features,
            "loss.features",
            micro,
            start.shape,
            process.worker_device(device),
            config.seed,
        )
        seen_features.add(digest)
    cuts, unseen = stream.leave_out(config.pairs)
    count = stream.count
    config = config.model_copy(update={"fit": config.fit.over(count)})
    seen = config.fit.steps * config.fit.batch_size
    only = ", for one step only: all times are 0" if config.times.zero == 1 else ""
    lines = [
        f"{count:,} pairs of {list(start.shape)} in {counted(len(sets), 'set')}, "
        f"{'with prompts' if config.prompts else 'with labels' if start.classes else 'no labels'}",
        *cuts,
        f"{type(net).__name__} of {net.num_parameters():,} parameters, on {device}",
        *process.untested(device),
        *(writer.lines(net) if writer else ()),
        f"{config.fit.steps} steps of {config.fit.batch_size}: {seen / count:.1f} epochs{only}",
        *(lined.told if lined else ()),
        *start.lines,
    ]
    last = max(data.sealed["facts"]["round"] for data in sets)
    shown = None
    if config.fit.sample_every is not None:
        shown, told = view(config, start, sets[0], unseen, lined)
        lines += told
    more = (net, stream, module, last + 1, seen_features, start, writer, shown, lined)
    return Plan(config, inputs, lines, *more)


def view(
    config: ReflowConfig,
    start: "Teacher",
    first: "PairData",
    unseen: "list[tuple[PairData, Any]]",
    lined: "Lines | None",
) -> "tuple[Preview, list[str]]":
    """Choose what is drawn and measured while it trains, and say so."""
    from flowmatch.models import autoencoder
    from flowmatch.training import preview

    decode, why = preview.decoder(start, autoencoder.of_run(config.start, start.latents))
    made = preview.of_pairs(first, unseen, config.times.zero == 1, decode, lined)
    assert config.fit.sample_every is not None
    return made, preview.lines(made, config.fit.sample_every, why)


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
    if config.times.zero == 1:
        facts["one_step"] = True
    if plan.lined is not None and plan.lined.windows:
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
        config.times,
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


def check_lora(config: ReflowConfig) -> None:
    """Raise UserError where peft is missing, or an adapter would leave new layers untrained."""
    if config.lora is None:
        return
    require("peft", "text", "lora")
    if config.objective.name == "meanflow":
        raise UserError(
            "lora: objective.name=meanflow adds a second time to the network, which an adapter leaves "
            "untrained; leave one of them out"
        )


STAGE = command.Stage("reflow", ReflowConfig, plan, run, __doc__, grouped=True)

if __name__ == "__main__":
    command.main(STAGE)
