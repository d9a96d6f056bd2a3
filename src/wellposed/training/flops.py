"""FLOPs: those that a step's models compute, counted as they run, and those that a device could have computed."""

import logging
import math
import platform
import re
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from wellposed.training.config import Precision

__all__ = ["PEAKS", "Arithmetic", "FlopCounter", "Peak", "arithmetic_of", "device_name", "device_peak", "nominal_peak"]

Arithmetic = Literal["bf16", "tf32", "fp32"]
"""How a device multiplies matrices: 16-bit numbers with 32-bit sums, TF32, or plain float32."""

PEAKS: Mapping[str, Mapping[Arithmetic, float]] = {
    "A100": {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
    "A800": {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
    "H100": {"bf16": 989.5e12, "tf32": 494.7e12, "fp32": 66.9e12},
    "H100 NVL": {"bf16": 835.5e12, "tf32": 417.5e12, "fp32": 60e12},
    "H100 PCIe": {"bf16": 756e12, "tf32": 378e12, "fp32": 51.2e12},
    "H800": {"bf16": 989.5e12, "tf32": 494.7e12, "fp32": 66.9e12},
    "H800 PCIe": {"bf16": 756e12, "tf32": 378e12, "fp32": 51.2e12},
    "H200": {"bf16": 989.5e12, "tf32": 494.7e12, "fp32": 66.9e12},
    "H200 NVL": {"bf16": 835.5e12, "tf32": 417.5e12, "fp32": 60e12},
    "GH200": {"bf16": 989.5e12, "tf32": 494.7e12, "fp32": 66.9e12},
    "B200": {"bf16": 2250e12, "tf32": 1125e12, "fp32": 75e12},
    "A10": {"bf16": 125e12, "tf32": 62.5e12, "fp32": 31.2e12},
    "L4": {"bf16": 121e12, "tf32": 60e12, "fp32": 30.3e12},
    "L40S": {"bf16": 362e12, "tf32": 183e12, "fp32": 91.6e12},
    "RTX 3090": {"bf16": 71e12, "tf32": 35.6e12, "fp32": 35.6e12},
    "RTX 4090": {"bf16": 165.2e12, "tf32": 82.6e12, "fp32": 82.6e12},
    "RTX 5090": {"bf16": 209.5e12, "tf32": 104.8e12, "fp32": 104.8e12},
    "MI300X": {"bf16": 1307.4e12, "tf32": 653.7e12, "fp32": 163.4e12},
}
"""Peak FLOP/s of one device by its vendor's data sheet: dense matrices, no sparsity, at boost clock."""

# A slice of a device, a laptop's or a market's own version shares the name and not the speed.
OTHER_DEVICES = {"MIG", "Laptop", "D", "Max", "SUPER", "Ti"}

# Long enough for a clock's resolution and for a device to be full, short beside the start of a process.
LONG_ENOUGH_SECONDS = 0.002
SIDES = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
REPEATS = 3

aten = torch.ops.aten

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Most FLOP/s of one device.

    Attributes:
        flop_per_second: the figure.
        source: "nominal" is the vendor's (:data:`PEAKS`), "measured" that of the fastest of a few matrix products.
    """

    flop_per_second: float
    source: Literal["nominal", "measured"]


def device_name(device: torch.device) -> str:
    """What a device calls itself; a CPU is named after its architecture and the threads that torch uses of it."""
    match device.type:
        case "cuda":
            return torch.cuda.get_device_name(device)
        case "mps":
            return "Apple GPU"
        case _:
            return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def arithmetic_of(precision: Precision, parameters: Iterable[Tensor], device: torch.device) -> Arithmetic:
    """How a run of this precision multiplies matrices: in 16 bits under autocast or where weights have no more."""
    if precision == "bf16" or any(p.dtype in (torch.bfloat16, torch.float16) for p in parameters):
        return "bf16"
    return "tf32" if device.type == "cuda" and torch.get_float32_matmul_precision() != "highest" else "fp32"


def device_peak(device: torch.device, arithmetic: Arithmetic) -> Peak:
    """The vendor's figure for devices in :data:`PEAKS`; others are measured once a process, in well under a second.

    A measured peak is what torch reached here and then: on a shared or a throttled machine a run may surpass it.
    """
    nominal = nominal_peak(device_name(device), arithmetic) if device.type == "cuda" else None
    if nominal is not None:
        return Peak(flop_per_second=nominal, source="nominal")
    return Peak(flop_per_second=_measured_peak(device, arithmetic, torch.get_num_threads()), source="measured")


def nominal_peak(name: str, arithmetic: Arithmetic) -> float | None:
    """The vendor's FLOP/s of a device that calls itself ``name``; None if it is none of :data:`PEAKS`."""
    words = set(re.split(r"[^A-Za-z0-9]+", name))
    known = [key for key in PEAKS if words.issuperset(key.split()) and not words & OTHER_DEVICES]
    return PEAKS[max(known, key=len)][arithmetic] if known else None


@lru_cache
def _measured_peak(device: torch.device, arithmetic: Arithmetic, threads: int) -> float:
    dtype = torch.bfloat16 if arithmetic == "bf16" else torch.float32
    best = 0.0
    for side in SIDES:
        matrix = torch.ones(side, side, dtype=dtype, device=device)
        seconds = min(_product_seconds(matrix) for _ in range(REPEATS))
        best = max(best, 2 * side**3 / seconds)
        if seconds > LONG_ENOUGH_SECONDS:
            break
    return best


def _product_seconds(matrix: Tensor) -> float:
    started = time.perf_counter()
    # Read back, which waits for the device whatever its kind.
    (matrix @ matrix)[0, 0].item()
    return time.perf_counter() - started


class FlopCounter(TorchDispatchMode):
    """Counts the FLOPs of matrix products, convolutions and attention, a multiplication and its addition as two.

    These are *model FLOPs*, those that the mathematics of a forward and a backward pass asks for. What gradient
    checkpointing or a fused attention computes a second time is not among them: the former is in ``recomputed``.
    Kernels that torch knows nothing about (Triton's, a library's) and what runs in inference mode are not seen.

    Nothing is computed otherwise than without it, to the last bit. torch's own ``FlopCounterMode`` takes operations
    apart (the gradient of SiLU, for one), which rounds differently; its formulas are the ones used here.

    Use :meth:`forward` around the loss and :meth:`backward` around its backward pass.

    Attributes:
        flops: what was counted.
        recomputed: FLOPs of forward passes that were repeated within backward passes.
        complete: False once the FLOPs of an operation could not be told.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.recomputed = 0
        self.complete = True
        self._in_backward = False
        self._formulas = {**FlopCounterMode(display=False).flop_registry, **ATTENTION}

    @contextmanager
    def forward(self) -> Generator[None]:
        """While entered, everything counts."""
        self._in_backward = False
        with self:
            yield

    @contextmanager
    def backward(self) -> Generator[None]:
        """While entered, what runs with gradients enabled is a repeated forward pass: gradients run without."""
        self._in_backward = True
        with self:
            yield

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation and count it."""
        kwargs = kwargs or {}
        operation = func if isinstance(func, HigherOrderOperator) else func._overloadpacket
        formula = self._formulas.get(operation)
        result = func(*args, **kwargs)
        if formula is not None:
            self._add(operation, formula, args, kwargs, result)
        return result

    def _add(self, operation: Any, formula: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        try:
            flops = int(formula(*args, **kwargs, out_val=result))
        except Exception as error:  # torch's formulas expect the usual shapes; counting must not stop a run
            if self.complete:
                logger.warning("the FLOPs of %s are unknown here (%s), so those of the run are", operation, error)
            self.complete = False
            return
        if self._in_backward and torch.is_grad_enabled():
            self.recomputed += flops
        else:
            self.flops += flops


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Two products: scores (..., q, k) of depth d, and values (..., q, d_v) of depth k."""
    return 2 * math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward_flops(_gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Twice the forward pass, as for every product; torch's own formula adds the scores that are computed again."""
    return 2 * _attention_flops(query, key, value)


FUSED = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
ATTENTION = {
    **{getattr(aten, f"_scaled_dot_product_{kind}"): _attention_flops for kind in FUSED},
    **{getattr(aten, f"_scaled_dot_product_{kind}_backward"): _attention_backward_flops for kind in FUSED},
}
