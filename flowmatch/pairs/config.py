"""The config of stage two, and of its sets where they are read."""

import math
from typing import Any, ClassVar, Literal

import pydantic

from flowmatch.config import Config, LocalPath, Place, UserError, option, required
from flowmatch.data.config import DataConfig, PromptsConfig
from flowmatch.flow.config import SolverConfig
from flowmatch.models.config import CallConfig, Precision
from flowmatch.runs.config import StageConfig
from flowmatch.runs.process import OTHERS


class PairsConfig(StageConfig):
    """Config of stage two."""

    stage: ClassVar[str] = "generate_pairs"
    others: ClassVar[tuple[str, ...]] = OTHERS

    teacher: LocalPath = required(
        "a finished training stage (its EMA weights), a diffusers flow model, or a diffusers pipeline "
        "whose network predicts noise, data or v; with prompts, any pipeline that reads them",
        run=True,
    )
    pipeline: LocalPath | None = option(
        None, "with prompts and a run folder as the teacher: the pipeline of its network", run=True
    )
    prompts: PromptsConfig | None = option(None, "the prompts of a pipeline that reads text")
    call: CallConfig = option(
        CallConfig(),
        "with prompts: arguments of the pipeline's call, such as height, num_inference_steps or "
        "guidance_scale",
    )
    data: DataConfig | None = option(
        None,
        "invert this data: pair i is item i and its noise; default: generate from noise",
        shared=False,
    )
    per_image: float | None = option(
        None,
        "pairs for each sample that the teacher was trained on, in place of shards, which the plan "
        "derives from it",
        run=True,
        gt=0,
    )
    shards: int = option(
        0,
        "number of shards; more of them extend a finished set (required without per_image)",
        run=True,
        validate_default=True,
        le=10**6,
    )
    shard_size: int = option(16384, "pairs in a shard, the unit of work", ge=1)
    block: int = option(
        64, "pairs in a tar member; choose it so that a member has 0.25 to 4 MB", ge=1
    )
    compute_batch: int = option(256, "pairs integrated together; changes rounding", ge=1)
    solver: SolverConfig = option(
        SolverConfig(), "solver of the teacher's ODE; with prompts the default is own"
    )
    guidance: float = option(
        1.0,
        "classifier-free guidance scale w of the pairs; 1 disables guidance, other values double the "
        "evaluations",
    )
    dtype: Literal["float16", "float32"] = option(
        "float16", "stored dtype; float32 is needed with data", validate_default=True
    )
    precision: Precision = option(
        "fp32",
        "the network's arithmetic (tf32: float32, multiplied in fewer bits, on a GPU); the state that "
        "the solver carries stays float32",
    )
    compile: bool = option(
        False,
        "compile the network with torch.compile; changes rounding, so use it for all workers or none",
        run=True,
    )
    x0: Literal["stored", "drawn"] = option(
        "stored",
        "drawn: leave the noise out of the tars, which halves them; flowmatch draws it again from the "
        "seed, other readers cannot",
    )
    states: list[float] = option(
        [],
        "rising times in (0, 1) at which the state of the teacher's path is kept beside x0 and x1, "
        "without further evaluations; each a time of the solver's grid, or of the own run, to 0.001",
    )
    lease_seconds: float = option(
        60.0, "seconds after which the shard of a silent worker is taken over", run=True, gt=0
    )

    DERIVED: ClassVar[dict[str, str]] = {"shards": "per_image"}

    @pydantic.field_validator("shards")
    @classmethod
    def _given(cls, shards: int, info: pydantic.ValidationInfo) -> int:
        if shards < 1 and (shards < 0 or info.data.get("per_image", 1) is None):
            raise ValueError("expected 1 or more; set shards, or per_image")
        return shards

    def over(self, count: int | None) -> "PairsConfig":
        """Return the config with the shards that `per_image` asks for.

        Args:
            count: Samples that the teacher was trained on; None where it does not say.

        Raises:
            UserError: `shards` is given, too, and is another number, or the count is not known.
        """
        if self.per_image is None:
            return self
        if count is None:
            raise UserError(
                f"per_image={self.per_image:g}: teacher={self.teacher} does not say how many samples it "
                "was trained on; set shards"
            )
        shards = max(1, math.ceil(self.per_image * count / self.shard_size))
        if self.shards not in (0, shards):
            raise UserError(
                f"per_image={self.per_image:g} of {count:,} samples are {shards} shards, and "
                f"shards={self.shards}; leave one of them out"
            )
        return self.model_copy(update={"shards": shards})

    @pydantic.model_validator(mode="before")
    @classmethod
    def _own_by_default(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("prompts") and not values.get("solver"):
            return values | {"solver": {"name": "own"}}
        return values

    @pydantic.field_validator("dtype")
    @classmethod
    def _exact(cls, dtype: str, info: pydantic.ValidationInfo) -> str:
        if info.data.get("data") is not None and dtype != "float32":
            raise ValueError("the noise of inverted data cannot be drawn again; set dtype=float32")
        return dtype

    @pydantic.field_validator("states")
    @classmethod
    def _rising(cls, states: list[float]) -> list[float]:
        if [0.0, *states, 1.0] != sorted({0.0, *states, 1.0}):
            raise ValueError("expected times between 0 and 1, each larger than the one before")
        return states

    @pydantic.model_validator(mode="after")
    def _of_prompts(self) -> "PairsConfig":
        if self.prompts is None:
            wrong = ["call"] if self.call.model_extra else []
            wrong += ["pipeline"] if self.pipeline else []
            wrong += ["solver.name=own"] if self.solver.name == "own" else []
        else:
            wrong = ["data", "compile"] if self.data is not None or self.compile else []
            wrong += ["guidance"] if self.solver.name == "own" and self.guidance != 1 else []
        if self.data is not None and self.x0 == "drawn":
            raise ValueError(
                "x0=drawn: the noise of inverted data cannot be drawn again; leave it out"
            )
        if wrong and self.prompts is None:
            raise ValueError(
                f"{', '.join(wrong)}: for a pipeline that reads text; set prompts, too"
            )
        if wrong:
            raise ValueError(
                f"{' or '.join(wrong)}: not with prompts and solver.name={self.solver.name}; leave it "
                "out (guidance of an own run is an argument of call)"
            )
        return self


class PairsEntry(Config):
    """One set of pairs."""

    called: ClassVar[str] = "path"

    path: Place = required(
        "folder of a finished set of pairs, or a URL such as s3://BUCKET/PREFIX", run=True
    )
    weight: float = option(1.0, "share of each batch, relative to the other sets", gt=0)
    group: int = option(
        0,
        "shards that are shuffled together: a pass over the set touches each shard once, and two "
        "groups of a URL must fit into its cache; 0: all of them",
        ge=0,
    )
    truncate: float = option(
        0.0,
        "share of the pairs that is left out of training: those with the largest |x1 - x0|^2, found "
        "in one pass over the whole set at the start of each process",
        ge=0,
        lt=1,
    )
    held_out: int = option(
        0,
        "last pairs of the set that training does not see: for the held-out loss of fit.sample_every",
        ge=0,
    )
    cache: LocalPath | None = option(
        None, "folder in which tars of a URL are kept (default: ~/.cache/flowmatch/pairs)", run=True
    )
    cache_gb: float | None = option(
        None,
        "size limit of that cache in 10^9 bytes; the least recently used tars are removed first "
        "(default: nine tenths of the free space, shared equally by all sets without a limit)",
        run=True,
        gt=0,
    )
