"""Training of an adapter: what it cannot be combined with, and its network."""

from typing import Any

from flowmatch.config import UserError, require
from flowmatch.data.config import PromptsConfig
from flowmatch.models import adapters, students
from flowmatch.models.adapters import Writer
from flowmatch.models.config import CallConfig, LoraConfig
from flowmatch.models.teachers import Teacher
from flowmatch.runs.process import world_size
from flowmatch.training.config import FitConfig


def check(config: LoraConfig | None, fit: FitConfig, objective: str) -> None:
    """Check that an adapter can be trained.

    Args:
        config: The adapter; None for none.
        fit: The training loop.
        objective: Name of the objective.

    Raises:
        UserError: A library is missing, or something cannot be combined.
    """
    if config is None:
        return
    require("peft", "text", "lora")
    if objective == "meanflow":
        raise UserError(
            "lora: objective.name=meanflow adds a second time to the network, which an adapter leaves "
            "untrained; leave one of them out"
        )
    if config.quantize is None:
        return
    require("torchao", "8bit", "lora.quantize")
    if not fit.checkpointing:
        raise UserError(
            "lora.quantize needs fit.checkpointing=true: else all layers are kept in floats from the "
            "forward to the backward pass, which takes more memory than no quantisation"
        )
    others = {
        "several processes": world_size() > 1,
        "fit.compile": fit.compile,
        "fit.channels_last": fit.channels_last,
    }
    for other in (name for name, given in others.items() if given):
        raise UserError(f"lora.quantize cannot be combined with {other}; leave one of them out")


def add(net: Any, config: LoraConfig, writer: Writer, seed: int) -> None:
    """Add a new adapter to a network, in place, and quantise what is frozen where it is asked for.

    Raises:
        UserError: A target fits no layer, or the whole network would be written from rounded weights.
    """
    adapters.add(net, config, seed)
    _quantise(net, config, writer)


def _quantise(net: Any, config: LoraConfig, writer: Writer) -> None:
    if config.quantize is None:
        return
    if writer.whole:
        raise UserError(
            "lora.quantize: net/ would be the whole network (lora.merge, or a start that reads no "
            "adapters), and this run has its rounded weights alone; leave lora.quantize out"
        )
    adapters.quantise(net)


def load_pair(
    start: str,
    teacher: str | None,
    prompts: PromptsConfig | None,
    call: CallConfig,
    lora: LoraConfig | None,
    fit: FitConfig,
    seed: int,
    **more: Any,
) -> tuple[Teacher, Teacher | None, Writer | None]:
    """Load a student and perhaps its teacher (`students.load_pair`), with the adapter that is trained.

    Args:
        start: The student. An adapter's run goes on as that adapter.
        teacher: Its teacher; or None.
        prompts: The prompts; None for networks that read none.
        call: Arguments of the pipeline's call.
        lora: A new adapter of the start; None trains all of its weights, or its own adapter.
        fit: The training loop.
        seed: Of a new adapter.
        more: As in `students.load_pair`.

    Returns:
        Both, and what writes an adapter; None where all weights are trained.

    Raises:
        UserError: They do not belong together, or cannot be loaded.
        NotReady: One is not made yet.
    """
    kept = None if prompts is None else students.adapter_of(start)
    if kept is not None and lora is not None:
        raise UserError(f"lora: start={start} is an adapter, which is trained on; leave lora out")
    config = lora if kept is None else LoraConfig(**kept["lora"])
    check(config, fit, "finish")
    if prompts is not None:
        more["dtype"] = adapters.dtype_of(config, fit.precision)
    student, found = students.load_pair(
        start, teacher, prompts, call, adapted=config is not None, **more
    )
    if config is None:
        return student, found, None
    writer = adapters.writer(config, student, "" if kept is None else kept["base"])
    if kept is None:
        adapters.add(student.net, config, seed)
    _quantise(student.net, config, writer)
    return student, found, writer
