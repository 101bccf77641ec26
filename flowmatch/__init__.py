"""Rectified flow and reflow: fit a flow, store its pairs, fit again on them, export to diffusers.

Importing this imports nothing else. The exported classes are found on first use: a saved pipeline
names them `["flowmatch", CLASS]`, and diffusers looks both the class and its base (SchedulerMixin,
ModelMixin) up in the module so named.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import ModelMixin, SchedulerMixin

    from flowmatch.export.pipeline import ReflowPipeline
    from flowmatch.export.scheduler import RectifiedFlowScheduler
    from flowmatch.models.mlp import VelocityMLP

__version__ = "0.2.0.dev0"

__all__ = [
    "ModelMixin",
    "RectifiedFlowScheduler",
    "ReflowPipeline",
    "SchedulerMixin",
    "VelocityMLP",
    "__version__",
]

_HOMES = {
    "RectifiedFlowScheduler": "flowmatch.export.scheduler",
    "ReflowPipeline": "flowmatch.export.pipeline",
    "VelocityMLP": "flowmatch.models.mlp",
    "SchedulerMixin": "diffusers",
    "ModelMixin": "diffusers",
}


def __getattr__(name: str) -> Any:
    """Import an exported class on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'flowmatch' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
