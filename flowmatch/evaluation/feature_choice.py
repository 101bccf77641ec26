"""Who judges an evaluation: the distance of sets and the features of images, chosen beforehand."""

import math
from dataclasses import dataclass, replace
from typing import Any

from flowmatch.config import UserError
from flowmatch.data.dataset import Data
from flowmatch.evaluation import features, metrics
from flowmatch.models import teachers
from flowmatch.models.digest import module_digest
from flowmatch.runs import manifest


@dataclass(frozen=True)
class FeatureChoice:
    """What images are scored on. module: None for the values, or for a classifier to be trained."""

    module: Any
    facts: dict[str, Any]


def kind_of(distance: str, real: Data) -> str:
    """Choose the distance."""
    if distance != "auto":
        return distance
    return "frechet" if real.images else "sliced_wasserstein"


def look_of(config: Any, real: Data, kind: str, inputs: dict[str, str]) -> FeatureChoice:
    """Load what images are scored on, but for a classifier that is to be trained; name the input.

    config: of an evaluation. Raises UserError where it names what is not looked at, or where what it
    names cannot look at the data.
    """
    name, classifier, weights = config.features, config.classifier, config.inception_weights
    points = kind == "sliced_wasserstein"  # are scored as they are
    unused = {}
    if points and name == "inception":
        unused["features"] = name
    if classifier is not None and (points or name != "classifier"):
        unused["classifier"] = classifier
    if weights is not None and (points or name != "inception"):
        unused["inception_weights"] = weights
    if unused:
        by = f"distance={kind}" if points else f"features={name!r}"
        raise UserError(
            [f"{key}={given} is not looked at: {by}; leave it out" for key, given in unused.items()]
        )
    if points:
        return FeatureChoice(None, {})
    if not real.images and name != "values":
        raise UserError(
            f"features={name!r} looks at images; the data holds {list(real.shape)}, which are none: "
            "use distance=sliced_wasserstein, or features=values"
        )
    wide = math.prod(real.shape) > metrics.WIDEST
    if name == "values" and wide:
        raise UserError(
            f"features='values': a Frechet distance takes {metrics.WIDEST} values a sample, the data "
            f"has {math.prod(real.shape)}; {_ways(real)}"
        )
    if name == "inception":
        module: Any = features.Inception(weights or "(not given)")
        inputs["inception"] = module_digest(module)
        return FeatureChoice(module, {})
    if name == "values":
        return FeatureChoice(None, {})
    if classifier is not None:
        module, facts = features.load(classifier, "classifier", real.shape)
        inputs["classifier"] = manifest.digest(classifier)
        return FeatureChoice(module, {"held_out_accuracy": facts["accuracy"]})
    if real.label is None:
        other = _ways(real) if wide else "use features=values"
        raise UserError(
            f"features='classifier' needs data.labels=true, or classifier= (or {other})"
        )
    features.check_images(real, "data")
    return FeatureChoice(None, {})


def taught(
    look: FeatureChoice, config: Any, kind: str, real: Data, models: dict[str, teachers.Teacher]
) -> FeatureChoice:
    """Train the classifier that samples are to be scored on, where the evaluation names none.

    Raises UserError where a model was trained to please that very one.
    """
    if kind != "frechet" or config.features != "classifier" or look.module is not None:
        return look
    net, accuracy = features.train_classifier(replace(real, flip=False), config.seed)
    refuse_own(net, models)
    return FeatureChoice(net, {"held_out_accuracy": accuracy})


def _ways(real: Data) -> str:
    """Say on what features data can be scored that is too wide for its values."""
    if not real.images:
        return "use distance=sliced_wasserstein"
    return (
        "give features=inception with inception_weights=FILE, or features=classifier with "
        "classifier=FOLDER, sealed by train_classifier on labelled images of this size"
    )


def refuse_own(module: Any, models: dict[str, teachers.Teacher]) -> None:
    """Raise UserError where a model was trained to please the features that are to score it."""
    judge = module_digest(module)
    for name, model in models.items():
        if judge in model.features:
            raise UserError(
                f"{name} was trained with loss.features on the very classifier that is to score it, "
                "and would look better than it is; score it on another (classifier=, of another seed)"
            )
