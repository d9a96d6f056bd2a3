"""The Lanczos sampler as diffusers schedulers: DDPM's and flow matching's, config-compatible with their parents."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor

from wellposed.lgs.branches import NetworkCalls
from wellposed.lgs.jacobian import Linearization
from wellposed.lgs.reverse import ReversePoint, StepCost, refuse_non_finite, reverse_step, standard_normal
from wellposed.lgs.sampler import LanczosCovariance, LanczosSettings, SamplingRecord
from wellposed.paths import Bridge, PredictionType, RectifiedFlow, as_prediction_type, from_scheduler
from wellposed.saving import saved_class

__all__ = ["LanczosDDPMScheduler", "LanczosFlowMatchScheduler"]

Generators = torch.Generator | Sequence[torch.Generator] | None


class _LanczosStepping:
    """What the two schedulers share: where Jacobian products come from, and one reverse step with them."""

    network_calls: NetworkCalls | None = None
    default_generator: Generators = None
    _memory: Any = None
    _costs: Sequence[StepCost] = ()
    _listed: tuple[Tensor, list[int] | list[float]] | None = None

    def _start_chain(self) -> None:
        self._memory, self._costs = None, ()
        if self.network_calls is not None:
            self.network_calls.clear()

    def _numbers(self, grid: Tensor) -> list[int] | list[float]:
        """The grid as a list, read once: on an accelerator every reading waits for all work before it."""
        if self._listed is None or self._listed[0] is not grid:
            self._listed = grid, grid.tolist()
        return self._listed[1]

    @property
    def record(self) -> SamplingRecord:
        """What the chain has cost since ``set_timesteps``."""
        return SamplingRecord.of(self._costs)

    def _linearization(
        self, model_output: Tensor, sample: Tensor, given: Linearization | None
    ) -> tuple[Linearization, int]:
        """Products of ``model_output``'s Jacobian in ``sample``: given, collected by the hook, or its own graph's."""
        if given is not None:
            return given, 1
        if self.network_calls is not None:
            return self.network_calls.take(model_output)
        if model_output.requires_grad and sample.requires_grad:

            def product(v: Tensor) -> Tensor:
                (pulled,) = torch.autograd.grad(model_output, sample, v.to(model_output.dtype), retain_graph=True)
                return pulled.to(v.dtype)

            return Linearization(model_output.detach(), product), 1
        raise ValueError(
            f"{type(self).__name__}.step needs products with the model's Jacobian and found none. Write "
            "`with wellposed.hooks.full_covariance(pipe): pipe(...)`, use LanczosDDPMPipeline, pass "
            "`linearization=wellposed.lgs.linearize(lambda x: model(x, t).sample, sample)`, or set num_lanczos_steps=0"
        )

    def _reverse(
        self,
        model_output: Tensor,
        sample: Tensor,
        bridge: Bridge,
        settings: LanczosSettings,
        prediction_type: PredictionType,
        generator: Generators,
        linearization: Linearization | None,
        *,
        t: float,
        ends_at_first_noise: bool,
        clip: float | Callable[[Tensor], Tensor] | None,
        noise_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        refuse_non_finite(model_output, f"t = {t:.4f}")
        covariance = LanczosCovariance(settings)
        jacobian_product, copies = None, 1
        if covariance.needs_products and not bridge.is_last:
            linear, copies = self._linearization(model_output, sample, linearization)
            model_output, jacobian_product = linear.output, linear.product
        elif self.network_calls is not None:
            self.network_calls.clear()
        single = sample[: len(sample) // copies]
        point = ReversePoint(
            x_t=single.detach(),
            t=t,
            bridge=bridge,
            prediction=model_output.detach(),
            prediction_type=prediction_type,
            jacobian_product=jacobian_product,
            ends_at_first_noise=ends_at_first_noise,
        )
        z = None
        if not bridge.is_last:
            generators = self.default_generator if generator is None else generator
            z = standard_normal(point.prediction.to(noise_dtype), generators)
        with torch.no_grad():
            step = reverse_step(point, covariance, z, clip=clip, memory=self._memory)
        self._memory = step.memory
        self._costs = (*self._costs, step.cost)
        return torch.cat([step.x_s] * copies), torch.cat([step.x_0] * copies)


@saved_class
class LanczosDDPMScheduler(_LanczosStepping, DDPMScheduler):
    r"""``DDPMScheduler`` whose reverse step has the full posterior covariance (arXiv 2605.22723).

    Takes every argument of ``DDPMScheduler``, and its config
    (``LanczosDDPMScheduler.from_config(pipe.scheduler.config)``), and these:

    Args:
        num_lanczos_steps: m, the most Jacobian products a step may take. 0 is ``DDPMScheduler`` with
            ``variance_type="fixed_small"``, draw for draw; 3 is the published setting.
        lanczos_tol: relative error at which m stops growing; None for a fixed m.
        lanczos_amortize: see ``LanczosSettings.amortize``.
        end_noise_limit: see ``LanczosSettings.end_noise_limit``.
        eta: noise level of the DDIM family, 1 being DDPM's own. The full covariance belongs at 1: at 0 nothing but C is
            left of the step's covariance, which is badly conditioned.

    ``variance_type`` is kept for the config's sake and not used: the covariance comes from the model's Jacobian. With
    ``clip_sample`` the mean is clipped, never the function that is differentiated. Three things differ from the parent
    on purpose: coefficients are float64 numbers of the two grid points, the step to the clean sample is recognised by
    its place in the grid rather than by t = 0, and the noise of that step is left out for every spacing.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        num_lanczos_steps: int = 3,
        lanczos_tol: float | None = None,
        lanczos_amortize: int = 0,
        end_noise_limit: float | None = None,
        eta: float = 1.0,
    ) -> None:
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,  # pyright: ignore[reportArgumentType]
            trained_betas=trained_betas,
            variance_type=variance_type,  # pyright: ignore[reportArgumentType]
            clip_sample=clip_sample,
            prediction_type=prediction_type,  # pyright: ignore[reportArgumentType]
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            clip_sample_range=clip_sample_range,
            sample_max_value=sample_max_value,
            timestep_spacing=timestep_spacing,  # pyright: ignore[reportArgumentType]
            steps_offset=steps_offset,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )
        self._prediction_type: PredictionType = as_prediction_type(prediction_type)
        self.settings = LanczosSettings(
            num_lanczos_steps=num_lanczos_steps,
            tol=lanczos_tol,
            amortize=lanczos_amortize,
            max_variance=clip_sample_range**2 if clip_sample else None,
            end_noise_limit=end_noise_limit,
        )
        self.path = from_scheduler(self)
        self._start_chain()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """As the parent's; also starts a new chain.

        Raises:
            ValueError: for fewer than one step, or what the parent refuses.
        """
        count = num_inference_steps if timesteps is None else len(timesteps)
        if count is None or count < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {count}")
        super().set_timesteps(num_inference_steps, device, timesteps)  # pyright: ignore[reportArgumentType]
        self._start_chain()

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        linearization: Linearization | None = None,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """One reverse step with the full covariance.

        Args:
            model_output: the network's raw output (2C channels of a learned variance: the first C are used).
            timestep: one of ``timesteps``.
            sample: x_t.
            generator: one, or one per sample; a single normal draw a step, as in the parent.
            return_dict: whether to return a ``DDPMSchedulerOutput``.
            linearization: the network at ``sample`` with Jacobian products, for loops of one's own. Without it, the
                products are those of the ``full_covariance`` hook, or of the graph that joins ``model_output`` to
                ``sample``.

        Raises:
            ValueError: if there is no source of Jacobian products, or the model returned a NaN or inf.
        """
        if model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output[:, : sample.shape[1]]
        t, s, ends_at_first_noise = self._times(int(timestep))
        config, clip = cast(Any, self.config), None
        if config.thresholding:
            clip = self._threshold_sample
        elif config.clip_sample:
            clip = config.clip_sample_range
        prev_sample, x_0 = self._reverse(
            model_output,
            sample,
            self.path.bridge(t, s, eta=cast(Any, self.config).eta),
            self.settings,
            self._prediction_type,
            generator,
            linearization,
            t=t,
            ends_at_first_noise=ends_at_first_noise,
            clip=clip,
            noise_dtype=model_output.dtype,
        )
        if not return_dict:
            return prev_sample, x_0
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x_0)

    def _times(self, timestep: int) -> tuple[float, float, bool]:
        """t, s, and whether s is the grid's last noisy point."""
        grid = self._numbers(self.timesteps)
        if timestep not in grid:
            raise ValueError(f"timestep {timestep} is not one of the scheduler's; step through scheduler.timesteps")
        place = grid.index(timestep)
        if place == 0:
            self._memory, self._costs = None, ()
        train_steps = cast(Any, self.config).num_train_timesteps
        s = (grid[place + 1] + 1) / train_steps if place + 1 < len(grid) else 0.0
        return (timestep + 1) / train_steps, s, place == len(grid) - 2


