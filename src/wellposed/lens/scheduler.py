r"""Flow matching with a shift that depends on the size of the picture and on the number of steps, as Lens samples.

x_sigma = (1 - sigma) z + sigma eps, and the network predicts eps - z. T even levels s_k = 1, ..., 1/T are moved to

    sigma_k = e^mu / (e^mu + 1/s_k - 1),    followed by 0,

where mu grows with the number n of tokens and falls with T. The rule is FLUX.2's: two lines in n, one for 10 steps and
one for 200, and linear in T between them. Above 4300 tokens it takes the line of 200 steps whatever T is, so that 20
steps fall from mu = 2.217 to 1.185 at a single token: pictures just above 1024 x 1024 are sampled with a *weaker*
shift than those below. ``mu_rule="smooth"`` goes on as below until the lines meet.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from wellposed.saving import saved_class

__all__ = ["LensFlowMatchScheduler", "MuRule", "shift_mu"]

MuRule = Literal["official", "smooth"]

CLIFF = 4300
FEW_STEPS, MANY_STEPS = 10, 200


def shift_mu(num_tokens: int, num_steps: int, rule: MuRule = "official") -> float:
    r"""mu of a picture of n tokens in T steps.

    With a(n) = 1.6927e-4 n + 0.45667 for 200 steps and b(n) = 8.738e-5 n + 1.89833 for 10,

        mu = a + (200 - T) (b - a) / 190.

    Args:
        num_tokens: n, image tokens.
        num_steps: T.
        rule: "official" has b = a for n > 4300. "smooth" has b = max(a, b): the same up to 4300 tokens, and continuous
            beyond.

    Raises:
        ValueError: no tokens, no steps, an unknown rule.
    """
    if num_tokens < 1 or num_steps < 1:
        raise ValueError(f"num_tokens is {num_tokens} and num_steps {num_steps}; give at least 1")
    if rule not in ("official", "smooth"):
        raise ValueError(f'mu_rule is {rule!r}; write "official" or "smooth"')
    many = 1.6927e-4 * num_tokens + 0.45666666
    few = 8.73809524e-5 * num_tokens + 1.89833333
    above = few - many
    if num_tokens > CLIFF:
        above = 0.0 if rule == "official" else max(above, 0.0)
    return many + (MANY_STEPS - num_steps) * above / (MANY_STEPS - FEW_STEPS)


@saved_class
class LensFlowMatchScheduler(FlowMatchEulerDiscreteScheduler):
    """diffusers' Euler scheduler for flow matching, with the levels of Lens.

    Everything but :meth:`set_timesteps` is that class; given ``sigmas`` and ``mu`` itself, that is too. Where those are
    left out, the stock class would ask for mu and space its levels from 1 to 1/1000 instead of 1/T.

    Args:
        num_train_timesteps: factor between sigma and the timesteps handed out.
        use_dynamic_shifting: shift by mu.
        mu_rule: "official" or "smooth", see :func:`shift_mu`.
        shift, base_shift, max_shift, base_image_seq_len, max_image_seq_len, invert_sigmas, shift_terminal,
            use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, time_shift_type, stochastic_sampling: as in the
            stock class.

    Raises:
        ValueError: an unknown rule.
    """

    _compatibles: ClassVar[list[str]] = ["FlowMatchEulerDiscreteScheduler"]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = True,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
        mu_rule: str = "official",
    ) -> None:
        if mu_rule not in ("official", "smooth"):
            raise ValueError(f'mu_rule is {mu_rule!r}; write "official" or "smooth"')
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            invert_sigmas=invert_sigmas,
            shift_terminal=shift_terminal,  # pyright: ignore[reportArgumentType]
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,  # pyright: ignore[reportArgumentType]
            stochastic_sampling=stochastic_sampling,
        )

    # Every parameter by its name: pipelines look at the signature before they hand on sigmas.
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
        *,
        num_tokens: int | None = None,
    ) -> None:
        """Lay the levels; ``timesteps`` then has one for each evaluation of the network.

        Args:
            num_inference_steps: T; None: as many as there are ``sigmas`` or ``timesteps``.
            device: where ``timesteps`` and ``sigmas`` will be.
            sigmas: levels before the shift; None for 1, ..., 1/T.
            mu: the shift; None: what ``num_tokens`` and T ask for.
            timesteps: as in the stock class.
            num_tokens: n, image tokens.

        Raises:
            ValueError: neither ``mu`` nor ``num_tokens`` where there is a shift; nothing that tells T; what the stock
                class refuses.
        """
        given = sigmas if sigmas is not None else timesteps
        steps = num_inference_steps if num_inference_steps is not None or given is None else len(given)
        if steps is None or steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; give at least 1, or sigmas")
        if mu is None and num_tokens is not None:
            mu = shift_mu(num_tokens, steps, self.config["mu_rule"])
        if mu is None and self.config["use_dynamic_shifting"]:
            raise ValueError(
                "the levels depend on the size of the picture: pass num_tokens, (height // 16) * (width // 16), or mu"
            )
        if given is None:
            sigmas = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
        arguments: dict[str, Any] = {"sigmas": sigmas, "mu": mu, "timesteps": timesteps}
        super().set_timesteps(steps, device=cast(Any, device), **arguments)
