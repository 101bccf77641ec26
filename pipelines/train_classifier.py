"""The classifier whose features score images: trained once, shared by every evaluation that names it.

A small convolutional network; its accuracy on images that it has not seen stands beside its features
in the protocol of each evaluation.
"""

from tqdm import tqdm

from flowmatch import config as configs
from flowmatch.config import UserError, option, required
from flowmatch.data import dataset
from flowmatch.data.config import DataConfig
from flowmatch.evaluation import features
from flowmatch.models.digest import module_digest
from flowmatch.runs import command, process
from flowmatch.runs.config import StageConfig
from flowmatch.runs.folder import RunFolder, begin


class ClassifierConfig(StageConfig):
    """Config of the classifier."""

    data: DataConfig = required("images to learn, with labels")
    held_out: DataConfig | None = option(
        None,
        "images with labels that measure the accuracy; default: a fifth of data, 4,000 at most",
    )
    steps: int = option(1500, "updates of the weights", ge=1)
    batch_size: int = option(64, "images an update", ge=2)
    lr: float = option(4e-3, "peak learning rate of the one-cycle schedule", gt=0)


def main(config: ClassifierConfig, dry_run: bool) -> None:
    """Plan, then train on the CPU, measure and seal."""
    faults = configs.Faults()
    inputs, sets = {}, {}
    with faults:
        if config.device == "cuda":
            raise UserError(
                "device=cuda: a classifier is trained on the CPU, where it depends on data and seed "
                "alone; leave device out"
            )
    for key in ("data", "held_out"):
        with faults:
            given = getattr(config, key)
            if given is not None:
                sets[key] = found = dataset.load(given, key)
                inputs[key] = found.digest
                features.check_images(found, key, alone=config.held_out is None)
                if found.flip:
                    raise UserError(f"{key}.flip=true: no mirror images are learnt; leave it out")
    if len(sets) == 2 and not faults.errors:
        with faults:
            ours, theirs = [(list(found.shape), found.classes) for found in sets.values()]
            if ours != theirs:
                raise UserError(f"held_out: shape and classes are {theirs}; data has {ours}")
    faults.check()
    images = sets["data"]
    seen = config.steps * config.batch_size
    plan = [
        f"{images.count} images of {list(images.shape)}, {images.classes} classes",
        f"{config.steps} steps of {config.batch_size}: {seen / images.count:.1f} epochs, on cpu",
    ]
    if not begin("train_classifier", config, inputs, plan, dry_run) or not process.leads():
        return
    with RunFolder("train_classifier", config, inputs) as folder:
        command.exit_on_sigterm()
        with tqdm(total=config.steps, unit="step", **process.bar_options()) as bar:
            net, accuracy = features.train_classifier(
                images,
                config.seed,
                held_out=sets.get("held_out"),
                steps=config.steps,
                batch=config.batch_size,
                lr=config.lr,
                show=lambda step: bar.update(),
            )
        files = features.save(net, folder.folder)
        folder.seal(
            files,
            accuracy=accuracy,
            sha256=module_digest(net),
            shape=list(images.shape),
            classes=images.classes,
        )
        process.say(f"train_classifier: {accuracy:.2%} of the held-out images are named rightly")


if __name__ == "__main__":
    command.command("train_classifier", ClassifierConfig, main, __doc__)
