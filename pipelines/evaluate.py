"""Evaluation: quality against number of evaluations, of teacher and student, on the same noise.

The noise comes from a stream of its own: a student scored on the noise of its pairs looks better than
it is. Every distance stands beside the distance of real data to real data.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import pydantic

from flowmatch import config as configs
from flowmatch.config import UserError, option, required, used
from flowmatch.data import dataset
from flowmatch.data.config import DataConfig
from flowmatch.data.dataset import Data
from flowmatch.evaluation import feature_choice, figures, report, sampling, scoring, tables
from flowmatch.evaluation.feature_choice import FeatureChoice
from flowmatch.evaluation.sampling import SampledRow, Sampler
from flowmatch.evaluation.scoring import Scorer
from flowmatch.flow import grids, noise, samplers
from flowmatch.flow.config import Fixed, SamplerConfig, SolverConfig
from flowmatch.models import precision, teachers
from flowmatch.models.config import Precision
from flowmatch.models.digest import module_digest
from flowmatch.runs import command, process
from flowmatch.runs.config import StageConfig
from flowmatch.runs.files import write_atomic
from flowmatch.runs.folder import RunFolder, begin


class EvaluateConfig(StageConfig):
    """Config of the evaluation."""

    teacher: str = required("the teacher: a sealed training stage, or a diffusers model", run=True)
    student: str = required("the student: a sealed training stage, or a diffusers model", run=True)
    data: DataConfig = required(
        "real data that the models were trained on, to compare with; with labels where a classifier "
        "is to be trained here"
    )
    reference: DataConfig | None = option(
        None, "real data to compare with that the models have not seen; default: data itself"
    )
    samples: int = option(
        2000, "generated samples, and real ones; all real ones if they are fewer", ge=4
    )
    steps: list[int] = option([1, 2, 4, 8, 16, 32], "numbers of steps, a row each")
    solver: SamplerConfig = option(SamplerConfig(), "how the rows are sampled")
    student_solver: SamplerConfig | None = option(
        None, "how the student's rows are sampled, where that differs"
    )
    converged_solver: Literal[Fixed, "dopri5"] = option(
        "heun", "ODE solver of the reference 'converged', on uniform steps"
    )
    converged_steps: int = option(
        64, "steps of the reference 'converged', all solvers but dopri5", ge=1
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
        "what images are scored on: features of a classifier, the values themselves, or Inception's "
        "features where its weights are given",
    )
    classifier: str | None = option(
        None,
        "sealed folder of train_classifier; default: a classifier is trained on the data here",
        run=True,
    )
    training_samples: int = option(
        100_000,
        "images of data among which each sample's nearest is sought; all of them if they are fewer",
        ge=12,
    )
    inception_weights: str | None = option(
        None, "torch-fidelity's weights file of Inception; nothing is downloaded", run=True
    )

    @pydantic.field_validator("converged_tolerance")
    @classmethod
    def _used(cls, value: float, info: pydantic.ValidationInfo) -> float:
        return used(cls, value, info, "converged_solver", "dopri5")

    def rows_of(self, name: str) -> tuple[str, SamplerConfig]:
        """Give the key and the config of how a model's rows are sampled. name: teacher or student."""
        if name == "student" and self.student_solver is not None:
            return "student_solver", self.student_solver
        return "solver", self.solver

    @property
    def converged(self) -> SolverConfig:
        """How the reference is integrated."""
        solver, tolerance = self.converged_solver, self.converged_tolerance
        own = {"rtol": tolerance, "atol": tolerance} if solver == "dopri5" else {}
        return SolverConfig(name=solver, steps=self.converged_steps, **own)


