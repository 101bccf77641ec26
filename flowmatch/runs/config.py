"""What every stage has, and the exit codes of a stage."""

from typing import Any, ClassVar, Literal

from flowmatch.config import Config, Place, option, required

PREEMPTED = 75  # EX_TEMPFAIL: what a stage exits with after a signal, its work saved

USER_ERROR = 2


class StageConfig(Config):
    """What every stage has."""

    run_dir: Place = required(
        "the stage's own folder; made if it does not exist", run=True, min_length=1
    )
    others: ClassVar[tuple[str, ...]] = ()  # devices beside cpu and cuda that the stage takes
    device: Literal["auto", "cpu", "cuda", "xpu", "mps"] = option(
        "auto",
        "device of the networks; auto uses a GPU of CUDA if there is one, else in one process of flow, "
        "pairs and reflow an Intel GPU (xpu) or Apple's (mps), on which flowmatch is not tested",
        run=True,
    )
    seed: int = option(0, "seed of every random number of the stage", ge=0, lt=2**63)

    DERIVED: ClassVar[dict[str, str]] = {}  # key -> the key that it is derived from, both dotted

    def as_written(self, written: "StageConfig") -> "StageConfig":
        """Take over what was derived from the data when the folder's config.yaml was written."""
        found: StageConfig = self
        for key, source in self.DERIVED.items():
            *way, last = key.split(".")
            ours, theirs = self, written
            for part in way:
                ours, theirs = getattr(ours, part), getattr(theirs, part)
            name = source.rpartition(".")[2]
            asked = getattr(ours, name)
            if asked is not None and asked == getattr(theirs, name):
                value: Any = ours.model_copy(update={last: getattr(theirs, last)})
                found = found.model_copy(update={way[0]: value}) if way else value
        return found

    def lost(self) -> list[str]:
        """List the files of the sealed folder that are not hashed and are to be made again."""
        return []
