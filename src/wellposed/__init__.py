"""wellposed: exact counterparts for the underspecified defaults of diffusion models.

Import from the front desk: ``wellposed.models``, ``.schedulers``, ``.pipelines``, ``.hooks``. Importing this
package alone loads neither torch nor diffusers.

Two kinds of names are resolved here on first use. They are for diffusers' loader, which reads ``["wellposed", "X"]``
in a ``model_index.json`` and asks this package for ``X`` (see :mod:`wellposed.saving`):

* the saved classes, listed in :data:`SAVED_CLASSES`;
* the base classes by which that loader recognises what it can load (``ModelMixin``, ``SchedulerMixin``, ...).
"""

from importlib import import_module
from typing import Any

__all__ = ["SAVED_CLASSES", "__version__"]

__version__ = "0.1.0"

SAVED_CLASSES: dict[str, str] = {
    "AutoencoderDecQ": "wellposed.decq.autoencoder",
    "DecQPipeline": "wellposed.decq.pipeline",
    "DecQTransformer2DModel": "wellposed.decq.transformer",
    "FixedHeadsUNet2DModel": "wellposed.lgs.checkpoints",
    "LanczosDDPMPipeline": "wellposed.lgs.pipeline",
    "LanczosDDPMScheduler": "wellposed.lgs.scheduler",
    "LanczosFlowMatchScheduler": "wellposed.lgs.scheduler",
    "LeaveOneOutDDIMScheduler": "wellposed.udm.scheduler",
    "LensFlowMatchScheduler": "wellposed.lens.scheduler",
    "LensPipeline": "wellposed.lens.pipeline",
    "LensTransformer2DModel": "wellposed.lens.transformer",
    "ShiftedFlowScheduler": "wellposed.decq.scheduler",
    "UniformDiffusionPipeline": "wellposed.udm.pipeline",
    "UniformDiffusionScheduler": "wellposed.udm.scheduler",
    "UniformDiffusionTransformerModel": "wellposed.udm.transformer",
}
"""Every class whose name is written into checkpoints, and the module that holds it today. A class may move; its name
may not, because checkpoints in the world carry it."""

# The loader takes a component for loadable only if its *library* has one of these names and the class derives from it.
_LOADER_BASES: dict[str, str] = {
    "BaseGuidance": "diffusers",
    "DiffusionPipeline": "diffusers",
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
    "PreTrainedModel": "transformers",
    "PreTrainedTokenizerFast": "transformers",
}


def __getattr__(name: str) -> Any:
    module = SAVED_CLASSES.get(name) or _LOADER_BASES.get(name)
    if module is None:
        raise AttributeError(f"module 'wellposed' has no attribute {name!r}")
    return getattr(import_module(module), name)
