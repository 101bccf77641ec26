"""The network whose features score images, or enter the feature loss of reflow.

By default a small convolutional classifier; its accuracy on held-out images stands beside its features
in the protocol of each evaluation. A residual network and a denoising autoencoder, which needs no
labels, judge the panel of an evaluation; no loss takes them.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from flowmatch.config import UserError, option, required, together
from flowmatch.data.config import DataConfig
from flowmatch.evaluation.config import Network, Task
from flowmatch.runs import command, folder, process
from flowmatch.runs.config import StageConfig

if TYPE_CHECKING:
    from flowmatch.data.dataset import Data


class ClassifierConfig(StageConfig):
    """Config of the classifier."""

    stage: ClassVar[str] = "train_classifier"

    data: DataConfig = required("training images, with labels for classification")
    held_out: DataConfig | None = option(
        None, "images that measure the result; default: a fifth of data, at most 4,000"
    )
    network: Network = option(
        "convolutional",
        "architecture; that of the features of losses is convolutional",
        shared=False,
    )
    task: Task = option(
        "classification",
        "what the network learns: labels, or to remove noise, which needs no labels",
        shared=False,
    )
    steps: int = option(1500, "updates of the weights", ge=1)
    batch_size: int = option(64, "images an update", ge=2)
    lr: float = option(4e-3, "peak learning rate of the one-cycle schedule", gt=0)


@dataclass
class Plan(folder.Plan):
    """Opened images: data, and held_out where it is given."""

    sets: dict[str, "Data"]


def plan(config: ClassifierConfig) -> Plan:
    """Check the config and open the images."""
    from flowmatch.data import dataset
    from flowmatch.evaluation import features

    def check_device() -> None:
        if config.device not in ("auto", "cpu"):
            raise UserError(
                f"device={config.device}: the classifier is trained on the CPU, where it depends on "
                "data and seed alone; leave device out"
            )

    def open_images(key: str) -> "Data":
        data = dataset.load(getattr(config, key), key)
        labels = config.task == "classification"
        features.check_images(data, key, alone=config.held_out is None, labels=labels)
        if data.flip:
            raise UserError(f"{key}.flip=true: mirror images are not used here; leave it out")
        return data

    keys = ["data"] if config.held_out is None else ["data", "held_out"]
    _, *opened = together(check_device, *(lambda key=key: open_images(key) for key in keys))
    sets: dict[str, Data] = dict(zip(keys, opened, strict=True))
    if len(sets) == 2:
        ours, theirs = [(list(data.shape), data.classes) for data in sets.values()]
        if ours[:1] != theirs[:1] or (config.task == "classification" and ours != theirs):
            raise UserError(f"held_out: shape and classes are {theirs}; data has {ours}")
        first, second = [data.names for data in sets.values()]
        if first and second and first != second:
            raise UserError(
                f"held_out: the classes are {', '.join(second)}; those of data are {', '.join(first)}"
            )
    images = sets["data"]
    seen = config.steps * config.batch_size
    learns = f"{images.classes} classes" if config.task == "classification" else "to denoise"
    lines = [
        f"{images.count} images of {list(images.shape)}, {learns}",
        f"{config.steps} steps of {config.batch_size}: {seen / images.count:.1f} epochs, on cpu",
        *(f"{key}: {note}" for key, data in sets.items() for note in data.notes),
    ]
    return Plan(config, {key: data.digest for key, data in sets.items()}, lines, sets)


def run(plan: Plan) -> None:
    """Train on the CPU, measure the accuracy, and seal the folder; rank 0 alone."""
    if not process.leads():
        return
    from tqdm import tqdm

    from flowmatch.data import dataset
    from flowmatch.evaluation import encoders, features
    from flowmatch.models.digest import module_digest

    config: ClassifierConfig = plan.config
    images = plan.sets["data"]
    judge = (config.network, config.task) != ("convolutional", "classification")
    train: Any = partial(encoders.train, network=config.network, task=config.task)
    with folder.RunFolder("train_classifier", config, plan.inputs) as opened:
        dataset.write_skipped(images, opened.folder)
        with tqdm(total=config.steps, unit="step", **process.bar_options()) as bar:
            net, measured = (train if judge else features.train_classifier)(
                images,
                config.seed,
                held_out=plan.sets.get("held_out"),
                steps=config.steps,
                batch=config.batch_size,
                lr=config.lr,
                show=lambda step: bar.update(),
            )
        built = opened.scratch.build("classifier")
        files = features.save(net, built)
        for name in files:
            opened.scratch.place(built / name, opened.folder / name)
        opened.seal(
            files,
            **{"accuracy": None, encoders.MEASURED[config.task]: measured},
            sha256=module_digest(net),
            shape=list(images.shape),
            classes=images.classes if config.task == "classification" else None,
            **({"network": config.network, "task": config.task} if judge else {}),
        )
        what = "accuracy" if config.task == "classification" else "variance explained"
        process.say(f"train_classifier: {what} {measured:.2%} on the held-out images")


STAGE = command.Stage("train_classifier", ClassifierConfig, plan, run, __doc__, alone=True)

if __name__ == "__main__":
    command.main(STAGE)
