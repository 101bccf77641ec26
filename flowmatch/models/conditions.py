"""Conditions: what turns the number of a prompt into its network's keyword arguments.

What travels with a sample is a number. A table of the run turns numbers into arguments on the device:
`Encoded` runs the pipeline to its network's first call. The prompt after the last is the null prompt:
the negative one, or "".
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.data.prompts import PromptList
from flowmatch.models.script import Script, conditions

Arguments = dict[str, Any]
SHOWN = 8  # faults of a list of prompts


class Conditions(Protocol):
    """A table of conditions.

    Attributes:
        count: Number of prompts K; the null prompt has number K.
    """

    count: int

    def rows(self, ids: Tensor) -> Arguments:
        """Return the network's arguments for some prompts.

        Args:
            ids: Their numbers, 0 to K, int64 [B].

        Returns:
            Keyword arguments of the network, on its device.
        """


def axis_of(one: Tensor, other: Tensor, sizes: tuple[int, int]) -> int | None:
    """Return the axis of two tensors whose length is that of their batches, or None."""
    if one.dim() != other.dim():
        return None
    pairs = list(zip(one.shape, other.shape, strict=True))
    return next((axis for axis, pair in enumerate(pairs) if pair == sizes), None)


def axes(one: Any, other: Any, sizes: tuple[int, int]) -> Any:
    """Find the axis of the batch in each part of two sets of arguments.

    Args:
        one: Arguments for a batch of one size.
        other: The same for a batch of another size.
        sizes: Both sizes.

    Returns:
        The same nesting of dicts and lists, with the axis of each tensor, "rows" for a list with one
        entry a sample, and None for all that is shared.
    """
    if isinstance(one, Tensor):
        return axis_of(one, other, sizes)
    if isinstance(one, dict):
        return {name: axes(value, other[name], sizes) for name, value in one.items()}
    if isinstance(one, list | tuple):
        if (len(one), len(other)) == sizes:
            return "rows"
        return [axes(x, y, sizes) for x, y in zip(one, other, strict=True)]
    return None


def mapped(change: Callable[[Any, Any], Any], value: Any, along: Any) -> Any:
    """Apply change(part, axis) to every part of some arguments that has rows."""
    if along is None:
        return value
    if isinstance(along, dict):
        return {name: mapped(change, part, along[name]) for name, part in value.items()}
    if isinstance(along, list):
        return type(value)(
            mapped(change, part, axis) for part, axis in zip(value, along, strict=True)
        )
    return change(value, along)


def without_last(value: Any, along: Any) -> Any:
    """Return arguments without the last row of their batch."""

    def cut(part: Any, axis: Any) -> Any:
        return part[:-1] if axis == "rows" else part.narrow(axis, 0, part.shape[axis] - 1)

    return mapped(cut, value, along)


class Encoded:
    """Conditions that are computed when they are asked for, by the pipeline's own text encoders.

    Args:
        pipe: The pipeline, on its device.
        script: What was learnt of it.
        call: Arguments of its call.
        texts: The prompts.
        null: The text of the null prompt.
        longest: A prompt that rides along where rows depend on the longest of their batch.
    """

    def __init__(
        self,
        pipe: Any,
        script: Script,
        call: dict[str, Any],
        texts: Sequence[str],
        null: str,
        longest: str,
    ):
        self.pipe, self.script, self.call = pipe, script, call
        self.texts, self.count, self.longest = [*texts, null], len(texts), longest
        self._axes: Any = None

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Arguments:
        """Return the network's arguments for some texts."""
        return conditions(self.pipe, self.script, self.call, prompts)

    @property
    def axes(self) -> Any:
        """The axis of the batch in each part of the arguments (`axes`)."""
        if self._axes is None:
            one, other = self.encode([self.longest] * 2), self.encode([self.longest] * 3)
            self._axes = axes(one, other, (2, 3))
        return self._axes

    def rows(self, ids: Tensor) -> Arguments:
        """Return the network's arguments for some prompts, as in `Conditions`."""
        prompts = [self.texts[i] for i in ids.tolist()]
        if not self.script.rides:
            return self.encode(prompts)
        return without_last(self.encode([*prompts, self.longest]), self.axes)


def check_lengths(pipe: Any, prompts: PromptList, call: dict[str, Any], key: str) -> None:
    """Check that a tokenizer of the pipeline keeps each prompt whole.

    Raises:
        UserError: One is longer; the message names it, its tokens and the limit.
    """
    limits = []
    for name, part in pipe.components.items():
        if name.startswith("tokenizer") and callable(getattr(part, "tokenize", None)):
            asked = call.get("max_sequence_length", part.model_max_length)
            limits.append((min(part.model_max_length, asked), part))
    if not limits or max(limits, key=lambda pair: pair[0])[0] > 10**6:
        return
    limit, tokenizer = max(limits, key=lambda pair: pair[0])
    faults = []
    for number, words in enumerate(prompts.texts):
        if len(words) + 2 > limit:  # a token has one character at least
            tokens = len(tokenizer(words).input_ids)
            if tokens > limit:
                faults.append(
                    f"{key}: prompt {number + 1} has {tokens} tokens, of which {limit} are kept: "
                    f"{words[:60]!r}; shorten it, or set {key}.truncate=true"
                )
    if len(faults) > SHOWN:
        faults[SHOWN:] = [f"{key}: and {len(faults) - SHOWN:,} more prompts are too long"]
    if faults:
        raise UserError(faults)
