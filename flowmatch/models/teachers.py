"""Teachers: the networks that generate pairs, and from whose weights reflow starts."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from flowmatch.config import NotReady, UserError, step_words
from flowmatch.flow import grids
from flowmatch.models import networks, two_time
from flowmatch.models.diffusion import (
    HUB_NAME,
    Diffusion,
    DiffusionVelocity,
    own_classes,
    read_index,
    read_pipeline,
)
from flowmatch.models.digest import network_digest
from flowmatch.models.velocity import Velocity, classes_of, sample_shape
from flowmatch.runs import checkpoints, manifest

TRAINED = ("train_flow", "reflow", "finish")
OWN_WEIGHTS = (
    "weights alone do not say their network: build it, load them, save_pretrained() a folder and name "
    "that"
)
NETS = ("net", "net_2")  # folders of a training stage: EMA weights, and those of a second width


@dataclass(frozen=True)
class Teacher:
    """A network and its facts.

    Attributes:
        net: A diffusers model, float32, in eval mode.
        digest: Hash of weights and config, and of the diffusion of its training.
        round: 0 after an independent coupling, k after k reflows.
        diffusion: None for a flow model in diffusers' convention.
        for_steps: Numbers of Euler steps that it was trained for, at the times of these alone; its
            output at other times means nothing. Empty where it was trained at all times.
        windows: Equal Euler steps that it was trained for (segments); None for any number.
        features: sha256 of each classifier that a loss of its training used.
        samples: Number of samples that it was trained on, if it says so.
        names: Of its classes, if they have names.
        latents: Set if its samples are latents: how they are scaled and the digest of their VAE, as in
            `Autoencoder.facts`; empty where that is not known.
    """

    net: Any
    digest: str
    round: int
    diffusion: Diffusion | None = None
    for_steps: tuple[int, ...] = ()
    features: tuple[str, ...] = ()
    samples: int | None = None
    names: tuple[str, ...] | None = None
    latents: dict[str, Any] | None = None
    windows: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample, [C, H, W] or [D]."""
        return sample_shape(self.net)

    @property
    def classes(self) -> int | None:
        """Number of classes K, or None."""
        return classes_of(self.net) if self.diffusion is None else own_classes(self.net)

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest of its pairs holds, beyond what it holds for a plain flow model."""
        facts: dict[str, Any] = {"features": sorted(self.features)} if self.features else {}
        facts |= self.student_facts
        if self.diffusion is not None:
            facts |= {"diffusion": self.diffusion.facts, "span": list(self.velocity().span)}
        return facts

    def field(self, net: Any) -> Callable[[Any], Velocity]:
        """Return what makes the velocity of a student of `net`, or of its wrapper, in training."""
        return Velocity

    def own_velocity(self, net: Any, guidance: float = 1.0) -> Velocity:
        """Return the velocity of `net`, which predicts what the teacher's own network does."""
        return replace(self, net=net).velocity(guidance)

    @property
    def can_sample(self) -> bool:
        """Whether few Euler steps of its network, as it is, are those of a student."""
        return self.diffusion is None

    @property
    def student_facts(self) -> dict[str, Any]:
        """What the manifests of its pairs and of a student hold of it."""
        facts: dict[str, Any] = {}
        if self.names:
            facts["id2label"] = {str(k): name for k, name in enumerate(self.names)}
        return facts if self.latents is None else facts | {"latents": self.latents}

    @property
    def lines(self) -> list[str]:
        """What a plan says of it beside its network: nothing."""
        return []

    @property
    def two_times(self) -> bool:
        """Whether it predicts average velocities, from one time to another (MeanFlow)."""
        return self.diffusion is None and two_time.argument(self.net) is not None

    @property
    def one_step(self) -> bool:
        """Whether it was trained at t = 0 alone."""
        return self.for_steps == (1,)

    def student_grid(self, steps: int) -> Tensor:
        """Return the times of so many Euler steps of a student of it, float64 [steps + 1]."""
        return grids.uniform_grid(steps)

    def check_teaches(self, key: str) -> None:
        """Check that it has a flow to follow.

        Raises:
            UserError: It was trained at the times of few steps alone; the message begins with `key`.
        """
        if self.for_steps:
            raise UserError(
                f"{key}= is for {step_words(self.for_steps)} only: it was trained at their times alone "
                "and has no flow to follow; use the reflow that it started from"
            )

    def export_steps(self, steps: list[int], typed: bool) -> list[int]:
        """Choose the numbers of steps of an export.

        Args:
            steps: Those of its config.
            typed: Whether the user gave them; where not, those that it is for take their place.

        Raises:
            UserError: It is for other numbers of steps, or for the equal steps of its windows.
        """
        n, known = self.windows, list(self.for_steps)
        own = known or [n] * (n is not None)  # type: ignore[list-item]
        if own and not typed:
            return own
        if known and not set(steps) <= set(known):
            raise UserError(
                f"steps={steps}: the student is for {step_words(known)} only; use steps={known}"
            )
        if n and any(number % n for number in steps):
            raise UserError(
                f"steps={steps}: the student is straight in each of {n} windows "
                f"(objective.name=segments); use steps=[{n}], or multiples"
            )
        return steps

    def velocity(self, guidance: float = 1.0) -> Velocity:
        """Build its velocity field.

        Raises:
            UserError: It cannot be guided, and `guidance` is not 1.
        """
        if self.diffusion is None:
            return Velocity(self.net, guidance)
        return DiffusionVelocity(self.net, self.diffusion, guidance)


