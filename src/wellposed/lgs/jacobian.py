r"""Products with a network's Jacobian at one point, and how to get them.

| method | product | cost of one | needs |
| --- | --- | --- | --- |
| ``vjp`` | J^T v | about one forward | autograd; one forward with a saved graph serves every product |
| ``jvp`` | J v | four to five forwards | forward-mode rules of every operation; no graph is kept |
| ``difference`` | (f(x + hv) - f(x - hv)) / 2h | two forwards | nothing but the forward, at least float32 |

For the posterior mean of an exact denoiser J is symmetric and all three agree. For a trained network they differ by its
asymmetry, and sampling with one is as good as with the other (docs/methods/lgs.md has the measurement).
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

__all__ = ["Linearization", "ProductMethod", "linearize"]

ProductMethod = Literal["vjp", "jvp", "difference"]


@dataclass(frozen=True, eq=False)
class Linearization:
    """A function at one point: its value there, detached, and ``product``: v -> J v (``vjp``: J^T v) in v's dtype.

    ``product_shape`` is the shape that ``product`` takes where it is not the output's: a network may see more channels
    than it predicts (an inpainting mask) or predict more than it sees (a learned variance), and then J^T v takes v in
    the output's shape, J v in the input's.
    """

    output: Float[Tensor, "batch *out"]
    product: Callable[[Tensor], Tensor]
    product_shape: torch.Size | None = None


def linearize(
    function: Callable[[Tensor], Tensor],
    x: Float[Tensor, "batch *shape"],
    *,
    method: ProductMethod = "vjp",
    module: nn.Module | None = None,
) -> Linearization:
    """``function`` at ``x`` with Jacobian products; works inside ``no_grad`` and ``inference_mode``.

    Args:
        function: maps a batch to a batch, sample by sample.
        x: the point.
        method: see the module's table.
        module: the network inside ``function``, if any. Its parameters are frozen while the graph is built or used, so
            that nothing is saved for gradients that nobody asks for.

    Raises:
        ValueError: if the method is unknown, the function cannot be differentiated, the module has active dropout, or
            differences are asked of a half-precision input.
    """
    if module is not None:
        _refuse_active_dropout(module)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(_frozen(module))
        x = x.clone() if x.is_inference() else x.detach()
        match method:
            case "vjp":
                return _vjp(function, x, module)
            case "jvp":
                return _jvp(function, x)
            case "difference":
                return _difference(function, x)
            case _:
                raise ValueError(f"method must be 'vjp', 'jvp' or 'difference', got {method!r}")


def _vjp(function: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module | None) -> Linearization:
    with torch.enable_grad(), _buffers_kept():
        leaf = x.requires_grad_()
        output = function(leaf)
    if not output.requires_grad:
        raise ValueError(_NOT_DIFFERENTIABLE)
    # Unit vectors of many dimensions have entries that float16 gradients underflow at; a power of two undoes exactly.
    scale = 2.0 ** round(output[0].numel() ** 0.5).bit_length() if output.dtype == torch.float16 else 1.0

    def product(v: Tensor) -> Tensor:
        with torch.inference_mode(False), _frozen(module), _buffers_kept():
            cotangent = v.clone() if v.is_inference() else v
            (pulled,) = torch.autograd.grad(
                output, leaf, (cotangent * scale).to(output.dtype), retain_graph=True, allow_unused=True
            )
        if pulled is None:
            raise ValueError(_NOT_DIFFERENTIABLE)
        return pulled.to(v.dtype) / scale

    return Linearization(output.detach(), product, output.shape)


_NOT_DIFFERENTIABLE = (
    "the model's output does not depend differentiably on its input (it detaches, runs under no_grad inside, or is "
    "quantised or exported without autograd); use method='difference', which needs only forward passes"
)


def _jvp(function: Callable[[Tensor], Tensor], x: Tensor) -> Linearization:
    with warnings.catch_warnings():
        # torch's own use of torch.jit.script, at the first dual number of a process.
        warnings.simplefilter("ignore", DeprecationWarning)
        import_module("torch._decomp.decompositions_for_jvp")
    with torch.no_grad():
        output = function(x)

    def product(v: Tensor) -> Tensor:
        # Inside inference_mode forward-mode AD returns no tangent and no error.
        with torch.inference_mode(False), sdpa_kernel(SDPBackend.MATH), _ContiguousGroupNorm():
            tangent = torch.func.jvp(function, (x,), (v.to(x.dtype).clone(),))[1]
        return tangent.detach().to(v.dtype)

    return Linearization(output, product, x.shape)


def _difference(function: Callable[[Tensor], Tensor], x: Tensor) -> Linearization:
    if x.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"finite differences in {x.dtype} are off by 6 % at best; run the model in float32 or use method='vjp'"
        )
    with torch.no_grad():
        output = function(x)
    # A cube root of the rounding unit balances truncation against cancellation in a central difference.
    size = torch.finfo(x.dtype).eps ** (1 / 3)

    def product(v: Tensor) -> Tensor:
        rms = v.flatten(1).square().mean(dim=1).sqrt().clamp_min(torch.finfo(v.dtype).tiny)
        step = (size / rms).reshape(-1, *[1] * (v.ndim - 1))
        shift = (step * v).to(x.dtype)
        with torch.no_grad():
            change = function(x + shift) - function(x - shift)
        return (change / (2 * step).reshape(-1, *[1] * (change.ndim - 1))).to(v.dtype)

    return Linearization(output, product, x.shape)


class _ContiguousGroupNorm(TorchFunctionMode):
    """group_norm's forward-mode rule calls .view on its input, which attention leaves transposed in UNet2DModel."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.group_norm:
            return func(args[0].contiguous(), *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def _frozen(module: nn.Module | None) -> Iterator[None]:
    trainable = [p for p in module.parameters() if p.requires_grad] if module is not None else []
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _buffers_kept() -> AbstractContextManager[object]:
    # A compiled backward may reuse the saved tensors' memory, which a second product would then read.
    return functorch_config.patch("donated_buffer", False)


def _refuse_active_dropout(module: nn.Module) -> None:
    for name, child in module.named_modules():
        if isinstance(child, nn.modules.dropout._DropoutNd) and child.training and child.p > 0:
            raise ValueError(
                f"dropout is active in {name or 'the model'}: the products would be noise; call model.eval()"
            )
