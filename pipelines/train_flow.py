"""Stage one: train a flow from noise to data under random coupling, or mini-batch optimal transport.

x_t = (1 - t) x0 + t x1 with fresh noise x0 for each image x1; the network learns x1 - x0. Its EMA
weights, in `run_dir/net`, are the teacher of the next stages.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from flowmatch.config import UserError, option, required, together
from flowmatch.data.config import DataConfig
from flowmatch.flow.config import CouplingConfig, LossConfig, ObjectiveConfig, TimesConfig
from flowmatch.models.config import NetConfig
from flowmatch.runs import command, folder, process
from flowmatch.runs.config import StageConfig
from flowmatch.training.config import FitConfig

if TYPE_CHECKING:
    from flowmatch.data.dataset import Data


class FlowConfig(StageConfig):
    """Config of stage one."""

    stage: ClassVar[str] = "train_flow"

    data: DataConfig = required("training data")
    net: NetConfig = required("the network")
    fit: FitConfig = required("the training loop")
    coupling: CouplingConfig = option(CouplingConfig(), "how noise is paired with data")
    times: TimesConfig = option(TimesConfig(), "density of the training times")
    loss: LossConfig = option(LossConfig(), "loss on the velocity")


@dataclass
class Plan(folder.Plan):
    """Opened data and an untrained network."""

    data: "Data"
    net: Any


def plan(config: FlowConfig) -> Plan:
    """Check the config, open the data and build the network."""
    from flowmatch.data import dataset
    from flowmatch.flow import coupling
    from flowmatch.models import networks
    from flowmatch.training import loop

    def check_loop() -> str:
        device = process.pick_device(config.device)
        loop.check(config.fit, device, process.world_size())
        micro, _ = loop.split_batch(config.fit, process.world_size())
        coupling.check(config.coupling, micro)
        return device

    def open_data() -> tuple["Data", Any]:
        data = dataset.load(config.data)
        net = networks.build(config.net, data.shape, data.classes, config.seed)
        loop.check_net(config.fit, net, data.classes)
        return data, net

    device, _, (data, net) = together(check_loop, lambda: check_pairless(config), open_data)
    seen = config.fit.steps * config.fit.batch_size
    labels = "no labels" if data.classes is None else f"{data.classes} classes"
    lines = [
        f"{len(data)} samples of {list(data.shape)}, {labels}",
        f"{config.net.name} of {net.num_parameters():,} parameters, on {device}",
        f"{config.fit.steps} steps of {config.fit.batch_size}: {seen / len(data):.1f} epochs",
        *data.notes,
    ]
    return Plan(config, {"data": data.digest}, lines, data, net)


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
    from flowmatch.flow import coupling, objectives
    from flowmatch.flow.noise import Order
    from flowmatch.models import networks
    from flowmatch.models.digest import network_digest
    from flowmatch.training.loop import fit

    config: FlowConfig = plan.config
    order = Order(len(plan.data), config.seed)
    with folder.RunFolder("train_flow", config, plan.inputs) as opened:
        files = fit(
            plan.net,
            lambda counters: plan.data.batch(order(counters)),
            coupling.build(config.coupling),
            opened,
            config.fit,
            config.times,
            objectives.build(ObjectiveConfig(), config.loss),
            seed=config.seed,
            device=config.device,
        )
        if process.leads():
            net = networks.load(opened.folder / "net", "net")
            opened.seal(files, round=0, net=network_digest(net))


STAGE = command.Stage("train_flow", FlowConfig, plan, run, __doc__)

if __name__ == "__main__":
    command.main(STAGE)
