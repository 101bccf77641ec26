"""The feature spaces of a panel: networks that no loss can take, given as folders or trained here."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flowmatch.config import UserError, together
from flowmatch.data.dataset import Data
from flowmatch.evaluation import encoders, features
from flowmatch.evaluation.config import EvaluateConfig, Network, Task
from flowmatch.evaluation.encoders import Encoder
from flowmatch.evaluation.feature_choice import check_independent
from flowmatch.models.digest import module_digest
from flowmatch.models.teachers import Teacher
from flowmatch.runs import manifest


@dataclass(frozen=True)
class Space:
    """A feature space.

    name: in metrics.json. seed: of its training here. module: None until it is trained. facts: for
    metrics.json. inputs: for the manifest, name -> digest.
    """

    name: str
    network: Network
    task: Task
    seed: int = 0
    module: Encoder | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)

    @property
    def net(self) -> Encoder:
        """The trained network."""
        assert self.module is not None
        return self.module


def choose(config: EvaluateConfig, data: Data, models: dict[str, Teacher]) -> list[Space]:
    """Choose the spaces of a panel.

    Args:
        config: Of the evaluation. Without `judges`, a residual classifier and a denoising autoencoder
            are trained by `train`, or two autoencoders where there are no labels.
        data: Training images.
        models: The models to be scored.

    Returns:
        The spaces; none if the config asks for no panel.

    Raises:
        UserError: For fewer than two spaces, for equal ones, and for one that a loss has used or may
            use.
        NotReady: For a folder that is not sealed yet.
    """
    judges = config.judges
    if config.panel == "none":
        return []
    if not data.images:
        raise UserError(
            f"panel=full takes images, but the data has shape {list(data.shape)}; leave panel out"
        )
    if not judges:
        labelled = data.label is not None
        features.check_images(data, "data", labels=False)
        tasks: list[tuple[str, Network, Task]] = [
            ("classifier", "residual", "classification")
            if labelled
            else ("autoencoder_2", "convolutional", "denoising"),
            ("autoencoder", "residual", "denoising"),
        ]
        return [Space(*words, seed=config.seed + 2 + i) for i, words in enumerate(tasks)]
    if len(judges) < 2:
        raise UserError(f"judges={[*judges]}: expected two or more folders of train_classifier")
    spaces = together(
        *(lambda i=i, path=path: _opened(i, path, data, models) for i, path in enumerate(judges))
    )
    seen: dict[str, str] = {}
    for i, (path, space) in enumerate(zip(judges, spaces, strict=True)):
        digest = space.facts["sha256"]
        if digest in seen:
            raise UserError(f"judges: {seen[digest]} and {path} hold the same network")
        seen[digest] = path
        taken = [other.name for other in spaces[:i]]
        if space.name in taken:
            name = next(n for k in range(2, i + 3) if (n := f"{space.name}_{k}") not in taken)
            spaces[i] = replace(space, name=name)
    return spaces


def _opened(i: int, path: str, data: Data, models: dict[str, Teacher]) -> Space:
    key = f"judges[{i}]"
    net, facts = encoders.load(path, key, data.shape)
    check_independent(net, models, key)
    task = facts["task"]
    name = "classifier" if task == "classification" else "autoencoder"
    kept = ("network", "task", encoders.MEASURED[task], "sha256")
    told = {str(key): facts[key] for key in kept}
    inputs = {f"judges.{i}": manifest.digest(Path(path))}
    return Space(name, facts["network"], task, module=net, facts=told, inputs=inputs)


def train(spaces: Sequence[Space], data: Data, models: dict[str, Teacher]) -> list[Space]:
    """Train the networks of the spaces that have none.

    Args:
        spaces: What `choose` returned.
        data: Training images.
        models: The models to be scored.

    Raises:
        UserError: If a loss has used one of them.
    """
    found = []
    for space in spaces:
        if space.module is None:
            unflipped = replace(data, flip=False)
            net, measured = encoders.train(unflipped, space.seed, space.network, space.task)
            check_independent(net, models, "panel")
            facts = {
                "network": space.network,
                "task": space.task,
                encoders.MEASURED[space.task]: measured,
                "sha256": module_digest(net),
            }
            space = replace(space, module=net, facts=facts)
        found.append(space)
    return found


def lines(spaces: Sequence[Space], data: Data, judges: Sequence[str]) -> list[str]:
    """Write the plan of a panel."""
    told = ", ".join(f"{space.network} {space.task}" for space in spaces)
    how = "of judges" if judges else "trained here"
    found = [f"panel of {len(spaces)} feature spaces, {how}: {told}"]
    if not any(space.task == "classification" for space in spaces):
        why = "data has no labels" if data.label is None else "no judge is a classifier"
        found.append(f"panel: {why}: the diversity is that of all samples, not within a class")
    return found
