"""The choice of a distance and of the features of images that an evaluation compares."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from flowmatch.config import UserError
from flowmatch.data.dataset import Data
from flowmatch.evaluation import features, metrics
from flowmatch.evaluation.config import EvaluatePromptsConfig
from flowmatch.models.digest import module_digest
from flowmatch.models.teachers import Teacher
from flowmatch.runs import manifest


@dataclass(frozen=True)
class FeatureChoice:
    """The features that samples are scored on."""

    module: nn.Module | None = None  # the feature network; None: the values themselves
    facts: dict[str, Any] = field(default_factory=dict)  # for the protocol
    inputs: dict[str, str] = field(default_factory=dict)  # for the manifest: name -> digest
    untrained: bool = False  # whether a classifier still has to be trained on the data


def choose_distance(distance: str, data: Data) -> str:
    """Return frechet or sliced_wasserstein. distance: one of them, or auto, which follows the data."""
    if distance != "auto":
        return distance
    return "frechet" if data.images else "sliced_wasserstein"


def choose_features(
    name: str, classifier: str | None, inception_weights: str | None, distance: str, data: Data
) -> FeatureChoice:
    """Check the keys that choose the features, and load the feature network if one is given.

    Args:
        name: Value of the key features: classifier, values or inception.
        classifier: Value of the key classifier.
        inception_weights: Value of the key inception_weights.
        distance: What `choose_distance` returned.
        data: Real data.

    Returns:
        The choice; `train` completes it if it is `untrained`.

    Raises:
        UserError: For keys without effect, and for features that do not fit the data.
        NotReady: If the classifier is not sealed yet.
    """
    points = distance == "sliced_wasserstein"  # compares the values themselves
    unused = {}
    if points and name == "inception":
        unused["features"] = name
    if classifier is not None and (points or name != "classifier"):
        unused["classifier"] = classifier
    if inception_weights is not None and (points or name != "inception"):
        unused["inception_weights"] = inception_weights
    if unused:
        why = f"distance={distance}" if points else f"features={name!r}"
        raise UserError(
            [
                f"{key}={given} has no effect with {why}; leave it out"
                for key, given in unused.items()
            ]
        )
    if points:
        return FeatureChoice()
    if not data.images and name != "values":
        raise UserError(
            f"features={name!r} takes images, but the data has shape {list(data.shape)}; use "
            "distance=sliced_wasserstein, or features=values"
        )
    size = math.prod(data.shape)
    wide = size > metrics.WIDEST
    if name == "values":
        if wide:
            raise UserError(
                f"features='values': a Frechet distance takes at most {metrics.WIDEST} values per "
                f"sample, the data has {size}; {_alternatives(data)}"
            )
        return FeatureChoice()
    if name == "inception":
        module = features.Inception(inception_weights)
        return FeatureChoice(module, inputs={"inception": module_digest(module)})
    if classifier is not None:
        net, facts = features.load(classifier, "classifier", data.shape)
        inputs = {"classifier": manifest.digest(classifier)}
        return FeatureChoice(net, {"held_out_accuracy": facts["accuracy"]}, inputs)
    if data.label is None:
        other = _alternatives(data) if wide else "use features=values"
        raise UserError(
            f"features='classifier' needs data.labels=true, or classifier= (or {other})"
        )
    features.check_images(data, "data")
    return FeatureChoice(untrained=True)


def choose_for_pictures(
    config: EvaluatePromptsConfig, real: Data | None, shape: tuple[int, ...], reason: str
) -> FeatureChoice:
    """Choose the features of the distance to the reference."""
    if real is None:
        return FeatureChoice()
    if shape[-3:] != real.shape:
        made = reason or f"the pipeline makes {list(shape)}"
        raise UserError(
            f"reference: holds {list(real.shape)}; {made}; set reference.size and reference.channels"
        )
    classifier = config.classifier if config.features == "classifier" else None
    words = (config.features, classifier, config.inception_weights)
    choice = choose_features(*words, "frechet", real)
    if choice.untrained:
        raise UserError(
            "reference with features=classifier needs classifier=, a finished folder of "
            "train_classifier; or use features=values, or features=inception with its weights"
        )
    return choice


def train(
    choice: FeatureChoice, data: Data, seed: int, models: dict[str, Teacher]
) -> FeatureChoice:
    """Train the classifier of a choice that needs one; return any other choice as it is.

    Args:
        choice: What `choose_features` returned.
        data: Labelled images.
        seed: Of the training.
        models: The models to be scored.

    Raises:
        UserError: If `check_independent` rejects the classifier.
    """
    if not choice.untrained:
        return choice
    net, accuracy = features.train_classifier(replace(data, flip=False), seed)
    check_independent(net, models)
    return FeatureChoice(net, {"held_out_accuracy": accuracy}, choice.inputs)


def check_independent(
    module: nn.Module | None, models: dict[str, Teacher], key: str = "classifier"
) -> None:
    """Check that no model was trained with a loss on the features that are to score it.

    Args:
        module: The feature network; None: the values themselves.
        models: The models to be scored, by key.
        key: Name of the config key of the network, for errors.

    Raises:
        UserError: If one was.
    """
    digest = features.VALUES if module is None else module_digest(module)
    what = "values" if module is None else "classifier that is to score it"
    for name, model in models.items():
        if digest in model.features:
            raise UserError(
                f"{name} was trained with a loss on the same {what}, which makes it look better than it "
                f"is; use another {key}= (another seed)"
            )


def _alternatives(data: Data) -> str:
    """Name the features that suit data with too many values for a Frechet distance."""
    if not data.images:
        return "use distance=sliced_wasserstein"
    return (
        "use features=inception with inception_weights=FILE, or features=classifier with "
        "classifier=FOLDER, sealed by train_classifier on labelled images of this size"
    )
