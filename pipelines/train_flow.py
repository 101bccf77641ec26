"""Stage one: train a flow from noise to data under random coupling, or mini-batch optimal transport.

x_t = (1 - t) x0 + t x1 with fresh noise x0 for each image x1; the network learns x1 - x0. Its EMA
weights, in `run_dir/net`, are the teacher of the next stages.

With `start`, training goes on from the weights of a finished stage, a checkpoint or a diffusers model.
Where that is a pipeline that reads prompts, its network is trained on pictures with captions, as the
latents of its VAE, under what its text encoders say of the captions. A network that predicts
noise, data or v goes on to do so, at the timesteps of its scheduler.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pydantic

from flowmatch.config import LocalPath, NotReady, UserError, option, required, together
from flowmatch.data.config import DataConfig
from flowmatch.flow.config import CouplingConfig, LossConfig, ObjectiveConfig, TimesConfig
from flowmatch.models.config import CallConfig, NetConfig
from flowmatch.runs import command, folder, manifest, process
from flowmatch.runs.config import StageConfig
from flowmatch.training.config import FitConfig

if TYPE_CHECKING:
    from flowmatch.data.dataset import Data
    from flowmatch.models.text import TextTeacher
    from flowmatch.training.loop import OnLog
    from flowmatch.training.preview import Preview


class FlowConfig(StageConfig):
    """Config of stage one."""

    stage: ClassVar[str] = "train_flow"
    others: ClassVar[tuple[str, ...]] = process.OTHERS
    DERIVED: ClassVar[dict[str, str]] = {"fit.steps": "fit.epochs"}

    data: DataConfig = required("training data")
    start: LocalPath | None = option(
        None,
        "start weights in place of random ones: a finished training stage (its EMA), a checkpoint, or a "
        "diffusers model or pipeline; the network of a pipeline that reads prompts is trained on "
        "pictures with captions",
        run=True,
        shared=False,
    )
    call: CallConfig = option(
        CallConfig(),
        "with a start that reads prompts: arguments of the pipeline's call",
        validate_default=True,
    )
    fresh: bool = option(
        False,
        "with a start that reads prompts: random weights in place of the network's own",
        validate_default=True,
    )
    net: NetConfig | None = option(
        None, "the network; left out with start, which has one", validate_default=True
    )
    fit: FitConfig = required("the training loop")
    reference: DataConfig | None = option(
        None,
        "with fit.sample_every: data that training does not see, for the held-out loss",
        run=True,
    )
    coupling: CouplingConfig = option(CouplingConfig(), "how noise is paired with data")
    times: TimesConfig = option(TimesConfig(), "density of the training times")
    loss: LossConfig = option(LossConfig(), "loss on the velocity")

    @pydantic.field_validator("call", "fresh")
    @classmethod
    def _with_start(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        if value not in (False, CallConfig()) and not info.data.get("start"):
            raise ValueError("for a pipeline that reads text; set start")
        return value

    @pydantic.field_validator("net")
    @classmethod
    def _one_network(cls, net: NetConfig | None, info: pydantic.ValidationInfo) -> Any:
        if net is None and not info.data.get("start"):
            raise ValueError("missing; set net.name, a class of diffusers, or start, a pipeline")
        if net is not None and info.data.get("start"):
            raise ValueError("start has a network; remove net (net: null) or start")
        return net


@dataclass
class Plan(folder.Plan):
    """Opened data and an untrained network; of a pipeline, what was learnt of it."""

    data: "Data"
    net: Any
    teacher: "TextTeacher | None"
    facts: dict[str, Any]  # for the manifest
    preview: "Preview | None"

    def measure(self) -> list[str]:
        """Time three updates, where nothing is sealed yet."""
        from flowmatch.models import flops
        from flowmatch.training import rehearsal

        config: FlowConfig = self.config
        if manifest.sealed(config.run_dir):
            return []
        device = process.worker_device(process.device_of(config))
        cost = flops.of_network(self.teacher or self.data, self.net, None, trained=True)
        return rehearsal.lines(partial(train, self), config.fit, self.net, device, cost)


def plan(config: FlowConfig) -> Plan:
    """Check the config, open the data and build the network."""
    from flowmatch.data import dataset
    from flowmatch.flow import coupling
    from flowmatch.models import networks
    from flowmatch.training import loop

    def check_loop() -> str:
        device = process.device_of(config)
        loop.check(config.fit, device, process.world_size())
        micro, _ = loop.split_batch(config.fit, process.world_size())
        coupling.check(config.coupling, micro)
        return device

    def open_data() -> Opened:
        data = dataset.load(config.data)
        if config.start is not None and reads_prompts(config.start):
            opened = open_captioned(config, data)
        elif config.start is not None:
            opened = open_start(config, data)
        else:
            assert config.net is not None
            net = networks.build(config.net, data.shape, data.classes, config.seed)
            labels = "no labels" if data.classes is None else f"{data.classes} classes"
            opened = Opened(data, net, None, {"data": data.digest}, labels)
        loop.check_net(config.fit, opened.net, opened.data.classes)
        return opened

    device, _, opened = together(check_loop, lambda: check_pairless(config), open_data)
    data, net, teacher = opened.data, opened.net, opened.teacher
    config = config.model_copy(update={"fit": config.fit.over(len(data))})
    epochs = config.fit.steps * config.fit.batch_size / len(data)
    named = f": {shortened(data.names)}" if data.names else ""
    lines = [
        f"{len(data)} samples of {list(data.shape)}, {opened.labels}{named}",
        f"{type(net).__name__} of {net.num_parameters():,} parameters, on {device}",
        *process.untested(device),
        f"{config.fit.steps} steps of {config.fit.batch_size}: {epochs:.1f} epochs",
        *data.notes,
        *(teacher.lines if teacher else []),
    ]
    facts = opened.facts if teacher is None else teacher.own_facts
    if (code := networks.code_of(net)) is not None and teacher is None:
        facts = facts | {"code": manifest.sha256_file(code)}
    facts = facts_of(data if teacher is None else replace(data, latents=False)) | facts
    shown = None
    if config.fit.sample_every is not None:
        shown, told = view(config, opened)
        lines += told
    return Plan(config, opened.inputs, lines, data, net, teacher, facts, shown)


def facts_of(data: "Data") -> dict[str, Any]:
    """Return what the manifest says of the data."""
    named = {str(k): name for k, name in enumerate(data.names or ())}
    facts: dict[str, Any] = {"samples": len(data)} | ({"id2label": named} if named else {})
    return facts | ({"latents": data.encoding or {}} if data.latents else {})


def shortened(names: Sequence[str], most: int = 8) -> str:
    """List names, the first few of many."""
    more = f", ... {names[-1]}" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@dataclass(frozen=True)
class Opened:
    """What a config names: data, a network, its pipeline, their digests, and words on the labels."""

    data: "Data"
    net: Any
    teacher: "TextTeacher | None"
    inputs: dict[str, str]
    labels: str
    facts: dict[str, Any] = field(default_factory=dict)


def reads_prompts(start: str) -> bool:
    """Tell whether a start is a pipeline that reads prompts, or a trained network of one."""
    from flowmatch.models import diffusion, pipeline, teachers

    if Path(start).exists() or not diffusion.HUB_NAME.fullmatch(start):
        with suppress(UserError):  # no training stage, or one that is told later
            return "script" in teachers.read_made(start, "start")["facts"]
        return pipeline.is_pipeline(start)
    try:
        index = diffusion.read_index(start, "start")
    except NotReady:
        return False
    return any(name.startswith(("text_encoder", "tokenizer")) for name in index)


def open_start(config: FlowConfig, data: "Data") -> Opened:
    """Load the start weights. Raises UserError where they do not fit the data, or are of no flow."""
    from flowmatch.models import diffusion, teachers, two_time

    assert config.start is not None
    where = f"start={config.start}"
    start = teachers.load(config.start, "start")
    faults = []
    if config.fresh or config.call != CallConfig():
        faults.append(f"{where} reads no prompts: leave fresh and call out")
    if start.shape != data.shape:
        faults.append(f"data holds {list(data.shape)}; {where} takes {list(start.shape)}")
    if start.classes != data.classes:
        faults.append(
            f"data has {data.classes or 'no'} classes; {where} takes {start.classes or 'none'}"
        )
    if start.diffusion is not None and not diffusion.can_be_velocity(start.net):
        faults.append(f"{where} cannot predict a velocity: start from a flow model")
    if two_time.argument(start.net) is not None:
        faults.append(f"{where} takes a second time (MeanFlow): start from the flow before it")
    if faults:
        raise UserError(faults)
    labels = "no labels" if data.classes is None else f"{data.classes} classes"
    inputs = {"data": data.digest, "start": start.digest}
    facts: dict[str, Any] = {"features": sorted(start.features)} if start.features else {}
    return Opened(data, start.net, None, inputs, f"{labels}, from the weights of {where}", facts)


def open_captioned(config: FlowConfig, pictures: "Data") -> Opened:
    """Learn the pipeline of `start`, and turn pictures with captions into its states.

    Raises UserError where there are no captions, or where it is no flow model that has a VAE.
    """
    from flowmatch.data import captions
    from flowmatch.data.prompts import PromptList
    from flowmatch.models import latents, precision, text
    from flowmatch.models.digest import module_digest

    assert config.start is not None
    if config.data.crop == "random":
        raise UserError(
            "data.crop=random: with start each picture is encoded once; use crop=centre"
        )
    where = f"start={config.start}"
    captioned, texts, digest = captions.read(pictures, config.data)
    teacher = text.load(
        config.start,
        "start",
        PromptList(texts, []),
        config.call,
        truncate="" if config.data.truncate else "data",
        run_folder="expected a pipeline",
        device=process.worker_device(process.device_of(config)),
    )
    kind = teacher.script.kind
    if kind != "flow" and config.loss != LossConfig():
        raise UserError(
            f"loss: the network of {where} predicts {kind}, and is trained with its own squared error; "
            "leave loss out"
        )
    if config.fresh:
        with precision.seeded(config.seed):
            net = type(teacher.net).from_config(teacher.net.config).to(teacher.net.device)
        setattr(teacher.pipe, teacher.script.network, net)
        teacher = replace(teacher, net=net)
    data = latents.encoded(teacher, captioned, config.data.memory, where)
    inputs = {"data": data.digest, "captions": digest, "start": teacher.digest}
    inputs["vae"] = module_digest(teacher.pipe.vae)
    words = f"from pictures of {list(pictures.shape)}, with {len(texts):,} captions"
    return Opened(data, teacher.net, teacher, inputs, words)


def view(config: FlowConfig, opened: Opened) -> "tuple[Preview, list[str]]":
    """Choose what is drawn and measured while it trains, and say so.

    Raises UserError where the reference is of another shape than the data, or has other labels.
    """
    from flowmatch.models import autoencoder
    from flowmatch.training import preview

    data, held = opened.data, None
    vae = autoencoder.of_data(data, "data.path")
    decode, why = preview.decoder(opened.teacher, vae)
    if config.reference is not None and opened.teacher is None:
        asked = config.reference.model_copy(update={"labels": config.data.labels})
        held = preview.held_out(asked, data, vae)
    shown = preview.of_noise(data.shape, data.classes, config.seed, held, decode)
    return shown, preview.lines(shown, config.fit.sample_every or 0, why)


def check_pairless(config: FlowConfig) -> None:
    """Raise UserError for keys that need noise/sample pairs."""
    for key, used in (
        ("loss.name=feature", config.loss.name == "feature"),
        ("times.zero=1", config.times.zero == 1),
    ):
        if used:
            raise UserError(f"{key} needs noise/sample pairs; use it in reflow, not in train_flow")


def run(plan: Plan) -> None:
    """Train, and seal the folder."""
    from flowmatch.data import dataset
    from flowmatch.models import networks
    from flowmatch.models.digest import network_digest

    config: FlowConfig = plan.config
    with folder.RunFolder("train_flow", config, plan.inputs, {"round": 0} | plan.facts) as opened:
        if process.leads():
            dataset.write_skipped(plan.data, opened.folder)
        files = train(plan, opened, config.fit)
        if process.leads():
            opened.seal(files, net=network_digest(networks.load(opened.folder / "net", "net")))


def train(
    plan: Plan, opened: folder.RunFolder, how: FitConfig, on_log: "OnLog | None" = None
) -> list[str]:
    """Train the network of a plan; return its files."""
    from flowmatch.flow import coupling, objectives
    from flowmatch.flow.noise import Order
    from flowmatch.models.velocity import Velocity
    from flowmatch.training.loop import fit

    config: FlowConfig = plan.config
    order = Order(len(plan.data), config.seed)
    teacher, field = plan.teacher, Velocity  # type: Any, Any
    own = teacher.own_schedule() if teacher else None  # of a network that predicts noise
    if teacher is not None:
        field = teacher.own_field(plan.net)
        if process.world_size() > 1 and not how.shard:
            from flowmatch.models import text

            text.freeze_unused(plan.net, field, teacher.shape)
    return fit(
        plan.net,
        lambda counters: plan.data.batch(order(counters), counters, config.seed),
        coupling.build(config.coupling),
        opened,
        how,
        config.times,
        objectives.build(ObjectiveConfig(), config.loss) if own is None else own.objective(),
        seed=config.seed,
        device=config.device,
        field=field,
        preview=plan.preview,
        on_log=on_log,
    )


STAGE = command.Stage("train_flow", FlowConfig, plan, run, __doc__, grouped=True)

if __name__ == "__main__":
    command.main(STAGE)
