r"""Guidance as Lens applies it: a linear step away from the unconditional velocity, at unchanged length.

With v_c the velocity given the text and v_u the one without,

    g = v_u + w (v_c - v_u),    v = g |v_c| / |g|    for each token, over its channels.

Extrapolation lengthens tokens, which over-saturates; here only their direction turns. Qwen-Image guides in the same
way. At w = 1 nothing happens.
"""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["guided_velocity"]

SMALLEST_NORM = 1e-12


def guided_velocity(
    conditional: Float[Tensor, "*batch tokens channels"],
    unconditional: Float[Tensor, "*batch tokens channels"],
    scale: float | int,
    *,
    match_norms: bool = True,
) -> Float[Tensor, "*batch tokens channels"]:
    """The guided velocity, in the inputs' precision; ``conditional`` itself at ``scale`` 1.

    Args:
        conditional: v_c.
        unconditional: v_u.
        scale: w. 1 is no guidance, 0 the direction of v_u.
        match_norms: give each token the norm that it has in v_c. Without, the common linear rule.
    """
    if scale == 1:
        return conditional
    guided = unconditional + scale * (conditional - unconditional)
    if not match_norms:
        return guided
    norm, wanted = (torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in (guided, conditional))
    # A token that guidance cancels has no direction and stays zero.
    return guided * torch.where(norm > 0, wanted / norm.clamp(min=SMALLEST_NORM), torch.ones_like(norm))
