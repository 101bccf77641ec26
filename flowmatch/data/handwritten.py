"""sklearn's handwritten digits, all of them or with a third of each class held out."""

import numpy as np


def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Load the digits of a split.

    Args:
        split: "train", all 1,797; "third", every third of them in the order of their classes; or
            "two_thirds", the others.

    Returns:
        Images in [-1, 1], float32 [N, 8, 8], and the digits that they show, int64 [N].
    """
    from sklearn.datasets import load_digits

    stored = load_digits()
    x, label = (stored.images / 8 - 1).astype(np.float32), stored.target
    if split == "train":
        return x, label
    held_out = np.zeros(len(x), dtype=bool)
    held_out[np.argsort(label, kind="stable")[2::3]] = True
    chosen = held_out == (split == "third")
    return x[chosen], label[chosen]