def steps_of(facts: dict[str, Any], old: bool = False) -> tuple[int, ...]:
    """Return `Teacher.for_steps` of the facts of a manifest. old: one_step, where they do not say."""
    return tuple(facts.get("for_steps") or [1] * facts.get("one_step", old))


def run_of(folder: str | os.PathLike[str]) -> tuple[Path, str]:
    """Split a path into a run folder and the name of a network in it; a run folder alone means `net`."""
    folder = Path(folder)
    if folder.name in NETS and manifest.sealed(folder.parent):
        return folder.parent, folder.name
    return folder, NETS[0]


def checkpoint_of(folder: str | os.PathLike[str]) -> Path | None:
    """Return the checkpoint that a path names, itself or by its folder `net_2`; None for any other."""
    path = Path(folder)
    step = path.parent if path.name in NETS else path
    return step if (step / checkpoints.INDEX).is_file() else None


def read_made(path: str | os.PathLike[str], key: str) -> dict[str, Any]:
    """Read what a training stage says of its network: stage, config, inputs, facts.

    Args:
        path: A sealed run folder, its folder `net_2`, or a checkpoint.
        key: Name of the config's key, for the messages.

    Returns:
        The manifest, or the index of the checkpoint.

    Raises:
        UserError: It is damaged, or of another stage.
        NotReady: It is not sealed.
    """
    step = checkpoint_of(path)
    if step is None:
        return manifest.read(run_of(path)[0], key, TRAINED)
    try:
        return checkpoints.read_index(step)
    except checkpoints.Unsound as error:
        raise UserError(f"{key}={path}: {error}; use another checkpoint") from None


def load_made(path: str | os.PathLike[str], key: str, made: dict[str, Any]) -> Any:
    """Load the averaged network of a training stage, after a check of its hashes.

    Args:
        path: As for `read_made`.
        key: Name of the config's key, for the messages.
        made: From `read_made`.

    Returns:
        The network.

    Raises:
        UserError: A file is missing or damaged.
    """
    step = checkpoint_of(path)
    if step is None:
        run, name = run_of(path)
        manifest.verify(run, key, made)
        return networks.load(run / name, key)
    inside = Path(path).relative_to(step)
    if str(inside / "config.json") not in made["files"]:
        raise UserError(f"{key}={path} holds an adapter alone; use its run once it has finished")
    files = [name for name in made["files"] if Path(name).parent == inside]
    try:
        checkpoints.verify(step, made, files)
    except checkpoints.Unsound as error:
        raise UserError(f"{key}={path}: {error}; use another checkpoint") from None
    return networks.load(path, key)


