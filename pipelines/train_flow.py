"""Stage one: train a flow from noise to data under random coupling, or mini-batch optimal transport.

x_t = (1 - t) x0 + t x1 with fresh noise x0 for each image x1; the network learns x1 - x0. Its EMA
weights, in `run_dir/net`, are the teacher of the next stages.
"""

from flowmatch import config as configs
from flowmatch import coupling, data, nets, objectives, run, stage
from flowmatch.config import UserError, option, required
from flowmatch.coupling import CouplingConfig
from flowmatch.data import DataConfig
from flowmatch.fit import check, check_net, fit, split_batch
from flowmatch.losses import LossConfig
from flowmatch.nets import NetConfig
from flowmatch.noise import Order
from flowmatch.objectives import ObjectiveConfig
from flowmatch.state import FitConfig
from flowmatch.times import TimesConfig


class FlowConfig(stage.StageConfig):
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
        device = stage.pick_device(config.device)
        check(config.fit, device, stage.world_size())
        coupling.check(config.coupling, split_batch(config.fit, stage.world_size())[0])
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
        images = data.load(config.data)
        net = nets.build(config.net, images.shape, images.classes, config.seed)
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
    if not stage.begin("train_flow", config, inputs, plan, dry_run):
        return
    order = Order(len(images), config.seed)
    with run.Run("train_flow", config, inputs) as folder:
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
        if stage.leads():
            folder.seal(files, round=0, net=nets.digest(nets.load(folder.folder / "net", "net")))


if __name__ == "__main__":
    stage.command("train_flow", FlowConfig, main, __doc__)
