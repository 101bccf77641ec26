"""The configs of the evaluations: of images, points and latents, and on prompts."""

from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic

from flowmatch.config import LocalPath, option, required, used
from flowmatch.data.config import DataConfig, PromptsConfig
from flowmatch.flow.config import MOST_STEPS, Fixed, SamplerConfig, SolverConfig
from flowmatch.models.config import CallConfig, Precision
from flowmatch.runs.config import StageConfig

Network = Literal["convolutional", "residual"]  # of a feature network
Task = Literal["classification", "denoising"]


class EvaluateConfig(StageConfig):
    """Config of the evaluation."""

    stage: ClassVar[str] = "evaluate"

    teacher: LocalPath = required(
        "the teacher: a finished training stage, or a diffusers model", run=True
    )
    student: LocalPath = required(
        "the student: a finished training stage, or a diffusers model", run=True
    )
    data: DataConfig = required(
        "real data that the models were trained on; needs labels if a classifier is trained here"
    )
    reference: DataConfig | None = option(
        None, "real data that the models have not seen, to compare with; default: data itself"
    )
    samples: int = option(
        2000, "generated samples a row, and as many real ones; at most all real ones", ge=4
    )
    per_image: float | None = option(
        None,
        "generated samples a row for each real one, in place of samples, which the plan derives from it",
        run=True,
        gt=0,
        le=1,
    )
    steps: list[int] = option([1, 2, 4, 8, 16, 32], "numbers of steps, one row for each")
    solver: SamplerConfig = option(SamplerConfig(), "sampler of the rows")
    student_solver: SamplerConfig | None = option(
        None, "sampler of the student's rows, if it differs"
    )
    converged_solver: Literal[Fixed, "dopri5"] = option(
        "heun", "ODE solver of the reference 'converged', on uniform steps"
    )
    converged_steps: int = option(
        64, "steps of the reference 'converged', for all solvers but dopri5", ge=1, le=MOST_STEPS
    )
    converged_tolerance: float = option(1e-5, "dopri5: rtol and atol of 'converged'", gt=0, lt=1)
    guidance: float = option(1.0, "classifier-free guidance scale; 1 is none")
    compute_batch: int = option(256, "samples integrated together", ge=1)
    precision: Precision = option(
        "fp32", "the networks' arithmetic (tf32: float32, multiplied in fewer bits, on a GPU)"
    )
    distance: Literal["auto", "frechet", "sliced_wasserstein"] = option(
        "auto", "distance of sets; auto: frechet for images, sliced_wasserstein for points"
    )
    features: Literal["classifier", "values", "inception"] = option(
        "classifier",
        "features that images are scored on: those of a classifier, the pixel values themselves, or "
        "Inception's, if its weights are given",
    )
    classifier: LocalPath | None = option(
        None,
        "finished folder of train_classifier; default: a classifier is trained on the data here",
        run=True,
    )
    training_samples: int = option(
        100_000,
        "training images that each sample's nearest neighbour is searched in; at most all of them",
        ge=12,
    )
    inception_weights: LocalPath | None = option(
        None, "file of Inception's weights from torch-fidelity; nothing is downloaded", run=True
    )

    panel: Literal["none", "full"] = option(
        "none",
        "full: also score images in two feature spaces that no loss can have used, by Frechet distance, "
        "precision, recall, density, coverage, distance to training images and diversity, each with a "
        "95% interval",
    )
    judges: list[LocalPath] = option(
        [],
        "with panel=full: finished folders of train_classifier, two or more, with network=residual or "
        "task=denoising; default: two networks are trained on the data here",
        run=True,
        shared=False,
    )

    DERIVED: ClassVar[dict[str, str]] = {"samples": "per_image"}

    def over(self, count: int) -> "EvaluateConfig":
        """Return the config with the samples that `per_image` asks for. count: Of the real ones."""
        if self.per_image is None:
            return self
        return self.model_copy(update={"samples": max(4, round(self.per_image * count))})

    @pydantic.field_validator("judges")
    @classmethod
    def _judged(cls, value: list[str], info: pydantic.ValidationInfo) -> list[str]:
        return used(cls, value, info, "panel", "full")

    @pydantic.field_validator("converged_tolerance")
    @classmethod
    def _used(cls, value: float, info: pydantic.ValidationInfo) -> float:
        return used(cls, value, info, "converged_solver", "dopri5")

    def rows_of(self, name: str) -> tuple[str, SamplerConfig]:
        """Return the key and the config of the sampler of a model's rows. name: teacher or student."""
        if name == "student" and self.student_solver is not None:
            return "student_solver", self.student_solver
        return "solver", self.solver

    def lost(self) -> list[str]:
        """List the pictures, the report and the table that are to be made again."""
        from flowmatch.evaluation import tables

        return tables.lost(Path(self.run_dir))

    @property
    def converged(self) -> SolverConfig:
        """The solver of the reference."""
        solver, tolerance = self.converged_solver, self.converged_tolerance
        own: dict[str, Any] = {"rtol": tolerance, "atol": tolerance} if solver == "dopri5" else {}
        return SolverConfig(name=solver, steps=self.converged_steps, **own)


