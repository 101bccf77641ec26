"""The config of an evaluation on prompts."""

from typing import ClassVar, Literal

from flowmatch.config import Place, option, required
from flowmatch.data.config import DataConfig, PromptsConfig
from flowmatch.models.config import CallConfig, Precision
from flowmatch.runs.config import StageConfig


class EvaluatePromptsConfig(StageConfig):
    """Config of the evaluation on prompts."""

    stage: ClassVar[str] = "evaluate_prompts"

    teacher: Place = required(
        "the teacher: a pipeline that reads text, or a finished training stage of one", run=True
    )
    student: Place | None = option(
        None,
        "the student: a finished reflow with prompts; null measures the teacher alone",
        run=True,
    )
    pipeline: Place | None = option(
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
    classifier: Place | None = option(
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
    dino: str | None = option(
        None,
        "similarity of the pictures to the teacher's own by an image network of transformers such as "
        "facebook/dinov2-base: a folder, or a name on the hub",
        run=True,
    )
    clip: str | None = option(
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
    inception_weights: Place | None = option(
        None, "file of Inception's weights from torch-fidelity; nothing is downloaded", run=True
    )
    samples_to: Place | None = option(
        None,
        "folder for all pictures, ROW/PROMPT/NUMBER.png with an index.json, for other benchmarks; made "
        "when all are written",
        run=True,
    )
