r"""Linear probe: how much of a label can be read off frozen features by a linear map.

Multinomial logistic regression on standardised features z,

    min over W, b of    mean_i -log softmax(W z_i + b)[y_i] + l2 / 2 |W|^2,

which is convex, with a unique W for l2 > 0. It is solved to convergence in float64, so that the accuracy depends on
features, labels and l2 alone: no learning rate, no epochs, no seed.
"""

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from wellposed.evaluation.agreement import class_agreement
from wellposed.evaluation.scores import Estimate

__all__ = ["LinearProbe", "fit_linear_probe"]

HISTORY = 20


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearProbe:
    """A fitted probe; all tensors are float64.

    Attributes:
        weight: W, for standardised features.
        bias: b; its sum is 0.
        mean: of the training features.
        scale: their standard deviation; 1 where it is zero.
        l2: strength of the penalty.
        gradient: largest entry of the objective's gradient at the end: how far from the optimum it is.
    """

    weight: Float[Tensor, "classes dim"]
    bias: Float[Tensor, "classes"]
    mean: Float[Tensor, "dim"]
    scale: Float[Tensor, "dim"]
    l2: float
    gradient: float

    def logits(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes"]:
        """W z + b, float64.

        Raises:
            ValueError: features of another length.
        """
        if features.shape[1] != len(self.mean):
            raise ValueError(f"features of length {features.shape[1]}; the probe was fitted on {len(self.mean)}")
        return (features.to(self.mean) - self.mean) / self.scale @ self.weight.T + self.bias

    def accuracy(self, features: Float[Tensor, "batch dim"], labels: Int[Tensor, "batch"]) -> Estimate:
        """Share of features whose largest logit is their label's, with its binomial standard error.

        Raises:
            ValueError: no features, other counts of features and labels, or features of another length.
        """
        return class_agreement(self.logits(features), labels.to(self.mean.device))


def fit_linear_probe(
    features: Float[Tensor, "n dim"],
    labels: Int[Tensor, "n"],
    *,
    num_classes: int,
    l2: float = 1e-3,
    max_iterations: int = 5000,
    tolerance: float = 1e-6,
) -> LinearProbe:
    """Fit a probe on training features by full-batch L-BFGS, on their device; measure it on others by ``accuracy``.

    Args:
        features: of training images, from an encoder that saw none of the test images' labels. Standardised here, each
            by its own mean and standard deviation, so that l2 means the same for every encoder.
        labels: 0 to num_classes - 1, each at least once.
        num_classes: length of the logits.
        l2: strength of the penalty; scikit-learn's C is 1 / (l2 n). The default is ours: where the accuracy matters,
            choose it on held-out training images.
        max_iterations: bound on the iterations.
        tolerance: largest entry of the gradient at which the optimum counts as reached. W then is within its length
            over l2 of the optimum. Below about 1e-7 the line search meets rounding.

    Warns:
        RuntimeWarning: the optimum was not reached.

    Raises:
        ValueError: no features, NaN or inf, other counts, labels out of range, a class without features, or l2 or a
            bound that is not positive.
    """
    _check(features, labels, num_classes)
    if not l2 > 0 or max_iterations < 1 or not tolerance > 0:
        raise ValueError(f"l2 is {l2}, max_iterations {max_iterations}, tolerance {tolerance}; all must be positive")
    inputs = features.detach().double()
    mean, scale = inputs.mean(0), inputs.std(0, correction=0)
    # A constant feature deviates from its rounded mean by rounding, which must not be scaled up to one.
    constant = scale <= 8 * torch.finfo(torch.float64).eps * inputs.abs().amax(0)
    scale = torch.where(constant, torch.ones_like(scale), scale)
    inputs = (inputs - mean) / scale
    labels = labels.to(inputs.device, torch.int64)
    weight, bias = inputs.new_zeros(num_classes, inputs.shape[1]), inputs.new_zeros(num_classes)

    def objective() -> float:
        """The value; leaves the gradient in the tensors, as L-BFGS wants it."""
        log_probabilities = torch.addmm(bias, inputs, weight.T).log_softmax(1)
        value = functional.nll_loss(log_probabilities, labels).item() + l2 / 2 * weight.square().sum().item()
        residual = log_probabilities.exp_()
        residual[torch.arange(len(labels), device=labels.device), labels] -= 1
        residual /= len(labels)
        weight.grad = torch.addmm(l2 * weight, residual.T, inputs)
        bias.grad = residual.sum(0)
        return value

    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        max_eval=4 * max_iterations,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
    )
    with torch.no_grad():
        solver.step(objective)
        objective()
    assert weight.grad is not None
    assert bias.grad is not None
    gradient = max(weight.grad.abs().max().item(), bias.grad.abs().max().item())
    weight.grad = bias.grad = None
    if not gradient <= tolerance:
        warnings.warn(
            f"the probe stopped at a gradient of {gradient:.2g}, above the tolerance of {tolerance:.2g}; raise "
            "max_iterations, l2 or tolerance",
            RuntimeWarning,
            stacklevel=2,
        )
    return LinearProbe(weight=weight, bias=bias, mean=mean, scale=scale, l2=l2, gradient=gradient)


def _check(features: Tensor, labels: Tensor, num_classes: int) -> None:
    if not len(features) or len(features) != len(labels):
        raise ValueError(f"{len(features)} features and {len(labels)} labels; give as many of both, at least one")
    if not features.isfinite().all():
        raise ValueError("the features hold NaN or inf; check the images and the encoder for them")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels span {low} to {high}; with {num_classes} classes give 0 to {num_classes - 1}")
    # Without a penalty on b the bias of an absent class falls for ever.
    absent = (labels.long().bincount(minlength=num_classes) == 0).nonzero().flatten().tolist()
    if absent:
        shown = ", ".join(map(str, absent[:5])) + (", ..." if len(absent) > 5 else "")
        raise ValueError(f"no features of class {shown}; give at least one of each, or number the classes anew")
