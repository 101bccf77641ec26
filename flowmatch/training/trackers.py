"""Accelerate's trackers: the project is the experiment, the run is the stage."""

from pathlib import Path
from typing import Any

from flowmatch import config as configs
from flowmatch.config import Config

# what each calls the name of a run; those of the others are fixed by Accelerate
NAMES = {
    **{"wandb": "name", "trackio": "name", "swanlab": "experiment_name", "mlflow": "run_name"},
    "clearml": "task_name",
}


def choose(names: list[str], folder: Path) -> list[Any]:
    """Choose what the Accelerator logs with: TensorBoard writes to `tensorboard` in the run folder.

    Args:
        names: Names of Accelerate's trackers.
        folder: The run folder.
    """
    from accelerate.tracking import TensorBoardTracker

    board = "tensorboard"
    return [TensorBoardTracker(board, folder) if name == board else name for name in names]


def begin(accelerator: Any, folder: Path, config: Config, resumed: bool) -> None:
    """Open the trackers, and give them the config where the run begins.

    Args:
        accelerator: Accelerate's Accelerator, made with `choose`.
        folder: The run folder; EXPERIMENT/STAGE name project and run.
        config: The config of the stage.
        resumed: Whether they have it already.
    """
    project, stage = folder.absolute().parts[-2:]
    accelerator.init_trackers(
        project, init_kwargs={name: {key: stage} for name, key in NAMES.items()}
    )
    if resumed:
        return
    values = configs.flatten(config.model_dump(mode="json"))
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":  # its hparams are a run of their own, beside this one
            if accelerator.is_main_process:
                tracker.writer.add_text("config", f"```yaml\n{configs.dump(config)}```")
        else:
            tracker.store_init_configuration(values)
