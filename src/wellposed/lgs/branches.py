r"""From what a pipeline hands to its scheduler back to the network calls it was mixed from.

Between two scheduler steps a pipeline may call its network once on the batch, once on the batch doubled for
classifier-free guidance, or several times in a row; then it mixes the outputs outside the network and hands on one
tensor. The Jacobian of that tensor is the same mixture of the calls' Jacobians. The mixture is linear in the outputs,
so it can be read off the numbers: the weights that reproduce the tensor exactly. Nothing needs to be known of the
pipeline, and a mixture that is not linear, or that rescales what it mixed, is noticed instead of being sampled wrongly.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from wellposed.lgs.jacobian import Linearization

__all__ = ["NetworkCalls"]

# Rounding of a mixture, relative to the outputs times their weights: guidance amplifies it by its scale.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(eq=False)
class NetworkCalls:
    """The linearised network calls since the last scheduler step."""

    calls: list[Linearization] = field(default_factory=list)

    def add(self, call: Linearization) -> None:
        """Another call. Beyond what one step can use, the oldest is dropped with its graph."""
        self.calls = [*self.calls[-3:], call]

    def clear(self) -> None:
        """Drops the calls and with them their graphs."""
        self.calls = []

    def take(self, mixed: Tensor) -> tuple[Linearization, int]:
        """The linearisation of ``mixed`` in the sample that the calls were made at, and how often it repeats.

        Returns:
            A linearisation whose output is ``mixed``, cut to its first half where the pipeline steps a doubled batch
            (both halves equal, as DiT's does), and the number of copies, 1 or 2. The calls are dropped.

        Raises:
            ValueError: if there is no call, or ``mixed`` is no mixture of the calls' outputs with weights that sum to 1
                (or to -1, where a pipeline turns the prediction round).
        """
        calls, self.calls = self.calls, []
        if not calls:
            raise ValueError(
                "the model was not called between two scheduler steps, so there is no Jacobian; was the scheduler "
                "stepped twice, or is a cache skipping the model? Disable the cache"
            )
        copies = 2 if self._is_doubled(mixed, calls) else 1
        single = mixed[: len(mixed) // copies]
        if any(len(call.output) % len(single) for call in calls):
            rows = [len(call.output) for call in calls]
            raise ValueError(f"the scheduler received a batch of {len(single)}, the model returned batches of {rows}")
        branches = [(call, part) for call in calls for part in range(len(call.output) // len(single))]
        outputs = [self._branch(call.output, part, single) for call, part in branches]
        unmixed = len(outputs) == 1 and torch.equal(single, outputs[0])
        weights = [1.0] if unmixed else _mixture_weights(single, outputs)

        def product(v: Tensor) -> Tensor:
            total = torch.zeros_like(v)
            for call in calls:
                own = [weight for weight, (branch, _) in zip(weights, branches, strict=True) if branch is call]
                total += _pulled_back(call, own, v)
            return total

        return Linearization(single, product), copies

    @staticmethod
    def _branch(output: Tensor, part: int, like: Tensor) -> Tensor:
        rows = output[part * len(like) : (part + 1) * len(like)]
        return rows[:, : like.shape[1]] if rows.ndim == like.ndim else rows

    def _is_doubled(self, mixed: Tensor, calls: list[Linearization]) -> bool:
        half = len(mixed) // 2
        if len(calls) != 1 or len(mixed) != len(calls[0].output) or len(mixed) % 2 or half == 0:
            return False
        output = self._branch(calls[0].output, 0, mixed)
        # An unguided batch passes through as it is; guidance leaves two equal halves of a mixture.
        return torch.equal(mixed[:half], mixed[half:]) and not torch.equal(mixed, output)


def _mixture_weights(mixed: Tensor, outputs: list[Tensor]) -> list[float]:
    if any(output.shape != mixed.shape for output in outputs):
        shapes = sorted({tuple(output.shape) for output in outputs})
        raise ValueError(f"the scheduler received a tensor of shape {tuple(mixed.shape)}, the model returned {shapes}")
    matrix = torch.stack([_wide(output) for output in outputs], dim=1)
    target = _wide(mixed)
    orthogonal, triangular = torch.linalg.qr(matrix)
    # Equal branches make the small matrix singular; the pseudo-inverse then shares the weight between them.
    weights = torch.linalg.pinv(triangular, rtol=1e-12) @ (orthogonal.mT @ target)
    error = (matrix @ weights - target).norm()
    scale = torch.maximum((weights.abs() * matrix.norm(dim=0)).sum(), target.norm())
    relative_error, total, *shares = torch.cat([torch.stack([error / scale, weights.sum()]), weights]).tolist()
    # The mixture may have been computed in the network's dtype and handed on in a wider one.
    rounding = max(_ROUNDING.get(tensor.dtype, 1e-5) for tensor in (mixed, *outputs))
    if not relative_error <= rounding or abs(abs(total) - 1) > max(1e-3, 3 * rounding):
        raise ValueError(
            f"the scheduler received a tensor that is no affine mixture of the model's outputs (relative error "
            f"{relative_error:.1e}, weights that sum to {total:.4f}): the pipeline rescales or bends what it mixed; "
            "switch off guidance_rescale, guidance normalisation, or thresholding outside the scheduler"
        )
    return shares


def _wide(tensor: Tensor) -> Tensor:
    flat = tensor.flatten()
    return (flat.cpu() if flat.device.type == "mps" else flat).double()  # MPS has no float64


def _pulled_back(call: Linearization, weights: list[float], v: Tensor) -> Tensor:
    """sum_i w_i J_i v for the branches of one call, in one product: samples do not mix inside a network."""
    stacked = _resized(torch.cat([weight * v for weight in weights]), call.product_shape or call.output.shape)
    image = _resized(call.product(stacked), v.shape)
    return image.reshape(len(weights), *v.shape).sum(dim=0)


def _resized(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Cut or zero-padded along the second axis: channels or tokens that only one side of the network has."""
    wanted = shape[1] if len(shape) == tensor.ndim else tensor.shape[1]
    if tensor.shape[1] >= wanted:
        return tensor[:, :wanted]
    return torch.cat([tensor, tensor.new_zeros(len(tensor), wanted - tensor.shape[1], *tensor.shape[2:])], dim=1)
