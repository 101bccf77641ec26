"""The progress bar of a training run."""

import time
from typing import Any

from flowmatch.runs.process import bar_options
from flowmatch.training.config import FitConfig


class Bar:
    """A progress bar on rank 0, with the loss and images per second."""

    def __init__(self, config: FitConfig, start: int):
        from tqdm import tqdm

        self.batch_size, self.began, self.seen = config.batch_size, time.perf_counter(), 0
        self.bar = tqdm(total=config.steps, initial=start, unit="step", **bar_options())

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()

    def advance(self) -> None:
        """Count one update."""
        self.seen += self.batch_size
        self.bar.update()

    def rate(self) -> float:
        """Return the images per second since the last call."""
        now = time.perf_counter()
        rate, self.began, self.seen = self.seen / (now - self.began), now, 0
        return round(rate, 1)

    def pause(self, seconds: float) -> None:
        """Leave some seconds out of the rate."""
        self.began += seconds

    def show(self, values: dict[str, float]) -> None:
        """Show the values of a line of the log beside the bar."""
        shown = [f"loss {values['loss']:.4f}", f"{values['images_per_second']:.0f} images/s"]
        if "mfu" in values:
            shown.append(f"{values['mfu']:.0%} of the peak")
        shown.append(f"{values['memory_gb']:.1f} GB")
        self.bar.set_postfix_str(", ".join(shown), refresh=False)
