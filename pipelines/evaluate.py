"""Evaluation: quality against number of evaluations, of teacher and student, on the same noise.

The noise comes from a stream of its own: a student scored on the noise of its pairs looks better than
it is. Every distance stands beside the distance of real data to real data.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pydantic

from flowmatch.config import (
    LocalPath,
    UserError,
    dump,
    option,
    require,
    required,
    together,
    used,
)
from flowmatch.data.config import DataConfig
from flowmatch.flow.config import Fixed, SamplerConfig, SolverConfig
from flowmatch.models.config import Precision
from flowmatch.runs import command, folder, process
from flowmatch.runs.config import StageConfig

if TYPE_CHECKING:
    from flowmatch.data.dataset import Data
    from flowmatch.evaluation.feature_choice import FeatureChoice
    from flowmatch.evaluation.sampling import SampledRow, Sampler
    from flowmatch.models.teachers import Teacher


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
    steps: list[int] = option([1, 2, 4, 8, 16, 32], "numbers of steps, one row for each")
    solver: SamplerConfig = option(SamplerConfig(), "sampler of the rows")
    student_solver: SamplerConfig | None = option(
        None, "sampler of the student's rows, if it differs"
    )
    converged_solver: Literal[Fixed, "dopri5"] = option(
        "heun", "ODE solver of the reference 'converged', on uniform steps"
    )
    converged_steps: int = option(
        64, "steps of the reference 'converged', for all solvers but dopri5", ge=1
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

    @pydantic.field_validator("converged_tolerance")
    @classmethod
    def _used(cls, value: float, info: pydantic.ValidationInfo) -> float:
        return used(cls, value, info, "converged_solver", "dopri5")

    def rows_of(self, name: str) -> tuple[str, SamplerConfig]:
        """Return the key and the config of the sampler of a model's rows. name: teacher or student."""
        if name == "student" and self.student_solver is not None:
            return "student_solver", self.student_solver
        return "solver", self.solver

    @property
    def converged(self) -> SolverConfig:
        """The solver of the reference."""
        solver, tolerance = self.converged_solver, self.converged_tolerance
        own: dict[str, Any] = {"rtol": tolerance, "atol": tolerance} if solver == "dopri5" else {}
        return SolverConfig(name=solver, steps=self.converged_steps, **own)


@dataclass
class Plan(folder.Plan):
    """Opened data and models, and how samples are scored.

    sets: "data" and, where it differs, "reference". models: "teacher" and "student". kind: the
    distance. samples: of each row.
    """

    sets: "dict[str, Data]"
    models: "dict[str, Teacher]"
    kind: str
    choice: "FeatureChoice"
    samples: int

    @property
    def real(self) -> "Data":
        """The data that samples are compared with."""
        return self.sets.get("reference", self.sets["data"])


def plan(config: EvaluateConfig) -> Plan:
    """Check the config, open the data, load both models, and choose the features."""
    from flowmatch.data import dataset
    from flowmatch.evaluation import feature_choice, sampling, scoring
    from flowmatch.flow import grids, samplers
    from flowmatch.models import precision, teachers

    def check_device() -> str:
        device = process.pick_device(config.device)
        precision.check("precision", config.precision, device)
        require("matplotlib", "eval", "evaluate")
        if config.converged_solver == "dopri5":
            require("torchdiffeq", "eval", "converged_solver=dopri5")
        if not config.steps or min(config.steps) < 1:
            raise UserError(f"steps={config.steps}: expected one or more numbers, from 1")
        return device

    def check_grid(name: str, steps: int) -> None:
        grids.make(config.rows_of(name)[1], steps)

    def load_model(name: str) -> "Teacher":
        model = teachers.load(getattr(config, name), name)
        key, sampler = config.rows_of(name)
        samplers.check(sampler.name, model.round, f"{key}.name")
        if name == "teacher":
            model.check_teaches("teacher")
        return model

    names = ("teacher", "student")
    keys = ["data"] if config.reference is None else ["data", "reference"]
    device, teacher, student, *opened = together(
        check_device,
        *(partial(load_model, name) for name in names),
        *(partial(dataset.load, getattr(config, key), key) for key in keys),
        *(
            partial(check_grid, name, steps)
            for name in names
            for steps in config.steps
            if steps > 0
        ),
    )
    models: dict[str, Teacher] = {"teacher": teacher, "student": student}
    sets: dict[str, Data] = dict(zip(keys, opened, strict=False))
    inputs = {key: data.digest for key, data in sets.items()}
    inputs |= {name: model.digest for name, model in models.items()}
    data = sets["data"]
    kind = feature_choice.choose_distance(config.distance, data)

    def choose_features() -> "FeatureChoice":
        names = (config.features, config.classifier, config.inception_weights)
        choice = feature_choice.choose_features(*names, kind, data)
        if choice.module is not None:
            feature_choice.check_independent(choice.module, models)
        return choice

    def check_shapes() -> None:
        for name, made in (sets | models).items():
            if made.shape != data.shape:
                raise UserError(
                    f"{name} {'holds' if name in sets else 'makes samples of'} {list(made.shape)}; "
                    f"data holds {list(data.shape)}"
                )

    _, choice, _ = together(
        lambda: sampling.check(models, data, config.guidance), choose_features, check_shapes
    )
    inputs |= choice.inputs
    again = "reference" in sets and scoring.same(sets["reference"], data)
    if again:
        del sets["reference"]
    real = sets.get("reference", data)
    samples = min(config.samples, real.count)
    if kind == "frechet" and samples < 2 * scoring.NEIGHBOURS + 2:
        raise UserError(
            f"{samples} samples: images are scored on {2 * scoring.NEIGHBOURS + 2} or more"
        )
    converged = config.converged
    evaluations = samples * sum(
        sampling.evaluations(
            model, config.guidance, config.steps, config.rows_of(name)[1], converged
        )
        for name, model in models.items()
    )
    lines = [
        f"{samples} samples a row, {kind} distance to {samples} of {real.count} real ones",
        f"{evaluations:,} network evaluations"
        f"{'' if converged.evaluations else ', and those of dopri5,'} for "
        f"{len(config.steps) + 1} rows of 2 models, on {device}",
    ]
    lines += [f"{key}: {note}" for key, opened in sets.items() for note in opened.notes]
    if again:
        lines.append(
            "reference holds the same items as data: scored without it, as seen in training"
        )
    return Plan(config, inputs, lines, sets, models, kind, choice, samples)


