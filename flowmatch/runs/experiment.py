"""Experiments: one YAML file with a section for each stage, and `key=value` on top.

An experiment has a `name`, keys that its stages share (`data`, `net`, ...) and a section for each
stage. A stage reads its own section over the shared keys; its folder is runs/NAME/SECTION, and its
inputs are the folders of the other stages unless a key names others. A file without a `name` is the
config of one stage as it is, such as the config.yaml of a run folder.
"""

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import flowmatch
from flowmatch.config import Config, UserError, closest, expanded, shared_fields
from flowmatch.runs.values import assign, leave_derived, merge

CHAIN = {  # section -> its stage, in the order of the chain
    "tiny": "tiny_pipeline",
    "encode": "encode",
    "flow": "train_flow",
    "pairs": "generate_pairs",
    "features": "train_classifier",
    "conditions": "encode_prompts",
    "reflow": "reflow",
    "classifier": "train_classifier",
    "panel_classifier": "train_classifier",
    "panel_encoder": "train_classifier",
    "evaluate": "evaluate",
    "export": "export",
}
STAGES = (*dict.fromkeys(CHAIN.values()), "evaluate_prompts", "finish")
EVALUATIONS = ("evaluate", "evaluate_prompts")
_FIELDS = (
    "data net fit coupling times loss teacher shards shard_size block compute_batch solver guidance "
    "dtype precision compile lease_seconds start objective student reference samples steps "
    "student_solver converged_solver converged_steps converged_tolerance distance training_samples "
    "inception_weights held_out batch_size lr evaluation device seed prompts call pipeline x0 "
    "per_prompt classes judge fresh width vae_channels vae_steps vae_batch vae_lr "
    "lpips dino clip samples_to push_to_hub license lora adapter per_image states vae scale predicts "
    "for_steps method anchor panel judges network task decode"
)
SHARED = set(_FIELDS.split())  # the fields of all stages that may stand at the top of an experiment
PANEL = ("panel_classifier", "panel_encoder")  # sections that only evaluate.panel=full needs
FOLDERS = (
    "run_dir",
    "teacher",
    "start",
    "pairs",
    "student",
    "evaluation",
)  # not those of a later round


def root() -> Path:
    """Find the folder that holds `pipelines` and `configs`: the package, or the checkout around it."""
    package = Path(flowmatch.__file__).parent
    return package if (package / "pipelines").is_dir() else package.parent


def stage_module(stage: str) -> str:
    """Name the module of a stage: `pipelines.X` in a checkout, `flowmatch.pipelines.X` elsewhere."""
    installed = root() == Path(flowmatch.__file__).parent
    return f"flowmatch.pipelines.{stage}" if installed else f"pipelines.{stage}"


def shipped() -> list[str]:
    """List the experiments that come with flowmatch."""
    return sorted(path.stem for path in (root() / "configs").glob("*.yaml"))


def find_config(word: str) -> str:
    """Find the file that a word names: a file, a run folder, a URL, or a shipped experiment."""
    word = expanded(word)
    if "://" in word or Path(word).is_file():
        return word
    if (Path(word) / "config.yaml").is_file():
        return str(Path(word) / "config.yaml")
    if "/" not in word and (file := root() / "configs" / f"{word}.yaml").is_file():
        return str(file)
    what = "a folder without a config.yaml" if Path(word).is_dir() else "no such config file"
    near = closest(Path(word).stem, shipped())
    if "." in word and "/" not in word and not word.endswith((".yaml", ".yml")):
        near += f"if it is a key, write {word.partition(':')[0]}=value; "
    raise UserError(f"{word}: {what}; {near}expected a YAML file or one of {', '.join(shipped())}")


def base_of(section: str) -> tuple[str, int]:
    """Split `reflow_2` into its first section and its round: ("reflow", 2); ("reflow", 1) without."""
    matched = re.fullmatch(r"(.+)_(\d+)", section)
    return (matched[1], int(matched[2])) if matched else (section, 1)


