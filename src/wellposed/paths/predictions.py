r"""What a network predicts, and how one prediction becomes another.

On a Gaussian path ``x_t = alpha_t x_0 + sigma_t eps`` every prediction type in use is a fixed combination
``p = a x_0 + b eps``:

| type (diffusers' word) | a | b |
| --- | --- | --- |
| ``epsilon`` | 0 | 1 |
| ``sample`` | 1 | 0 |
| ``v_prediction`` | -sigma_t | alpha_t |
| ``flow_prediction`` | -1 | 1 |

Two such combinations and ``x_t`` are three vectors in one plane, so any one is linear in the other two:
``p' = c_x x_t + c_p p``. These two scalars also turn the Jacobian of one prediction into that of another,
``J' = c_x I + c_p J``, which is all that the posterior covariance needs (``wellposed.lgs.covariance``).
"""

from typing import Literal, TypeVar, cast, get_args

from jaxtyping import Float
from torch import Tensor

__all__ = ["PredictionType", "as_prediction_type", "convert_prediction", "prediction_coefficients"]

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]

# A whole batch shares one time (float) or every sample has its own (a tensor that broadcasts against x_t).
Scale = TypeVar("Scale", float, Tensor)


def as_prediction_type(prediction_type: str) -> PredictionType:
    """The string, checked.

    Raises:
        ValueError: if it is none of the four prediction types.
    """
    if prediction_type not in get_args(PredictionType):
        known = ", ".join(get_args(PredictionType))
        raise ValueError(f"prediction_type must be one of {known}; got {prediction_type!r}")
    return cast(PredictionType, prediction_type)


def _clean_and_noise_weights(prediction_type: PredictionType, alpha: Scale, sigma: Scale) -> tuple[Scale, Scale]:
    zero, one = 0 * alpha, 0 * alpha + 1
    match as_prediction_type(prediction_type):
        case "epsilon":
            return zero, one
        case "sample":
            return one, zero
        case "v_prediction":
            return -sigma, alpha
        case "flow_prediction":
            return -one, one


def prediction_coefficients(
    source: PredictionType, target: PredictionType, alpha: Scale, sigma: Scale
) -> tuple[Scale, Scale]:
    """The scalars ``(c_x, c_p)`` with ``target = c_x x_t + c_p source``, for both predictions at the same ``x_t``.

    With ``source = a x_0 + b eps`` and ``target = a' x_0 + b' eps``:
    ``c_x = (a' b - b' a) / d``, ``c_p = (b' alpha - a' sigma) / d``, ``d = alpha b - sigma a``.

    Args:
        source: what is given.
        target: what is wanted.
        alpha: signal scale; a float, or float64 tensor that broadcasts.
        sigma: noise scale, likewise.

    Raises:
        ValueError: if the source says nothing of the target: ``epsilon`` where alpha = 0, ``sample`` where sigma = 0.
    """
    a, b = _clean_and_noise_weights(source, alpha, sigma)
    a_target, b_target = _clean_and_noise_weights(target, alpha, sigma)
    if source == target:
        return 0 * alpha, 0 * alpha + 1
    determinant = alpha * b - sigma * a
    vanishes = bool((determinant == 0).any()) if isinstance(determinant, Tensor) else determinant == 0
    if vanishes:
        where = {
            "epsilon": "alpha (the signal) is 0; start one step later or use a v_prediction model",
            "sample": "sigma (the noise) is 0; stop one step earlier",
        }
        raise ValueError(f"{source!r} does not determine {target!r} where {where[source]}")
    return (
        (a_target * b - b_target * a) / determinant,
        (b_target * alpha - a_target * sigma) / determinant,
    )


def convert_prediction(
    prediction: Float[Tensor, "*shape"],
    x_t: Float[Tensor, "*shape"],
    *,
    source: PredictionType,
    target: PredictionType,
    alpha: float | Tensor,
    sigma: float | Tensor,
) -> Float[Tensor, "*shape"]:
    """``prediction`` of type ``source`` at ``x_t``, as type ``target``; in the wider dtype of the two tensors.

    Args:
        prediction: the network's output.
        x_t: the noisy sample that it was computed from.
        source: its type.
        target: the type wanted.
        alpha: signal scale at this time; a float, or a tensor that broadcasts against ``x_t``.
        sigma: noise scale, likewise.

    Raises:
        ValueError: as ``prediction_coefficients``.
    """
    if isinstance(alpha, Tensor) and isinstance(sigma, Tensor):
        c_x, c_p = prediction_coefficients(source, target, alpha, sigma)
        c_x, c_p = c_x.to(x_t.device, x_t.dtype), c_p.to(x_t.device, x_t.dtype)
    else:
        c_x, c_p = prediction_coefficients(source, target, float(alpha), float(sigma))
    return c_x * x_t + c_p * prediction
