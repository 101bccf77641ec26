"""Stage three: reflow. Train again, from the teacher's weights, on the pairs of stage two.

Same loop, same path, same target x1 - x0; but x0 and x1 now belong together, so the lines that the
network learns do not cross, and few Euler steps follow them. With `times.zero=1`, from a reflowed start:
distillation to one step, which is all that the student is then good for. With `objective.name=meanflow`:
the average velocity between any two times, by a second time in the network.
"""

from typing import Any

from flowmatch import config as configs
from flowmatch.config import Config, UserError, option, required
from flowmatch.evaluation import features
from flowmatch.flow import coupling, objectives
from flowmatch.flow.config import LossConfig, ObjectiveConfig, TimesConfig
from flowmatch.models import diffusion, networks, teachers, two_time
from flowmatch.models.digest import network_digest
from flowmatch.pairs import mixture, truncation
from flowmatch.pairs.dataset import PairData
from flowmatch.runs import command, process
from flowmatch.runs.config import StageConfig
from flowmatch.runs.folder import RunFolder, begin
from flowmatch.training.config import FitConfig
from flowmatch.training.loop import check, check_net, fit, split_batch


class PairsEntry(Config):
    """One set of pairs."""

    path: str = required(
        "folder of a sealed set of pairs, or URL such as s3://BUCKET/PREFIX", run=True
    )
    weight: float = option(1.0, "share of each batch, relative to the other sets", gt=0)
    group: int = option(
        0,
        "shards that are shuffled together: a pass over the set touches each shard once, and two "
        "groups of a URL must fit into its cache; 0: all of them, at hand all the time",
        ge=0,
    )
    truncate: float = option(
        0.0,
        "share of the pairs, those with the largest |x1 - x0|^2, that is left out of training; found "
        "by each process at its start, of a dry run too, in one pass over the whole set",
        ge=0,
        lt=1,
    )
    cache: str | None = option(
        None, "folder in which tars of a URL are kept (default: ~/.cache/flowmatch/pairs)", run=True
    )
    cache_gb: float | None = option(
        None,
        "what they may take there, in 10^9 bytes; the least recently used go first (default: nine "
        "tenths of what is free, in equal parts for all sets that leave it out)",
        run=True,
        gt=0,
    )


class ReflowConfig(StageConfig):
    """Config of stage three."""

    pairs: list[PairsEntry] = required("sets of pairs, mixed in each batch by weight")
    start: str = required(
        "start weights: a sealed training stage (its EMA), or a diffusers model or pipeline; one that "
        "predicts noise or data learns the velocity from there",
        run=True,
    )
    fit: FitConfig = required("the training loop")
    objective: ObjectiveConfig = option(ObjectiveConfig(), "what is learnt on the pairs")
    times: TimesConfig = option(
        TimesConfig(name="noise_heavy", zero=0.5),
        "which times it sees: half at exactly 0, where one-step sampling looks, the others near it",
    )
    loss: LossConfig = option(LossConfig(name="pseudo_huber"), "loss on the velocity")