class Experiment:
    """An experiment: shared keys and sections, from a file or from values.

    Raises UserError for a key that no stage has and for a section that names no stage.
    """

    def __init__(self, values: dict[str, Any], file: str):
        self.file = file
        self.name, self.shared, self.sections = "", {}, {}  # type: str, dict[str, Any], dict[str, Any]
        self.typed: dict[str, list[str]] = {}  # section -> its keys that the command line sets
        faults = []
        for key, value in deepcopy(values).items():
            if key == "name":
                self.name = str(value)
            elif key == "ablation":  # for scripts.ablation
                continue
            elif self._is_section(key, value):
                self.sections[key] = value or {}
            elif key in SHARED:
                self.shared[key] = value
            else:
                near = closest(key, {*SHARED, *CHAIN})
                faults.append(
                    f"{file}: {key}: neither a key of a stage nor a section; {near}a section beside "
                    f"{', '.join(CHAIN)} names its stage with `stage:`"
                )
        for section, values in self.sections.items():
            if not isinstance(values, dict):
                faults.append(f"{file}: {section}: expected a mapping of keys to values")
            elif (stage := values.get("stage", "reflow")) not in STAGES:
                near = closest(str(stage), STAGES)
                faults.append(
                    f"{file}: {section}.stage={stage!r}: {near}stages: {', '.join(STAGES)}"
                )
        if faults:
            raise UserError(faults)
        self._check_name()

    def _check_name(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise UserError(
                f"{self.file}: name={self.name!r}: expected letters, digits, '_', '.' and '-'"
            )

    @staticmethod
    def _is_section(key: str, value: Any) -> bool:
        own = isinstance(value, dict) and "stage" in value
        return own or key in STAGES or base_of(key)[0] in CHAIN

    def has(self, section: str) -> bool:
        """Check whether a section can be run: it is written down, or is a later round of one that is."""
        return section in self.sections or base_of(section)[0] in self.sections

    def stage_of(self, section: str) -> str:
        """Return the stage of a section, such as train_flow for flow."""
        base = base_of(section)[0]
        for name in (section, base):
            if "stage" in self.sections.get(name, {}):
                return str(self.sections[name]["stage"])
        return CHAIN.get(base, base)

    def folder(self, section: str) -> str:
        """Return the folder of a section: its run_dir, or runs/NAME/SECTION."""
        return str(self.sections.get(section, {}).get("run_dir", f"runs/{self.name}/{section}"))

    @property
    def rounds(self) -> int:
        """Count the rounds of reflow that are written down."""
        return max([1, *(base_of(name)[1] for name in self.sections if base_of(name)[0] in CHAIN)])

    def chain(self, rounds: int) -> list[str]:
        """List the sections of the chain in order; evaluation and export are of the last round."""
        sections: list[str] = []
        panel = self._has_panel("evaluate" if rounds == 1 else f"evaluate_{rounds}")
        for name in CHAIN:
            if name in PANEL and not panel:
                continue
            last = f"{name}_{rounds}" if rounds > 1 and name in ("evaluate", "export") else name
            sections += [last] * (name in self.sections)
            if name == "reflow":
                for k in range(2, rounds + 1):
                    sections += [f"{again}_{k}" for again in ("pairs", "reflow")]
        return sections

    def _has_panel(self, section: str) -> bool:
        """Check whether an evaluation judges by a panel."""
        own = [self.sections.get(name, {}) for name in (section, base_of(section)[0])]
        asked = [*own, self.shared]
        return next((keys["panel"] for keys in asked if "panel" in keys), "none") == "full"

    def section_for(self, stage: str, asked: str | None = None) -> str:
        """Choose the section that a stage reads. Raises UserError where there is none."""
        if asked is None:
            for section in (*CHAIN, stage):
                if self.has(section) and self.stage_of(section) == stage:
                    return section
            known = ", ".join(self.sections)
            raise UserError(f"{self.file}: no section for {stage}; sections: {known}")
        if not self.has(asked):
            near = closest(asked, self.sections)
            raise UserError(
                f"{self.file}: section={asked}: {near}sections: {', '.join(self.sections)}"
            )
        if self.stage_of(asked) != stage:
            raise UserError(
                f"{self.file}: section={asked} is of {self.stage_of(asked)}, not of {stage}"
            )
        return asked

    def apply(self, key: str, value: Any) -> None:
        """Set SECTION.key, or a shared key. Raises UserError where the experiment has neither."""
        first, _, rest = key.partition(".")
        if key == "name":
            self.name = "" if value is None else str(value)
            self._check_name()
        elif rest and self.has(first):
            assign(self.sections.setdefault(first, {}), rest, value)
            self.typed.setdefault(first, []).append(rest)
        elif re.split(r"[.\[]", key)[0] in SHARED:
            assign(self.shared, key, value)
        else:
            near = closest(first, {*self.sections, *SHARED})
            raise UserError(
                f"{key}={value}: {near}expected SECTION.key=value; sections: {', '.join(self.sections)}"
            )

    def values(self, section: str, model: type[Config]) -> dict[str, Any]:
        """Gather the config of a section: shared keys, its first round, its own keys, its inputs."""
        base, k = base_of(section)
        fields = shared_fields(model)
        values = {key: deepcopy(value) for key, value in self.shared.items() if key in fields}
        stage = self.stage_of(section)
        if stage == "train_classifier":  # it learns labels, and is measured on data it has not seen
            for key, source in (("data", "data"), ("held_out", "reference")):
                if isinstance(given := self.shared.get(source), dict) and key not in self.shared:
                    values[key] = deepcopy(given)
                if isinstance(values.get(key), dict) and self._learns_labels(section):
                    values[key]["labels"] = True
        if stage in ("train_flow", "evaluate") and self.has("encode"):
            values["data"] = self._encoded(self.shared.get("data"))
        if k > 1:
            first = {n: v for n, v in self.sections.get(base, {}).items() if n not in FOLDERS}
            values = merge({n: v for n, v in values.items() if n not in FOLDERS}, deepcopy(first))
            if "teacher" in self.shared and stage in EVALUATIONS:
                values["teacher"] = self.shared["teacher"]
            if stage == "generate_pairs":
                values["seed"] = values.get("seed", 0) + k - 1
        values = merge(values, deepcopy(self.sections.get(section, {})))
        typed = [key for name in dict.fromkeys((base, section)) for key in self.typed.get(name, [])]
        leave_derived(values, model, typed)
        values.pop("stage", None)
        values.setdefault("run_dir", self.folder(section))
        for key, value in self._inputs(stage, section, values).items():
            if key in model.model_fields:
                values.setdefault(key, value)
        return self._resolved(values)

    def _learns_labels(self, section: str) -> bool:
        return self.sections.get(section, {}).get("task", "classification") == "classification"

    def _encoded(self, data: Any) -> Any:
        """Name the latents of the shared data, which the section `encode` makes."""
        if not isinstance(data, dict) or data.get("source") == "latents":
            return deepcopy(data)
        labels = {"labels": True} if data.get("labels") else {}
        return {"source": "latents", "path": self.folder("encode"), **labels}

    def _inputs(self, stage: str, section: str, values: dict[str, Any]) -> dict[str, Any]:
        """The folders of other stages that a stage reads where no key names them."""
        k = base_of(section)[1]
        last = "reflow" if k == 1 else f"reflow_{k}"
        before = "reflow" if k == 2 else f"reflow_{k - 1}"
        found: dict[str, Any] = {}
        start = before if k > 1 else "flow"
        if stage == "train_flow" and self.has("tiny"):
            found["start"] = "tiny"
        whole = self.sections.get("flow", {}).get("start", "tiny" if self.has("tiny") else None)
        reads = "prompts" in values  # else the start of stage one is a network alone
        readers = ("generate_pairs", "reflow", "finish", "evaluate_prompts", "export")
        if stage in readers and whole and reads:
            found["pipeline"] = whole  # that stage one trains a network of
        if stage == "encode_prompts" and whole:
            found["teacher"] = whole
        if stage in ("generate_pairs", "reflow") and (k > 1 or self.has("flow")):
            found["teacher" if stage == "generate_pairs" else "start"] = start
        elif stage == "reflow" and "teacher" in self.shared:
            found["start"] = self.shared["teacher"]
        later = k > 1 and stage in ("generate_pairs", "reflow")
        of_run = later or stage in ("finish", "export")
        if {"teacher", "prompts"} <= self.shared.keys() and of_run:
            found["pipeline"] = self.shared["teacher"]  # of a run folder's network
        if stage in ("reflow", "finish") and self.has("conditions"):
            found["conditions"] = "conditions"
        if stage == "finish":
            found["start"] = last
            method = values.get("method")
            name = method.get("name") if isinstance(method, dict) else method
            if name not in (None, "dmd"):  # dmd is the default
                found |= {"features": ["features"]} if self.has("features") else {}
            elif self.has("flow"):
                found["teacher"] = "flow"
        if stage in ("reflow", "finish"):
            found["pairs"] = ["pairs" if k == 1 else f"pairs_{k}"]
            loss = values.get("loss")
            if isinstance(loss, dict) and loss.get("name") == "feature" and self.has("features"):
                values["loss"] = {"features": self.folder("features")} | loss
        if stage in (*EVALUATIONS, "export") and self.has("reflow"):
            found["student"] = last
        if stage in EVALUATIONS:
            if self.has("flow"):
                found["teacher"] = "flow"
            if self.has("classifier") and values.get("features", "classifier") == "classifier":
                found["classifier"] = "classifier"
            if values.get("panel") == "full" and all(map(self.has, PANEL)):
                found["judges"] = [*PANEL]
        if stage == "export" and "prompts" in values and "teacher" in self.shared:
            found.setdefault("pipeline", self.shared["teacher"])
        if stage == "export" and self.has("evaluate"):
            found["evaluation"] = "evaluate" if k == 1 else f"evaluate_{k}"
        return found

    def _resolved(self, values: dict[str, Any]) -> dict[str, Any]:
        """Replace the name of a section by its folder wherever an input names one."""

        def place(value: Any) -> Any:
            known = isinstance(value, str) and self.has(value)
            return self.folder(value) if known else value

        inputs = (
            "teacher",
            "start",
            "pipeline",
            "student",
            "evaluation",
            "classifier",
            "conditions",
        )
        for key in inputs:
            if key in values:
                values[key] = place(values[key])
        if isinstance(judges := values.get("judges"), list):
            values["judges"] = [place(judge) for judge in judges]
        if isinstance(pairs := values.get("pairs"), str | dict):
            values["pairs"] = pairs = [pairs]
        if isinstance(pairs, list):
            own = [p if isinstance(p, dict) else {"path": p} for p in pairs]
            values["pairs"] = [p | {"path": place(p.get("path", "pairs"))} for p in own]
        if isinstance(listed := values.get("features"), list):
            values["features"] = [place(name) for name in listed]
        if isinstance(loss := values.get("loss"), dict) and "features" in loss:
            values["loss"] = loss | {"features": place(loss["features"])}
        return values