class EvaluatePromptsConfig(StageConfig):
    """Config of the evaluation on prompts."""

    stage: ClassVar[str] = "evaluate_prompts"

    teacher: LocalPath = required(
        "the teacher: a pipeline that reads text, or a finished training stage of one", run=True
    )
    student: LocalPath | None = option(
        None,
        "the student: a finished reflow with prompts; null measures the teacher alone",
        run=True,
    )
    pipeline: LocalPath | None = option(
        None, "with a run folder as the teacher: the pipeline of its network", run=True
    )
    prompts: PromptsConfig = required("the prompts; those of prompts.held_out are drawn")
    call: CallConfig = option(CallConfig(), "arguments of the pipeline's call, those of the pairs")
    steps: list[int] = option(
        [1, 2, 4], "numbers of steps: a row of the teacher and of the student for each"
    )
    samples: int = option(256, "samples a row: pairs of a prompt and noise", ge=2)
    per_prompt: int = option(
        4, "samples of the same prompt, for the diversity within it; 1 does not measure it", ge=1
    )
    compute_batch: int = option(16, "samples that are run together", ge=1)
    precision: Precision = option(
        "fp32", "the pipeline's arithmetic; bf16: its weights are loaded in bfloat16"
    )
    classifier: LocalPath | None = option(
        None,
        "finished folder of train_classifier on pictures like those of the pipeline: the features of "
        "the distance to reference, and the judge with classes",
        run=True,
    )
    classes: list[str] = option(
        [],
        "a word for each class of classifier, in order: a picture is right if its class is the one "
        "whose word its prompt has",
    )
    judge: str | None = option(
        None,
        "flowmatch.MODULE:FUNCTION that judges pictures [B, C, H, W] in [-1, 1], called with them, "
        "their prompts and the classifier; it returns names and 1 (right), 0, or NaN (not asked for)",
    )
    lpips: Literal["alex", "vgg", "squeeze"] | None = option(
        None,
        "perceptual distance of the pictures to the teacher's own, by this network of torchvision, "
        "whose weights it downloads unless they are in TORCH_HOME",
    )
    dino: LocalPath | None = option(
        None,
        "similarity of the pictures to the teacher's own by an image network of transformers such as "
        "facebook/dinov2-base: a folder, or a name on the hub",
        run=True,
    )
    clip: LocalPath | None = option(
        None,
        "similarity to the teacher's own pictures and to the prompts by a CLIPModel of transformers: "
        "a folder, or a name on the hub such as openai/clip-vit-large-patch14",
        run=True,
    )
    reference: DataConfig | None = option(
        None, "real pictures, of the size that the pipeline makes, for a Frechet distance"
    )
    features: Literal["classifier", "values", "inception"] = option(
        "classifier", "with reference: features of the Frechet distance, as in evaluate"
    )
    inception_weights: LocalPath | None = option(
        None, "file of Inception's weights from torch-fidelity; nothing is downloaded", run=True
    )
    samples_to: LocalPath | None = option(
        None,
        "folder for all pictures, ROW/PROMPT/NUMBER.png with an index.json, for other benchmarks; made "
        "when all are written",
        run=True,
    )

    def lost(self) -> list[str]:
        """List the table and the report, if they are missing; the pictures are made with them."""
        names = ("table.md", "report.html")
        return [name for name in names if not (Path(self.run_dir) / name).is_file()]
