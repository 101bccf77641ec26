"""Measures of rows on prompts, batch by batch, against the teacher's own run of the same noise.

Nothing but numbers is kept of a batch, so that samples may be large and many.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowmatch.evaluation import features, metrics
from flowmatch.evaluation.comparisons import Comparison, coloured
from flowmatch.evaluation.intervals import mean_interval
from flowmatch.evaluation.judges import ALL, Judge, judged

LARGEST_PSNR = 100.0  # of equal pictures
WINDOW = 11  # pixels: sides of SSIM's window


def spread(x: Tensor, group: int) -> Tensor:
    """Compute the mean distance between the samples of a prompt, a root mean square a latent value.

    Args:
        x: States, [B, ...], `group` consecutive ones of each prompt.
        group: 2 or more.

    Returns:
        [B]: for each sample the mean over all pairs of its prompt's.
    """
    flat = x.flatten(1).double().unflatten(0, (-1, group))
    apart = (flat[:, :, None] - flat[:, None]).square().mean(-1).sqrt()
    return (apart.sum((1, 2)) / (group * (group - 1))).repeat_interleave(group)


def still(pictures: Tensor) -> Tensor:
    """Return pictures [B, C, H, W]: of frames [B, F, C, H, W] the middle one."""
    return pictures if pictures.ndim == 4 else pictures[:, pictures.shape[1] // 2]


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio of pictures in [0, 1], at most 100 dB: [B, ...] -> [B]."""
    return -10 * (x.double() - y.double()).square().flatten(1).mean(1).clamp(min=1e-10).log10()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Compute the structural similarity (Wang et al. 2004) of pictures in [0, 1].

    Args:
        x: [B, C, H, W], or frames [B, F, C, H, W]; sides of more than 10 pixels.
        y: The same shape.

    Returns:
        [B]; of frames the mean.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = x.flatten(0, -4), y.flatten(0, -4)  # frames are pictures
    found = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    assert isinstance(found, Tensor), "without the whole picture"
    return found.reshape(len(x), -1).double().mean(1)


class Scores:
    """The measures of all rows of an evaluation.

    Args:
        group: Samples of a prompt in a batch, consecutive.
        judge: Judges pictures [B, C, H, W] in [-1, 1] by their prompts: names of what is asked for -> 1
            right, 0 wrong, NaN not asked for, [B].
        compared: Comparisons with the teacher's own pictures.
        embedded: Whether features of the pictures are kept, for a distance of sets.
        module: The feature network of that, as `features.embed` takes it.
        device: Where feature networks run.
    """

    def __init__(
        self,
        group: int,
        judge: Judge | None = None,
        compared: Sequence[Comparison] = (),
        embedded: bool = False,
        module: nn.Module | None = None,
        device: torch.device | str = "cpu",
    ):
        self.group, self.judge, self.compared = group, judge, compared
        self.embedded, self.module, self.device = embedded, module, device
        self.columns: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        self.features: dict[str, list[Tensor]] = defaultdict(list)
        self.clusters: list[Tensor] = []
        self._count, self._mean, self._moment = 0, torch.zeros(()), torch.zeros(())

    def begin(
        self, numbers: Tensor, own: Tensor, own_pictures: Tensor | None, prompts: Sequence[str]
    ) -> None:
        """Begin a batch.

        Args:
            numbers: Of the prompts, int64 [B].
            own: States of the teacher's own run, [B, ...].
            own_pictures: Their pictures.
            prompts: Their prompts.
        """
        for comparison in self.compared:
            assert own_pictures is not None, "of the same decoder"
            comparison.begin(coloured(still(own_pictures)), prompts)
        self.clusters.append(numbers)
        self.own, self.own_pictures = own.double(), own_pictures
        for x in self.own.cpu():  # Welford's running moments
            self._count += 1
            gap = x - self._mean
            self._mean = self._mean + gap / self._count
            self._moment = self._moment + gap * (x - self._mean)

    @property
    def deviation(self) -> float:
        """Standard deviation of the teacher's own samples: root of the mean variance of a value."""
        return float((self._moment / max(1, self._count - 1)).mean().sqrt())

    def add(self, row: str, x: Tensor, pictures: Tensor | None, prompts: Sequence[str]) -> None:
        """Measure a batch of a row: its states [B, ...], their pictures and prompts."""
        found: dict[str, Tensor] = {
            "error": (x.double() - self.own).square().flatten(1).mean(1),
        }
        if self.group > 1:
            found["spread"] = spread(x, self.group)
        if pictures is not None:
            assert self.own_pictures is not None, "of the same decoder"
            found["psnr"] = psnr(pictures, self.own_pictures)
            if min(pictures.shape[-2:]) >= WINDOW:
                found["ssim"] = ssim(pictures, self.own_pictures)
            for comparison in self.compared:
                found |= comparison.measure(coloured(still(pictures)))
            wide = (2 * still(pictures) - 1).to(self.device)
            if self.judge is not None:
                found |= judged(self.judge(wide, prompts))
            if self.embedded:
                self.features[row].append(features.embed(wide, self.module))
        for name, values in found.items():
            self.columns[row][name].append(values.detach().double().cpu())

    def rms(self, row: str) -> float:
        """Return the error of a row so far, in standard deviations of the teacher's samples."""
        error = torch.cat(self.columns[row]["error"]).mean().sqrt()
        return float(error) / max(self.deviation, 1e-30)

    def measures(self, row: str, own: str, seed: int) -> dict[str, Any]:
        """Return the measures of a row, each with its interval.

        Args:
            row: Name of the row.
            own: Name of the teacher's own run.
            seed: Of the resamples.
        """
        clusters = torch.cat(self.clusters).numpy()

        def column(name: str, of: str = row) -> np.ndarray:
            return torch.cat(self.columns[of][name]).numpy()

        def interval(*columns: np.ndarray, **how: Any) -> dict[str, float]:
            return mean_interval(np.stack(columns, axis=1), clusters, seed, **how)

        found: dict[str, Any] = {}
        scale = self.deviation
        if row != own:
            found["rms"] = interval(
                column("error"), statistic=lambda means: np.sqrt(means[..., 0]) / scale
            )
        if self.group > 1 and row != own:
            found["diversity"] = interval(
                column("spread"),
                column("spread", own),
                statistic=lambda means: means[..., 0] / means[..., 1],
            )
        for name in self.columns[row]:
            alone = name.startswith(ALL) or name == "clip_text"
            if name in ("error", "spread") or (row == own and not alone):
                continue
            if not np.isnan(column(name)).all():
                found[name] = interval(column(name))
        return found

    def distance(self, row: str, real: Tensor) -> float:
        """Return the Frechet distance of a row to real features, [N, D]."""
        return metrics.frechet(real, torch.cat(self.features[row]))
