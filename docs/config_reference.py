"""Write the reference of all config keys from the stages' own models; conf.py calls it."""

import importlib
from itertools import groupby
from pathlib import Path

from flowmatch.config import Config, describe

STAGES = {  # stage -> its config, and the section of an experiment that holds it
    "tiny_pipeline": ("TinyConfig", "tiny"),
    "encode": ("EncodeConfig", "encode"),
    "train_flow": ("FlowConfig", "flow"),
    "generate_pairs": ("PairsConfig", "pairs"),
    "encode_prompts": ("EncodeConfig", "conditions"),
    "train_classifier": (
        "ClassifierConfig",
        "features, classifier, panel_classifier, panel_encoder",
    ),
    "reflow": ("ReflowConfig", "reflow"),
    "finish": ("FinishConfig", "finish"),
    "evaluate": ("EvaluateConfig", "evaluate"),
    "evaluate_prompts": ("EvaluatePromptsConfig", "evaluate (stage: evaluate_prompts)"),
    "export": ("ExportConfig", "export"),
}


def model(stage: str) -> type[Config]:
    """Return the config model of a stage."""
    return getattr(importlib.import_module(f"pipelines.{stage}"), STAGES[stage][0])


def page(stage: str) -> str:
    """Return the Markdown page of a stage: one table for each group of keys."""
    lines = [f"# {stage}", "", f"Section of an experiment: `{STAGES[stage][1]}`.", ""]
    keys = list(describe(model(stage)))
    keys.sort(key=lambda row: "." in row[0])  # the stage's own keys first; the sort is stable
    for group, rows in groupby(keys, lambda row: row[0].rpartition(".")[0]):
        lines += [f"## {group or 'Keys of the stage'}", "", "| key | default | meaning |"]
        lines += ["|---|---|---|"]
        for key, default, meaning in rows:
            meaning = meaning.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
            lines.append(f"| `{key}` | `{default}` | {meaning.replace('$', chr(92) + '$')} |")
        lines.append("")
    return "\n".join(lines)


def write(folder: Path) -> None:
    """Write one page a stage into a folder; leave a page alone that has not changed."""
    folder.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        path, text = folder / f"{stage}.md", page(stage)
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)
