r"""The posterior covariance of a step, as a product.

With C = Cov[x_0 | x_t], Tweedie's second-order identity reads C = (sigma_t^2 / alpha_t) J, J the Jacobian of the
posterior mean E[x_0 | x_t]. A network's raw prediction p is linear in x_t and the posterior mean
(``wellposed.paths.predictions``), so ``C v = (sigma_t^2 / alpha_t) (c_x v + c_p J_p v)``:

| network predicts | C |
| --- | --- |
| epsilon | (b / a) (I - sqrt(b) J) |
| sample | (b / sqrt a) J |
| v_prediction | b I - b sqrt(b / a) J |
| flow_prediction | (sigma^2 / (1 - sigma)) (I - sigma J) |

with a = alpha_t^2 and b = sigma_t^2 on a variance-preserving path. The covariance of the reverse step is then
``Sigma = variance I + x_0_weight^2 C`` with the numbers of its ``Bridge``; C is positive semi-definite, so
``variance`` is an exact floor of its spectrum.
"""

import math
from collections.abc import Callable

from torch import Tensor

from wellposed.paths import Bridge, PredictionType, prediction_coefficients

__all__ = ["posterior_covariance_product", "step_covariance_spectrum"]


def posterior_covariance_product(
    jacobian_product: Callable[[Tensor], Tensor],
    *,
    alpha: float,
    sigma: float,
    prediction_type: PredictionType,
) -> Callable[[Tensor], Tensor]:
    """v -> C v from v -> J_p v (or J_p^T v), p being the network's raw prediction.

    The two scalars are float64 and the combination runs in v's dtype, float32 or wider, also where the network
    computes in half precision: at high noise it subtracts nearly equal numbers.

    Args:
        jacobian_product: of the raw, unclipped prediction.
        alpha: signal scale at the point; must not be 0, where x_t says nothing of x_0 and C is the data's covariance.
        sigma: noise scale there.
        prediction_type: what the network predicts.
    """
    c_x, c_p = prediction_coefficients(prediction_type, "sample", alpha, sigma)
    scale = sigma**2 / alpha
    return lambda v: scale * c_x * v + scale * c_p * jacobian_product(v)


def step_covariance_spectrum(bridge: Bridge, *, ceiling: float = math.inf) -> Callable[[Tensor], Tensor]:
    """e -> variance + x_0_weight^2 clamp(e, 0, ceiling): eigenvalues of C to those of the step's covariance.

    The clamp at 0 is exact knowledge (C is a covariance) and keeps a trained network's small negative eigenvalues from
    eating into the floor.
    """
    return lambda eigenvalues: bridge.variance + bridge.x_0_weight**2 * eigenvalues.clamp(0, ceiling)
