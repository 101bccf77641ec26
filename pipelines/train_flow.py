"""Stage one: train a flow from noise to data under random coupling, or mini-batch optimal transport.

x_t = (1 - t) x0 + t x1 with fresh noise x0 for each image x1; the network learns x1 - x0. Its EMA
weights, in `run_dir/net`, are the teacher of the next stages.
"""

from flowmatch import config as configs
from flowmatch.config import UserError, option, required
from flowmatch.data import dataset
from flowmatch.data.config import DataConfig
from flowmatch.flow import coupling, objectives
from flowmatch.flow.config import CouplingConfig, LossConfig, ObjectiveConfig, TimesConfig
from flowmatch.flow.noise import Order
from flowmatch.models import networks
from flowmatch.models.config import NetConfig
from flowmatch.models.digest import network_digest
from flowmatch.runs import command, process
from flowmatch.runs.config import StageConfig
from flowmatch.runs.folder import RunFolder, begin
from flowmatch.training.config import FitConfig
from flowmatch.training.loop import check, check_net, fit, split_batch


class FlowConfig(StageConfig):
    """Config of stage one."""

    data: DataConfig = required("what to learn")
    net: NetConfig = required("the network")
    fit: FitConfig = required("the training loop")
    coupling: CouplingConfig = option(CouplingConfig(), "which noise goes with which data")
    times: TimesConfig = option(TimesConfig(), "which times it sees")
    loss: LossConfig = option(LossConfig(), "loss on the velocity")


def main(config: FlowConfig, dry_run: bool) -> None:
    """Plan, then train and seal."""
    faults = configs.Faults()
    with faults:
        device = process.pick_device(config.device)
        check(config.fit, device, process.world_size())
        coupling.check(config.coupling, split_batch(config.fit, process.world_size())[0])
    with faults:
        for key, used in (
            ("loss.name=feature", config.loss.name == "feature"),
            ("times.zero=1", config.times.zero == 1),
        ):
            if used:
                raise UserError(
                    f"{key}: without pairs the network predicts the mean of the data that a noise may "
                    "lead to, which looks like none of them; use it in reflow"
                )
    with faults:
        images = dataset.load(config.data)
        net = networks.build(config.net, images.shape, images.classes, config.seed)
        check_net(config.fit, net)
    faults.check()
    seen = config.fit.steps * config.fit.batch_size
    plan = [
        f"{len(images)} samples of {list(images.shape)}, "
        f"{'no labels' if images.classes is None else f'{images.classes} classes'}",
        f"{config.net.name} of {net.num_parameters():,} parameters, on {device}",
        f"{config.fit.steps} steps of {config.fit.batch_size}: {seen / len(images):.1f} epochs",
    ]
    inputs = {"data": images.digest}
    if not begin("train_flow", config, inputs, plan, dry_run):
        return
    order = Order(len(images), config.seed)
    with RunFolder("train_flow", config, inputs) as folder:
        files = fit(
            net,
            lambda counters: images.batch(order(counters)),
            coupling.build(config.coupling),
            folder,
            config.fit,
            config.times,
            objectives.build(ObjectiveConfig(), config.loss),
            seed=config.seed,
            device=config.device,
        )
        if process.leads():
            folder.seal(
                files, round=0, net=network_digest(networks.load(folder.folder / "net", "net"))
            )


if __name__ == "__main__":
    command.command("train_flow", FlowConfig, main, __doc__)
