"""What every stage has, and the exit codes of a stage."""

from typing import Literal

from flowmatch.config import Config, Place, option, required

PREEMPTED = 75  # EX_TEMPFAIL: what a stage exits with after a signal, its work saved

USER_ERROR = 2


class StageConfig(Config):
    """What every stage has."""

    run_dir: Place = required(
        "the stage's own folder; made if it does not exist", run=True, min_length=1
    )
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "device of the networks; auto uses a GPU if there is one", run=True
    )
    seed: int = option(0, "seed of every random number of the stage", ge=0, lt=2**63)

    def lost(self) -> list[str]:
        """List the files of the sealed folder that are not hashed and are to be made again."""
        return []
