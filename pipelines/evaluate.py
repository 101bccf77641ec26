"""Evaluation: quality against number of evaluations, of teacher and student, on the same noise.

The noise comes from a stream of its own: a student scored on the noise of its pairs looks better than
it is. Every distance stands beside the distance of real data to real data.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowmatch.config import UserError, dump, require, together
from flowmatch.evaluation.config import EvaluateConfig
from flowmatch.runs import command, folder, group, manifest, process

if TYPE_CHECKING:
    import torch

    from flowmatch.data.dataset import Data
    from flowmatch.evaluation.feature_choice import FeatureChoice
    from flowmatch.evaluation.sampling import SampledRow, Sampler
    from flowmatch.evaluation.spaces import Space
    from flowmatch.models.autoencoder import Autoencoder
    from flowmatch.models.teachers import Teacher


@dataclass
class Plan(folder.Plan):
    """Opened data and models, and how samples are scored.

    sets: "data" and, where it differs, "reference". models: "teacher" and "student". kind: the
    distance. samples: of each row. spaces: of the panel.
    """

    sets: "dict[str, Data]"
    models: "dict[str, Teacher]"
    kind: str
    choice: "FeatureChoice"
    samples: int
    spaces: "list[Space]"
    vae: "Autoencoder | None" = None

    def train(self) -> None:
        """Train the feature networks that are not trained yet."""
        from flowmatch.evaluation import feature_choice, spaces

        data, models = self.sets["data"], self.models
        self.choice = feature_choice.train(self.choice, data, self.config.seed, models)
        self.spaces = spaces.train(self.spaces, data, models)

    def shown(self, x: "torch.Tensor") -> "torch.Tensor":
        """Return samples as they are compared and drawn: latents of a VAE as pictures."""
        return x if self.vae is None else self.vae.decode(x)

    @property
    def real(self) -> "Data":
        """The data that samples are compared with."""
        return self.sets.get("reference", self.sets["data"])


def plan(config: EvaluateConfig) -> Plan:
    """Check the config, open the data, load both models, and choose the features."""
    from flowmatch.data import dataset
    from flowmatch.evaluation import feature_choice, sampling, scoring
    from flowmatch.evaluation import spaces as panels
    from flowmatch.flow import grids, samplers
    from flowmatch.models import autoencoder, precision, teachers

    def check_device() -> str:
        device = process.device_of(config)
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
    made = sets["data"].shape  # of what the models make
    vae = autoencoder.of_data(sets["data"], "data.path")
    if vae is not None:
        vae.net.to(process.worker_device(device))
        sets = {k: vae.decoded(data) if data.encoding else data for k, data in sets.items()}
    data = sets["data"]
    kind = feature_choice.choose_distance(config.distance, data)

    def choose_features() -> "FeatureChoice":
        names = (config.features, config.classifier, config.inception_weights)
        choice = feature_choice.choose_features(*names, kind, data)
        if choice.module is not None or (kind, config.features) == ("frechet", "values"):
            feature_choice.check_independent(choice.module, models)
        return choice

    _, choice, spaces, *_ = together(
        lambda: sampling.check(models, data, config.guidance),
        choose_features,
        lambda: panels.choose(config, data, models),
        lambda: sampling.check_shapes(sets, models, made, vae),
        lambda: sampling.check_names({**sets, **models}),
    )
    for chosen in (choice, *spaces):
        inputs |= chosen.inputs
    again = "reference" in sets and scoring.same(sets["reference"], data)
    if again:
        del sets["reference"]
    real = sets.get("reference", data)
    config = config.over(real.count)
    samples = min(config.samples, real.count)
    if (kind == "frechet" or spaces) and samples < 2 * scoring.NEIGHBOURS + 2:
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
    straight = len(models) * min(sampling.STRAIGHT, samples) * sampling.STRAIGHT_STEPS
    lines = [
        f"{samples} samples a row, {kind} distance to {samples} of {real.count} real ones",
        f"{evaluations:,} network evaluations"
        f"{'' if converged.evaluations else ', and those of dopri5,'} for "
        f"{len(config.steps) + 1} rows of 2 models, on {device}, and {straight:,} for the straightness",
    ]
    if spaces:
        lines += panels.lines(spaces, data, config.judges)
    lines += [f"{key}: {note}" for key, opened in sets.items() for note in opened.notes]
    if again:
        lines.append(
            "reference holds the same items as data: scored without it, as seen in training"
        )
    if vae is not None:
        lines.append(f"latents of {list(made)} are decoded, and compared as {list(data.shape)}")
    return Plan(config, inputs, lines, sets, models, kind, choice, samples, spaces, vae)


def run(plan: Plan) -> None:
    """Sample, score, draw, and seal the folder; in a sealed one, make again what is lost."""
    from flowmatch.evaluation import results, tables
    from flowmatch.evaluation.sampling import Sampler
    from flowmatch.models import teachers

    config: EvaluateConfig = plan.config
    place = Path(config.run_dir)
    sealed = manifest.sealed(place)
    if sealed and set(config.lost()) <= tables.CHEAP:
        if process.leads():
            with folder.RunFolder("evaluate", config, plan.inputs) as opened:
                results.write_table(place, tables.read(place, "run_dir")[0], opened.scratch)
        return
    accelerator = process.start_accelerator(config.device)
    with folder.RunFolder("evaluate", config, plan.inputs) as opened:
        alone = accelerator.num_processes == 1 and not sealed
        if alone:  # before the samples, which its refusal would lose
            plan.train()
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
        scores = Scores(plan, accelerator.device) if alone else None
        rows = {  # collective: every rank
            name: sampler.rows(
                config.steps,
                config.rows_of(name)[1],
                config.converged,
                partial(scores.add if scores else announce, name),
            )
            for name, sampler in sampled.items()
        }
        if process.leads():
            if sealed:
                result = tables.read(place, "run_dir")[0]
            else:
                if scores is None:  # the others would wait for it longer than a collective does
                    scores = Scores(plan, accelerator.device)
                    for name, made in rows.items():
                        for row in made:
                            scores.add(name, row)
                result = scores.result(sampled, rows)
            folders = {name: teachers.run_of(getattr(config, name))[0] for name in rows}
            real, scratch = plan.real, opened.scratch
            written = dump(config)
            results.write(place, scratch, result, rows, sampled, real, folders, written, plan.shown)
            if not sealed:
                opened.seal(["metrics.json"])
            process.say(f"\n{tables.markdown(result)}\nreport: {place / 'report.html'}")
    accelerator.end_training()
    group.leave()


def announce(name: str, row: "SampledRow") -> None:
    """Say that a row is sampled, where rows are measured after the last one."""
    from flowmatch.evaluation import tables

    process.say(f"evaluate: {name}, {tables.steps_name(row.steps)}: sampled; measured at the end")


class Scores:
    """The measures of all rows, each printed as soon as it is there, and the protocol."""

    def __init__(self, plan: Plan, device: "torch.device"):
        from flowmatch.data import dataset
        from flowmatch.evaluation import scoring
        from flowmatch.evaluation.panel import Panel
        from flowmatch.flow import noise, samplers
        from flowmatch.models.digest import module_digest

        config, kind, sets, n = plan.config, plan.kind, plan.sets, plan.samples
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
        if plan.vae is not None:
            protocol["decoded by"] = f"{type(plan.vae.net).__name__}, sha256 {plan.vae.digest}"
        if names := training.names or plan.models["student"].names:
            protocol["classes"] = {str(k): name for k, name in enumerate(names)}
        if config.student_solver is not None:
            protocol["student_solver"] = samplers.describe(config.student_solver)
        plan.train()
        net, known = plan.choice.module, None
        seen = min(training.count, max(n, config.training_samples))
        if kind == "frechet":
            protocol["features"] = {"name": config.features, **plan.choice.facts}
            if net is not None:
                protocol["features"]["sha256"] = module_digest(net)
                net.to(device)
            known = scoring.embed_data(training, seen, config.seed, net, device)
            protocol |= {"neighbours": scoring.NEIGHBOURS, "training_samples": seen}
        apart = "reference" not in sets
        self.scorer = scoring.Scorer(kind, reference, net, known, apart=apart)
        self.panel = None
        if plan.spaces:
            words = (plan.spaces, reference, training, seen, config.seed)
            self.panel = Panel(*words, apart=apart)
        self.device, self.images, self.protocol = device, real.images, protocol
        self.shown = plan.shown
        self.rows: dict[str, list[dict[str, Any]]] = {name: [] for name in plan.models}

    def add(self, name: str, row: "SampledRow") -> None:
        """Measure a row of a model, and print its distance."""
        from flowmatch.evaluation import tables

        x = self.shown(row.x)
        x = (x.clamp(-1, 1) if self.images else x).to(self.device)
        found: dict[str, Any] = {"steps": row.steps, "evaluations": row.evaluations}
        found |= self.scorer.score(x)
        if self.panel is not None:
            found["panel"] = self.panel.add(name, x)
        self.rows[name].append(found)
        evaluations = f"{row.evaluations} evaluation{'s' * (row.evaluations != 1)}"
        steps = tables.steps_name(row.steps)
        process.say(f"evaluate: {name}, {steps}: distance {found['distance']:.3g} ({evaluations})")

    def result(
        self, sampled: "dict[str, Sampler]", rows: "dict[str, list[SampledRow]]"
    ) -> dict[str, Any]:
        """Return the content of metrics.json."""
        result: dict[str, Any] = {"protocol": self.protocol, "floor": self.scorer.floor()}
        if self.panel is not None:
            result["panel"] = self.panel.result(self.rows)
            for found in itertools.chain(*self.rows.values()):
                del found["panel"]
        truth = rows["teacher"][-1].x
        for name, made in rows.items():
            result[name] = {
                "round": sampled[name].model.round,
                **sampled[name].straightness(),
                "rows": [],
            }
            if sampled[name].model.for_steps:
                result[name]["for_steps"] = list(sampled[name].model.for_steps)
            if sampled[name].model.windows:
                result[name]["windows"] = sampled[name].model.windows
            for row, found in zip(made, self.rows[name], strict=True):
                rmse = (row.x - truth).square().mean().sqrt().item()
                result[name]["rows"].append({**found, "rmse": rmse})
        return result


STAGE = command.Stage("evaluate", EvaluateConfig, plan, run, __doc__, grouped=True)

if __name__ == "__main__":
    command.main(STAGE)
