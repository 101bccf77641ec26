"""Names of projects and runs for Accelerate's trackers."""

from types import SimpleNamespace

from flowmatch.runs.config import StageConfig
from flowmatch.training import trackers


def test_the_project_is_the_experiment_and_the_run_the_stage(tmp_path):
    """The config is stored once, not again where a run resumes."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert trackers.NAMES.keys() <= LOGGER_TYPE_TO_CLASS.keys()
    folder, calls, stored = tmp_path / "digits/flow", [], []
    tracker = SimpleNamespace(name="wandb", store_init_configuration=stored.append)
    accelerator = SimpleNamespace(
        trackers=[tracker], init_trackers=lambda *words, **more: calls.append((words, more))
    )
    for resumed in (False, True):
        trackers.begin(accelerator, folder, StageConfig(run_dir=str(folder)), resumed)
    (words, more), again = calls
    assert words == ("digits",)
    assert more["init_kwargs"]["wandb"] == {"name": "flow"}
    assert more["init_kwargs"]["mlflow"] == {"run_name": "flow"}
    assert again == calls[0]
    assert [values["seed"] for values in stored] == [0]
    (board,) = trackers.choose(["tensorboard"], folder)
    assert (board.run_name, board.logging_dir_param) == ("tensorboard", folder)
    assert trackers.choose(["wandb"], folder) == ["wandb"]
