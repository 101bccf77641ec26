"""Pictures with captions that need no download: sklearn's digits in colour, each at every place.

Picture i shows digit i // 15 of its split in one of three colours at one of five places of a black
square of 16 x 16 pixels, and its caption says so: "a red seven at the left".
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, from_numpy

SIZE, DIGIT = 16, 8  # pixels of a picture, and of the digit in it
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {"red": (255, 64, 64), "green": (64, 224, 64), "blue": (80, 112, 255)}
PLACES = {  # words -> row and column of the digit
    "in the middle": (4, 4),
    "at the left": (4, 0),
    "at the right": (4, 8),
    "at the top": (0, 4),
    "at the bottom": (8, 4),
}
TEMPLATE = "a {colour} {digit} {place}"
HELD_OUT = 5  # every fifth digit is of the split `test`


def pictures(split: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Compose the pictures of a split.

    Args:
        split: "train" or "test", which show different digits.

    Returns:
        uint8 [N, 16, 16, 3], the digits that they show, int64 [N], and their captions.
    """
    from sklearn.datasets import load_digits

    stored = load_digits()
    chosen = (np.arange(len(stored.images)) % HELD_OUT == HELD_OUT - 1) == (split == "test")
    ink, digit = stored.images[chosen] / 16, stored.target[chosen].astype(np.int64)
    kinds = [(colour, place) for colour in COLOURS for place in PLACES]
    x = np.zeros((len(ink), len(kinds), SIZE, SIZE, 3), dtype=np.uint8)
    for k, (colour, place) in enumerate(kinds):
        top, left = PLACES[place]
        coloured = np.rint(ink[..., None] * COLOURS[colour])
        x[:, k, top : top + DIGIT, left : left + DIGIT] = coloured
    captions = [
        TEMPLATE.format(colour=colour, digit=NAMES[number], place=place)
        for number in digit
        for colour, place in kinds
    ]
    return x.reshape(-1, SIZE, SIZE, 3), digit.repeat(len(kinds)), captions


def asked(prompts: Sequence[str]) -> np.ndarray:
    """Return what prompts ask for: numbers of digit, colour and place, or -1, int64 [N, 3]."""
    kinds = (NAMES, tuple(COLOURS), tuple(PLACES))
    spaced = [f" {' '.join(prompt.split())} " for prompt in prompts]
    return np.array(
        [
            [next((i for i, word in enumerate(kind) if f" {word} " in text), -1) for kind in kinds]
            for text in spaced
        ]
    )


def seen(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read colour and place from pixels.

    Args:
        x: pictures, [N, 3, 16, 16] in [-1, 1].

    Returns:
        Numbers of the colours, int64 [N]: the nearest to the mean of all ink; and those of the places,
        int64 [N]: the nearest to the centre of the ink.
    """
    ink = (x.astype(np.float64) + 1).clip(0, 2) / 2
    shade = ink.sum((2, 3))  # [N, 3]
    known = np.array(list(COLOURS.values()), dtype=np.float64)
    cosine = shade @ (known / np.linalg.norm(known, axis=1, keepdims=True)).T
    grey = ink.max(1)  # [N, 16, 16]
    corners = np.array(list(PLACES.values()))
    lines = np.arange(SIZE)
    mass = np.maximum(grey.sum((1, 2)), 1e-6)
    centre = np.stack([grey.sum(2) @ lines / mass, grey.sum(1) @ lines / mass], axis=1)  # [N, 2]
    away = np.abs(centre[:, None] - (corners + (DIGIT - 1) / 2)).sum(2)
    return cosine.argmax(1), away.argmin(1)


def judge(pictures: Tensor, prompts: Sequence[str], classifier: Any) -> dict[str, Tensor]:
    """Judge whether pictures show what their prompts ask for, attribute by attribute.

    Args:
        pictures: [N, 3, 16, 16] in [-1, 1].
        prompts: of the pictures, [N].
        classifier: of the digits, with a method `logits`.

    Returns:
        For digit, colour and place: 1 where it is right, 0 where not, NaN where the prompt does not say,
        float64 [N].
    """
    colour, place = seen(pictures.cpu().numpy())
    digit = classifier.logits(pictures).argmax(1).cpu().numpy()
    wanted = asked(prompts)
    right = np.stack([digit, colour, place], axis=1) == wanted
    verdicts = np.where(wanted < 0, np.nan, right)
    names = ("digit", "colour", "place")
    return {name: from_numpy(verdicts[:, i].copy()) for i, name in enumerate(names)}