def run(plan: Plan) -> None:
    """Sample, score, draw, and seal the folder."""
    from flowmatch.evaluation import feature_choice, results, tables
    from flowmatch.evaluation.sampling import Sampler
    from flowmatch.models import teachers

    config: EvaluateConfig = plan.config
    accelerator = process.start_accelerator(config.device)
    with folder.RunFolder("evaluate", config, plan.inputs) as opened:
        command.exit_on_sigterm()
        if accelerator.num_processes == 1:  # before the samples, which its refusal would lose
            plan.choice = feature_choice.train(
                plan.choice, plan.sets["data"], config.seed, plan.models
            )
        sampled = {
            name: Sampler(
                model,
                plan.samples,
                config.compute_batch,
                config.seed,
                config.guidance,
                config.precision,
                accelerator,
                name,
            )
            for name, model in plan.models.items()
        }
        rows = {  # collective: every rank
            name: sampler.rows(config.steps, config.rows_of(name)[1], config.converged)
            for name, sampler in sampled.items()
        }
        if process.leads():
            result = score(plan, sampled, rows)
            folders = {name: teachers.run_of(getattr(config, name))[0] for name in rows}
            place = Path(opened.folder)
            results.write(place, result, rows, sampled, plan.real, folders, dump(config))
            opened.seal(["metrics.json"])
            process.say(f"\n{tables.markdown(result)}\nreport: {place / 'report.html'}")
    accelerator.end_training()


def score(
    plan: Plan, sampled: "dict[str, Sampler]", rows: "dict[str, list[SampledRow]]"
) -> dict[str, Any]:
    """Measure all rows, and write down the protocol."""
    from flowmatch.data import dataset
    from flowmatch.evaluation import feature_choice, scoring
    from flowmatch.evaluation.scoring import Scorer
    from flowmatch.flow import noise, samplers
    from flowmatch.models.digest import module_digest

    config, kind, sets = plan.config, plan.kind, plan.sets
    n, device = plan.samples, sampled["teacher"].accelerator.device
    unflipped = {name: dataclasses.replace(data, flip=False) for name, data in sets.items()}
    training, real = unflipped["data"], unflipped.get("reference", unflipped["data"])
    reference = dataset.reference(real, n, config.seed)["x1"].to(device)
    protocol: dict[str, Any] = {
        "distance": kind,
        "samples": n,
        "real_samples": n,
        "data": training.digest,
        "noise": f"Philox, seed {config.seed}, stream {noise.EVALUATION}",
        "weights": "EMA, float32",
        "arithmetic": config.precision,
        "solver": f"{samplers.describe(config.solver)}; converged: {config.converged_solver}",
        "guidance": config.guidance,
    }
    if "reference" in sets:
        protocol["reference"] = real.digest
    if config.student_solver is not None:
        protocol["student_solver"] = samplers.describe(config.student_solver)
    # with several processes trained here: the others would wait for it longer than a collective does
    choice = feature_choice.train(plan.choice, sets["data"], config.seed, plan.models)
    net, known = choice.module, None
    if kind == "frechet":
        protocol["features"] = {"name": config.features, **choice.facts}
        if net is not None:
            protocol["features"]["sha256"] = module_digest(net)
            net.to(device)
        seen = min(training.count, max(n, config.training_samples))
        known = scoring.embed_data(training, seen, config.seed, net, device)
        protocol |= {"neighbours": scoring.NEIGHBOURS, "training_samples": seen}
    scorer = Scorer(kind, reference, net, known, apart="reference" not in sets)
    result: dict[str, Any] = {"protocol": protocol, "floor": scorer.floor()}
    truth = rows["teacher"][-1].x
    for name, made in rows.items():
        result[name] = {
            "round": sampled[name].model.round,
            **sampled[name].straightness(),
            "rows": [],
        }
        if sampled[name].model.one_step:
            result[name]["one_step"] = True
        for row in made:
            x = (row.x.clamp(-1, 1) if real.images else row.x).to(device)
            rmse = (row.x - truth).square().mean().sqrt().item()
            facts = {"steps": row.steps, "evaluations": row.evaluations}
            result[name]["rows"].append({**facts, **scorer.score(x), "rmse": rmse})
    return result


STAGE = command.Stage("evaluate", EvaluateConfig, plan, run, __doc__)

if __name__ == "__main__":
    command.main(STAGE)
