"""Memory that runs out: what was asked for, and the keys that decide how much it is."""

import errno
from typing import Any

from flowmatch.config import UserError, flatten

WORDS = (  # of torch and numpy, whose errors are of no kind of their own
    *("allocate memory", "out of memory", "bad_alloc", "array is too big"),
    *("Storage size calculation overflowed", "Maximum allowed dimension exceeded"),
)
SIZES = {  # key -> what else makes it smaller
    "fit.batch_size": "fit.micro_batch accumulates smaller parts of it",
    "fit.micro_batch": "",
    "batch_size": "",
    "vae_batch": "",
    "compute_batch": "",
    "shard_size": "",
    "block": "",
    "samples": "",
    "training_samples": "",
    "data.size": "",
    "data.memory": "in MiB",
}


def runs_out(error: BaseException) -> bool:
    """Return whether an error means that there is not as much memory as something has asked for."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError | ValueError) and any(w in str(error) for w in WORDS)


def refusal(error: BaseException, config: Any = None) -> UserError:
    """Say what was asked for, and which keys of a config decide how much it is, the largest first."""
    told = " ".join(str(error).split())[:300] or type(error).__name__
    line = f"not enough memory: {told}"
    values = {} if config is None else flatten(config.model_dump(mode="json"))
    sizes = {key: values[key] for key in SIZES if isinstance(values.get(key), int)}
    found = [
        f"{key}={value}" + (f" ({SIZES[key]})" if SIZES[key] else "")
        for key, value in sorted(sizes.items(), key=lambda pair: -pair[1])
    ]
    found += ["net"] if getattr(config, "net", None) is not None else []
    return UserError(
        f"{line}; make smaller what decides its size: {', '.join(found)}" if found else line
    )