@saved_class
class LanczosFlowMatchScheduler(_LanczosStepping, FlowMatchEulerDiscreteScheduler):
    r"""``FlowMatchEulerDiscreteScheduler`` made stochastic, with the full posterior covariance of its path.

    Each step goes from sigma_t to sigma_s by ``q(x_s | x_t, x_0)`` (``GaussianPath.bridge``) with the covariance
    ``variance I + x_0_weight^2 C`` drawn by Lanczos. Takes every argument of the parent and these:

    Args:
        num_lanczos_steps: m, the most Jacobian products a step may take; 0 leaves the bridge's own variance.
        lanczos_tol: relative error at which m stops growing; None for a fixed m.
        lanczos_amortize: see ``LanczosSettings.amortize``.
        eta: noise level of the family, 1 being the path's own posterior. With ``stochastic_sampling=True`` the parent
            re-noises the clean prediction completely; then ``eta`` is ignored and the covariance of that step,
            ``sigma_s^2 I + (1 - sigma_s)^2 C``, is matched.

    The network must predict the flow of the data: a guidance-distilled or few-step network is no conditional mean.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
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
        num_lanczos_steps: int = 3,
        lanczos_tol: float | None = None,
        lanczos_amortize: int = 0,
        eta: float = 1.0,
    ) -> None:
        if invert_sigmas:
            raise ValueError("invert_sigmas counts noise backwards, which this scheduler does not; set it to False")
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
        self.settings = LanczosSettings(
            num_lanczos_steps=num_lanczos_steps, tol=lanczos_tol, amortize=lanczos_amortize, max_variance=None
        )
        self.path = RectifiedFlow()
        self._start_chain()

    # Every parameter by its name: pipelines look at the signature before they hand on sigmas.
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | np.ndarray | None = None,
        mu: float | None = None,
        timesteps: list[float] | np.ndarray | None = None,
    ) -> None:
        """As the parent's; also starts a new chain.

        Raises:
            ValueError: for fewer than one step, or what the parent refuses.
        """
        given = next((grid for grid in (sigmas, timesteps) if grid is not None), None)
        count = num_inference_steps if given is None else len(given)
        if count is None or count < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {count}")
        cast(Any, super()).set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        self._start_chain()

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
        *,
        linearization: Linearization | None = None,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """One reverse step with the full covariance; arguments as the parent's, ``linearization`` as
        ``LanczosDDPMScheduler.step``'s. The s_* arguments have no effect, as in the parent.

        Raises:
            ValueError: if there is no source of Jacobian products, the model returned a NaN or inf, or
                ``per_token_timesteps`` is given.
        """
        if per_token_timesteps is not None:
            raise ValueError("per_token_timesteps gives every token its own time; a step's covariance needs one time")
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
            raise ValueError(f"pass one of scheduler.timesteps, not an index; got {timestep!r}")
        if self._step_index is None:
            self._init_step_index(cast(torch.FloatTensor, timestep))
        index: int = self._step_index  # pyright: ignore[reportAssignmentType]
        sigmas, config = self._numbers(cast(Tensor, self.sigmas)), cast(Any, self.config)
        t, s = sigmas[index], sigmas[index + 1]
        eta = self.path.full_renoising(t, s) if config.stochastic_sampling else config.eta
        prev_sample, _ = self._reverse(
            model_output,
            sample,
            self.path.bridge(t, s, eta=eta),
            self.settings,
            "flow_prediction",
            generator,
            linearization,
            t=t,
            ends_at_first_noise=index == len(sigmas) - 3,
            clip=None,
            noise_dtype=torch.float32,
        )
        self._step_index = index + 1
        prev_sample = prev_sample.to(model_output.dtype)
        if not return_dict:
            return (prev_sample,)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=cast(torch.FloatTensor, prev_sample))
