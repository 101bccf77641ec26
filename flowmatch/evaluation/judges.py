"""Judges: whether pictures show what their prompts ask for."""

import importlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from flowmatch.config import UserError
from flowmatch.evaluation import features
from flowmatch.evaluation.config import EvaluatePromptsConfig

Judge = Callable[[Tensor, Sequence[str]], Mapping[str, Tensor]]
ALL = "accuracy"  # the name of a judge's verdict on all that a prompt asks for


def find(
    config: EvaluatePromptsConfig, shape: tuple[int, ...], reason: str, device: str
) -> Judge | None:
    """Load the judge of a config.

    Args:
        config: Of the evaluation.
        shape: Of the pictures.
        reason: Why there are no pictures, or "".
        device: Of the classifier.

    Returns:
        The judge, or None.

    Raises:
        UserError: It does not exist, or does not fit the pictures.
        NotReady: The classifier is not sealed yet.
    """
    if not config.classes and config.judge is None:
        return None
    if reason:
        raise UserError(f"there are no pictures to judge: {reason}; leave classes and judge out")
    net = None
    if config.classifier is not None:
        net, facts = features.load(config.classifier, "classifier", shape[-3:])
        net.to(device)
        if config.classes and len(config.classes) != facts["classes"]:
            raise UserError(
                f"classes={config.classes}: {len(config.classes)} words; the classifier has "
                f"{facts['classes']} classes"
            )
    if config.judge is None:
        assert net is not None, "checked before"
        return by_words(net, config.classes)
    module, _, name = config.judge.partition(":")
    if not module.startswith("flowmatch.") or not name:
        raise UserError(f"judge={config.judge}: expected flowmatch.MODULE:FUNCTION")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"judge={config.judge}: {error}") from None
    return lambda pictures, prompts: function(pictures, prompts, net)


def by_words(net: nn.Module, words: Sequence[str]) -> Judge:
    """Return a judge that compares a classifier's class with the one that a prompt names.

    Args:
        net: A classifier, `features.Classifier`.
        words: Of its classes, in their order; a prompt names the only one of them that it contains.
    """

    def judge(pictures: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        wanted = torch.tensor([named(prompt, words) for prompt in prompts])
        found = net.logits(pictures).argmax(1).cpu()  # type: ignore[operator]
        right = (found == wanted).double()
        return {ALL: torch.where(wanted < 0, torch.nan, right)}

    return judge


def named(prompt: str, words: Sequence[str]) -> int:
    """Return the place of the only one of some words that a prompt contains, or -1."""
    there = set("".join(c if c.isalnum() else " " for c in prompt.lower()).split())
    found = [i for i, word in enumerate(words) if word.lower() in there]
    return found[0] if len(found) == 1 else -1


def judged(verdicts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the verdict on all that a prompt asks for, where a judge has more than one."""
    each = {
        name if name == ALL else f"{ALL}: {name}": v.double().cpu() for name, v in verdicts.items()
    }
    if ALL in each:
        return each
    table = torch.stack(list(each.values()))
    wrong = ((table < 0.5) & ~table.isnan()).any(0)
    asked = ~table.isnan().all(0)
    return {ALL: torch.where(asked, (~wrong).double(), torch.nan)} | each
