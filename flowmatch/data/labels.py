"""Class labels."""

import numpy as np

from flowmatch.config import UserError


def check_labels(
    label: np.ndarray, count: int, key: str, classes: int | None = None
) -> tuple[np.ndarray, int]:
    """Check that labels are 0 to K - 1.

    Args:
        label: of any integer dtype.
        count: number of samples.
        key: the key of the data, for errors.
        classes: K, if it is known. Otherwise K is the largest label + 1, and every class must be used.

    Returns:
        The labels, int64 [count], and K.

    Raises:
        UserError: for labels that are none of these.
    """
    if label.shape != (count,) or label.dtype.kind not in "iu":
        raise UserError(
            f"{key}: the labels are {label.dtype} {list(label.shape)}; expected {count} integers"
        )
    low, high = int(label.min()), int(label.max())
    if low < 0 or (classes is not None and high >= classes):
        top = "K - 1" if classes is None else classes - 1
        bad = (label < 0) | (label >= (high + 1 if classes is None else classes))
        raise UserError(
            f"{key}: got labels from {low} to {high}; expected 0 to {top}; first sample "
            f"{int(bad.argmax())}"
        )
    used = np.unique(label)
    if classes is None and len(used) != high + 1:
        unused = next(k for k, value in enumerate(used) if k != value)
        raise UserError(
            f"{key}: labels go up to {high}, but only {len(used)} values are used, and for example not "
            f"{unused}; number the classes 0 to K - 1"
        )
    if classes is None and len(used) == count > 1:
        raise UserError(
            f"{key}: {count} samples have {count} different labels; these are numbers of samples, not "
            "classes; name another column or array, or leave labels out"
        )
    return label.astype(np.int64), high + 1 if classes is None else classes