def load(path: str | os.PathLike[str], key: str) -> Teacher:
    """Load a teacher.

    Args:
        path: A sealed run folder of a training stage, whose EMA weights (`net/`) are loaded and checked
            against their hashes, or its folder `net_2`, the weights of a second width; a checkpoint
            (RUN/checkpoints/step_N) of such a stage, finished or not, likewise; a diffusers
            pipeline, a flow model or a diffusion model according to its scheduler; or a diffusers
            model, a flow model in diffusers' convention (timestep 1000 sigma, output noise - data).
            Pipelines and models may be names on the hub.
        key: Name of the config's key, for the messages.

    Returns:
        The teacher.

    Raises:
        UserError: It cannot be loaded, or cannot be a teacher.
        NotReady: The folder does not exist or is not sealed.
    """
    folder = Path(path)
    if not folder.is_dir() and HUB_NAME.fullmatch(str(path)):
        try:
            index = read_index(path, key)
        except NotReady:
            return _flow(networks.load(path, key), f"{key}={path}")
        return _pipeline(path, key, index)
    run, _ = run_of(folder)
    if folder.is_file():
        raise UserError(f"{key}={path} is a file; {OWN_WEIGHTS}")
    if (folder / "model_index.json").is_file():
        found = _pipeline(path, key, read_index(path, key))
        sealed = manifest.find(folder, key, ("export",))
        return found if sealed is None else _exported(found, folder, key, sealed)
    step = checkpoint_of(folder)
    if (folder / "config.json").is_file() and run == folder and step is None:
        return _flow(networks.load(path, key), f"{key}={path}")
    names = [file.name for file in folder.glob("[!.]*")]
    if names and run == folder and step is None and not {manifest.NAME, "config.yaml"} & set(names):
        raise UserError(
            f"{key}={path} holds neither {manifest.NAME} (a finished stage), config.json (a diffusers "
            f"model) nor model_index.json (a pipeline); {OWN_WEIGHTS}"
        )
    made = read_made(path, key)
    facts, net = made["facts"], load_made(path, key, made)
    return Teacher(
        net,
        network_digest(net),
        facts["round"],
        for_steps=steps_of(facts),
        features=tuple(facts.get("features", ())),
        samples=facts.get("samples"),
        names=names_of(facts),
        latents=facts.get("latents"),
        windows=facts.get("windows"),
    )


def names_of(facts: dict[str, Any]) -> tuple[str, ...] | None:
    """Return the names of the classes in the facts of a manifest."""
    known = facts.get("id2label")
    return None if known is None else tuple(str(known.get(str(k), k)) for k in range(len(known)))


def _exported(found: Teacher, folder: Path, key: str, sealed: dict[str, Any]) -> Teacher:
    """Return the network of an export with the facts of its training."""
    manifest.verify(folder, key, sealed)
    facts, index = sealed["facts"], read_index(folder, key)
    # exports of 0.1.0 do not say so; a DDPMPipeline's own scheduler is this one for one step only
    euler = index.get("scheduler", [""])[-1] == "FlowMatchEulerDiscreteScheduler"
    old = euler and index.get("_class_name") == "DDPMPipeline"
    return replace(
        found,
        round=facts["round"],
        for_steps=steps_of(facts, old),
        features=tuple(facts.get("features", ())),
        names=names_of(facts),
        latents=facts.get("latents"),
        windows=facts.get("windows"),
    )


def _flow(net: Any, where: str) -> Teacher:
    networks.check_inputs(type(net), where)
    return Teacher(net, network_digest(net), 0)


def _pipeline(path: str | os.PathLike[str], key: str, index: dict[str, Any]) -> Teacher:
    net, diffusion = read_pipeline(path, key, index)
    if diffusion is None:
        return _flow(net, f"{key}={path}")
    networks.check_inputs(type(net), f"{key}={path}")
    if net.config.out_channels not in (net.config.in_channels, 2 * net.config.in_channels):
        raise UserError(
            f"{key}={path}: its network has {net.config.out_channels} output channels for "
            f"{net.config.in_channels}; expected as many, or twice as many (with a variance)"
        )
    facts = {"net": network_digest(net), "diffusion": diffusion.facts}
    return Teacher(net, manifest.fingerprint(facts), 0, diffusion)