def main(config: EvaluateConfig, dry_run: bool) -> None:
    """Plan, then sample, score, draw and seal."""
    faults = configs.Faults()
    inputs: dict[str, str] = {}
    with faults:
        device = process.pick_device(config.device)
        precision.check("precision", config.precision, device)
        if not config.steps or min(config.steps) < 1:
            raise UserError(f"steps={config.steps}: expected one or more numbers, from 1")
    for name in ("teacher", "student"):
        for steps in config.steps:
            with faults:
                grids.make(config.rows_of(name)[1], steps)
    sets: dict[str, Data] = {}
    for name, given in (("data", config.data), ("reference", config.reference)):
        with faults:
            if given is not None:
                sets[name] = dataset.load(given, name)
                inputs[name] = sets[name].digest
    models: dict[str, teachers.Teacher] = {}
    for name in ("teacher", "student"):
        with faults:
            models[name] = teachers.load(getattr(config, name), name)
            inputs[name] = models[name].digest
            key, sampler = config.rows_of(name)
            samplers.check(sampler.name, models[name].round, f"{key}.name")
    if "teacher" in models:
        with faults:
            models["teacher"].check_teaches("teacher")
    with faults:
        sampling.check(models, sets.get("data"), config.guidance)
    if "data" in sets:
        kind = feature_choice.choose_distance(config.distance, sets["data"])
        with faults:
            choice = feature_choice.choose_features(
                *(config.features, config.classifier, config.inception_weights), kind, sets["data"]
            )
            inputs |= choice.inputs
            if choice.module is not None:
                feature_choice.check_independent(choice.module, models)
        with faults:
            for name, made in (sets | models).items():
                if made.shape != sets["data"].shape:
                    raise UserError(
                        f"{name} {'holds' if name in sets else 'makes samples of'} "
                        f"{list(made.shape)}; data holds {list(sets['data'].shape)}"
                    )
    faults.check()
    again = "reference" in sets and scoring.same(sets["reference"], sets["data"])
    if again:
        del sets["reference"]
    real = sets.get("reference", sets["data"])
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
    plan = [
        f"{samples} samples a row, {kind} distance to {samples} of {real.count} real ones",
        f"{evaluations:,} network evaluations"
        f"{'' if converged.evaluations else ', and those of dopri5,'} for "
        f"{len(config.steps) + 1} rows of 2 models, on {device}",
    ]
    if again:
        plan.append("reference holds what data holds: scored as without it, as seen in training")
    if not begin("evaluate", config, inputs, plan, dry_run):
        return
    accelerator = process.start_accelerator(config.device)
    with RunFolder("evaluate", config, inputs) as folder:
        command.exit_on_sigterm()
        if accelerator.num_processes == 1:  # before the samples, which its refusal would lose
            choice = feature_choice.train(choice, sets["data"], config.seed, models)
        sampled = {
            name: Sampler(
                model,
                samples,
                config.compute_batch,
                config.seed,
                config.guidance,
                config.precision,
                accelerator,
                name,
            )
            for name, model in models.items()
        }
        found = {  # collective: every rank
            name: sampler.rows(config.steps, config.rows_of(name)[1], converged)
            for name, sampler in sampled.items()
        }
        if process.leads():
            result = score(config, sets, sampled, found, kind, choice)
            write(folder, result, found, sampled, real)
    accelerator.end_training()


def score(
    config: EvaluateConfig,
    sets: dict[str, Data],
    sampled: dict[str, Sampler],
    made: dict[str, list[SampledRow]],
    kind: str,
    choice: FeatureChoice,
) -> dict[str, Any]:
    """Measure all rows, and write down the protocol."""
    n, device = sampled["teacher"].samples, sampled["teacher"].accelerator.device
    unflipped = {name: dataclasses.replace(found, flip=False) for name, found in sets.items()}
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
    # here where there are others: they would wait for it longer than a collective does
    models = {name: sampler.model for name, sampler in sampled.items()}
    choice = feature_choice.train(choice, sets["data"], config.seed, models)
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
    truth = made["teacher"][-1].x
    for name, found in made.items():
        result[name] = {
            "round": sampled[name].model.round,
            **sampled[name].straightness(),
            "rows": [],
        }
        if sampled[name].model.one_step:
            result[name]["one_step"] = True
        for row in found:
            x = (row.x.clamp(-1, 1) if real.images else row.x).to(device)
            rmse = (row.x - truth).square().mean().sqrt().item()
            facts = {"steps": row.steps, "evaluations": row.evaluations}
            result[name]["rows"].append({**facts, **scorer.score(x), "rmse": rmse})
    return result


def write(
    folder: RunFolder,
    result: dict[str, Any],
    made: dict[str, list[SampledRow]],
    sampled: dict[str, Sampler],
    real: Data,
) -> None:
    """Write metrics.json, the table, the pictures and the report, and seal."""
    place = Path(folder.folder)
    samples = {name: {r.steps: r.x for r in found} for name, found in made.items()}
    write_atomic(place / "metrics.json", json.dumps(result, indent=1) + "\n")
    write_atomic(place / "table.md", tables.markdown(result))
    figures.curve(place / "curve.png", result)
    figures.grid(place / "grid.png", samples)
    accelerator = sampled["student"].accelerator
    page = report.page(
        place.absolute().parent.name,
        result,
        samples,
        real=dataset.reference(real, min(16 if real.images else 2000, real.count), 0)["x1"],
        paths={name: sampler.paths() for name, sampler in sampled.items()},
        folders={name: teachers.run_of(getattr(folder.config, name))[0] for name in made},
        config=configs.dump(folder.config),
        facts={
            f"{name}, network": f"{type(net).__name__}, {net.num_parameters():,} parameters"
            for name, net in ((name, sampler.model.net) for name, sampler in sampled.items())
        }
        | report.machine(accelerator.device, accelerator.num_processes),
    )
    write_atomic(place / "report.html", page)
    folder.seal(["metrics.json"])
    process.say(f"\n{tables.markdown(result)}\nreport: {place / 'report.html'}")


if __name__ == "__main__":
    command.command("evaluate", EvaluateConfig, main, __doc__)