def main(config: ReflowConfig, dry_run: bool) -> None:
    """Plan, then train and seal."""
    faults = configs.Faults()
    with faults:
        device = process.pick_device(config.device)
        check(config.fit, device, process.world_size())
    with faults:
        objectives.check(config.objective, config.loss, config.times, config.fit)
    if config.loss.features is not None:
        with faults:
            features.check(config.loss.features, "loss.features")
    inputs: dict[str, str] = {}
    with faults:
        start = teachers.load(config.start, "start")
        inputs["start"] = start.digest
        check_net(config.fit, start.net)
    sets: list[tuple[PairData, float]] = []
    rounds = []
    for number, entry in enumerate(config.pairs):
        with faults:
            key = f"pairs.{number}.path"
            data = PairData(entry.path, key, entry.group, entry.cache, entry.cache_gb)
            if entry.truncate:
                truncation.check(data, entry.truncate)
            sets.append((data, entry.weight))
            rounds.append(data.sealed["facts"]["round"])
            inputs[f"pairs.{number}"] = data.digest
    if not faults.errors:
        with faults:
            check_match(start, [data for data, _ in sets])
            stream = mixture.Mixture(sets, config.fit.batch_size, config.seed)
        with faults:
            net = network(start, config)
    module, looked = None, set()
    if not faults.errors:
        looked.update(start.features)
        for data, _ in sets:
            looked.update(data.sealed["facts"].get("features", ()))  # of its teacher
        if config.loss.features is not None:
            with faults:
                module, inputs["features"], looks = features.perceptual(
                    config.loss.features,
                    "loss.features",
                    split_batch(config.fit, process.world_size())[0],
                    start.shape,
                    process.worker_device(device),
                )
                looked.add(looks)
    faults.check()

    cuts = []
    for number, entry in enumerate(config.pairs):
        if entry.truncate:  # a whole set is read: after all that is cheap to find
            kept, cut = truncation.truncate(sets[number][0], entry.truncate)
            stream.keep(number, kept)
            cuts.append(cut)
    count = sum(order.n for order in stream.orders)
    seen = config.fit.steps * config.fit.batch_size
    one_step = config.times.zero == 1
    only = ", for one step only: all times are 0" if one_step else ""
    plan = [
        f"{count:,} pairs of {list(start.shape)} in {len(sets)} set(s), "
        f"{'with labels' if start.classes else 'no labels'}",
        *cuts,
        f"{type(net).__name__} of {net.num_parameters():,} parameters, on {device}",
        f"{config.fit.steps} steps of {config.fit.batch_size}: {seen / count:.1f} epochs{only}",
    ]
    if not begin("reflow", config, inputs, plan, dry_run):
        return
    with RunFolder("reflow", config, inputs) as folder:
        files = fit(
            net,
            stream,
            coupling.stored,
            folder,
            config.fit,
            config.times,
            objectives.build(config.objective, config.loss, module),
            seed=config.seed,
            device=config.device,
        )
        if process.leads():
            facts: dict[str, Any] = {"features": sorted(looked)} if looked else {}
            if one_step:
                facts["one_step"] = True
            net = networks.load(folder.folder / "net", "net")
            folder.seal(files, round=max(rounds) + 1, net=network_digest(net), **facts)


def network(start: teachers.Teacher, config: ReflowConfig) -> Any:
    """Give the network that is trained: the start's, with a second time where the objective asks for it.

    Raises UserError where the network has no place for one, or has one that would be left untrained.
    """
    has = two_time.argument(start.net) is not None
    if config.objective.name == "meanflow":
        if config.objective.step == 0 and two_time.has_attention(start.net):
            raise UserError(
                f"start={config.start} has attention, through whose fused kernels torch has no "
                "forward-mode derivative, as objective.step=0 needs; use objective.step=0.05"
            )
        return start.net if has else two_time.add(start.net, config.seed)
    if has:
        raise UserError(
            f"start={config.start} takes a second time (MeanFlow), which objective.name=velocity would "
            "leave untrained; use objective.name=meanflow, or start from the flow before it"
        )
    return start.net


def check_match(start: teachers.Teacher, sets: list[PairData]) -> None:
    """Raise UserError where the pairs are not what the network takes, or it can be no velocity."""
    faults = []
    if start.diffusion is not None and not diffusion.can_be_velocity(start.net):
        faults.append(
            "start= is no network for velocities: it gives a variance too, or has no row for the null "
            "class; start from a flow model"
        )
    for data in sets:
        if data.shape != start.shape:
            faults.append(
                f"{data.key}={data.folder} holds {list(data.shape)}; the network at start= takes "
                f"{list(start.shape)}"
            )
        classes = data.sealed["facts"].get("classes")
        if classes != start.classes:
            faults.append(
                f"{data.key}={data.folder} has {classes or 'no'} classes; the network at start= takes "
                f"{start.classes or 'none'}"
            )
        if data.has_prompts:
            faults.append(f"{data.key}={data.folder} has prompts; no network here takes text")
    if faults:
        raise UserError(faults)


if __name__ == "__main__":
    command.command("reflow", ReflowConfig, main, __doc__)
