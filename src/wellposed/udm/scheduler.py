r"""The room's steps as diffusers schedulers: one of our own, and one to put in the place of diffusers' own.

``UniformDiffusionScheduler`` counts time in (0, 1], 1 = noise, as all of this library does;
``LeaveOneOutDDIMScheduler`` counts the integer steps of diffusers' ``DiscreteDDIMScheduler``. Both hand the logits that
they are given to the room's functions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_discrete_ddim import DiscreteDDIMScheduler, DiscreteDDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from jaxtyping import Bool, Float, Int
from torch import Tensor

from wellposed.batches import TextBatch
from wellposed.paths import Linear
from wellposed.saving import saved_class
from wellposed.udm.corrector import (
    Corrector,
    Selection,
    choose_positions,
    correct,
    resample,
    scattered,
    selection_scores,
)
from wellposed.udm.draws import Generators, Truncation, draw_tokens, random_tokens, uniform_numbers
from wellposed.udm.grids import GridSpacing, alpha_grid, time_at
from wellposed.udm.kernels import Kernel, TokenState, Uniform, kernel_named, own_log_prob, uniform_routes
from wellposed.udm.models import GivenLogits
from wellposed.udm.prediction import Prediction
from wellposed.udm.steps import Plugged, SamplingRecord, SamplingSettings, ancestral_step

__all__ = ["LeaveOneOutDDIMScheduler", "UniformDiffusionScheduler", "UniformDiffusionSchedulerOutput"]

PredictionKind = Literal["leave_one_out", "denoiser"]

DEFAULT_STEPS = 64
TIME_TOLERANCE = 1e-6  # relative: what a time loses in float32, and no less than neighbours of a fine grid differ by


@dataclass
class UniformDiffusionSchedulerOutput(BaseOutput):
    """What a step returns.

    Attributes:
        prev_sample: the tokens after it, (batch, length).
        prev_noise: the noise tokens u after it, for absorbing kernels; None for the others.
    """

    prev_sample: Int[Tensor, "batch length"]
    prev_noise: Int[Tensor, "batch length"] | None = None


@saved_class
class UniformDiffusionScheduler(SchedulerMixin, ConfigMixin):
    r"""Reverse steps of discrete diffusion from a network's logits (arXiv 2605.22765).

    A loop of one's own, which is also what ``UniformDiffusionPipeline`` does (it asks the network's head about the rows
    that are needed only)::

        scheduler.set_timesteps(64)
        x = scheduler.kernel(vocab_size).prior(torch.zeros(8, 128, dtype=torch.long), generator=generator).tokens
        for t in scheduler.timesteps:
            logits = network(x, scheduler.alpha(t).expand(len(x))).logits
            x = scheduler.step(logits, t, x, generator=generator).prev_sample

    With a corrector, ``step_correct`` follows, on logits at the new tokens and at ``alpha_after(t)``.

    Args:
        kernel: "uniform", "masked", "absorbing", "refreshed_absorbing" or "maximal_coupling"; see ``udm.kernels``.
        prediction_kind: what the network's logits are, "leave_one_out" or "denoiser".
        vocab_size: K, the clean tokens. None: that of the logits. With it logits of another size are refused, and
            ``add_noise`` knows what noise is.
        eps: alpha(t) = 1 - (1 - eps) t.
        timestep_spacing: "linear" in t, or "geometric" in the noise left; see ``alpha_grid``.
        temperature: of the predictions, see ``SamplingSettings``.
        temper: what it divides, "leave_one_out" or "denoiser".
        top_p: nucleus of a draw; 1 keeps all. It never touches a token that stays, see ``Truncation``.
        top_k: likeliest tokens that a draw may choose from; None for all.
        min_p: least probability that a draw may choose, relative to the likeliest.
        corrector_steps: Gibbs corrections after a step; 0 for none. Uniform and maximal-coupling kernels only.
        corrector_k: positions that each resamples.
        corrector_selection: how they are chosen, see ``Corrector``; "random" with ``corrector_k=1`` is exact.
        corrector_selection_temperature: of that choice.
        corrector_metropolis: the test that makes an informed choice of one position exact. It needs the network, so it
            works in the pipeline and not in ``step_correct``.

    Raises:
        ValueError: an unknown name, or a value out of range.
    """

    _compatibles: ClassVar[list[str]] = ["DiscreteDDIMScheduler"]
    order = 1

    @register_to_config
    def __init__(
        self,
        kernel: str = "uniform",
        prediction_kind: PredictionKind = "leave_one_out",
        vocab_size: int | None = None,
        eps: float | int = 1e-3,
        timestep_spacing: GridSpacing = "linear",
        temperature: float | int = 1.0,
        temper: PredictionKind = "leave_one_out",
        top_p: float | int = 1.0,
        top_k: int | None = None,
        min_p: float | int = 0.0,
        corrector_steps: int = 0,
        corrector_k: int = 12,
        corrector_selection: Selection = "lowest_log_margin",
        corrector_selection_temperature: float | int = 1.0,
        corrector_metropolis: bool = False,
    ) -> None:
        if prediction_kind not in ("leave_one_out", "denoiser"):
            raise ValueError(f"prediction_kind is {prediction_kind!r}; write 'leave_one_out' or 'denoiser'")
        if not 0 < eps < 1:
            raise ValueError(f"eps is {eps}; write a small remainder of the clean tokens at t = 1, such as 1e-3")
        if corrector_steps < 0:
            raise ValueError(f"corrector_steps is {corrector_steps}; write how many, 0 for none")
        known = kernel_named(kernel, vocab_size or 2)
        self.schedule = Linear(eps=eps)
        self.settings = SamplingSettings(
            temperature=temperature,
            temper=temper,
            truncation=Truncation(top_p=top_p, top_k=top_k, min_p=min_p),
        )
        self.corrector: Corrector | None = None
        if corrector_steps:
            self.corrector = Corrector(
                steps=corrector_steps,
                k=corrector_k,
                selection=corrector_selection,
                selection_temperature=corrector_selection_temperature,
                metropolis=corrector_metropolis,
            )
            self.corrector.check(known)
        self.set_timesteps(DEFAULT_STEPS)

    @classmethod
    def from_config(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, config: Mapping[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """As diffusers', for configs of ``DiscreteDDIMScheduler`` too, which is fed denoisers."""
        names = ("corrector_selection_temperature", "corrector_selection_tau")
        return cast(Any, super()).from_config(config, return_unused_kwargs, **(_carried(config, names) | kwargs))

    def __len__(self) -> int:
        return len(self.timesteps)

    def kernel(self, vocab_size: int | None = None) -> Kernel:
        """The corruption that the config names, over this many clean tokens; None: the config's own number.

        Raises:
            ValueError: no number at all, or another one than the config's.
        """
        own: int | None = cast(Any, self.config).vocab_size
        size = own if vocab_size is None else vocab_size
        if size is None:
            raise ValueError(
                "how many tokens the vocabulary has is not known here: pass vocab_size, or set it in the scheduler's "
                "config"
            )
        if own is not None and own != size:
            raise ValueError(f"the scheduler's vocab_size is {own}, here is a vocabulary of {size}")
        return kernel_named(cast(Any, self.config).kernel, size)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Lays the grid: ``timesteps`` falls from 1, and ``alphas`` (one more) rises to exactly 1.

        For a fixed number of network evaluations, corrections included, ``split_budget`` says how many steps to take.

        Args:
            num_inference_steps: predictor steps.
            device: of ``timesteps``. ``alphas`` are float64 on the CPU.

        Raises:
            ValueError: fewer than one.
        """
        grid = alpha_grid(num_inference_steps, cast(Any, self.config).timestep_spacing, schedule=self.schedule)
        times = time_at(self.schedule, grid[:-1])
        if cast(Any, self.config).timestep_spacing == "linear":
            times = 1 - torch.arange(num_inference_steps, dtype=torch.float64) / num_inference_steps
        self._times = times
        # From the times themselves: what the network is called with is then what the step computes with, bit for bit.
        self.alphas = torch.cat([self.schedule.alpha(times), torch.ones(1, dtype=torch.float64)])
        self.num_inference_steps = num_inference_steps
        self.timesteps = times.to(device or "cpu", torch.float32 if _is_mps(device) else torch.float64)

    def alpha(self, timestep: float | Tensor) -> Float[Tensor, "*times"]:
        """Survival probability at any time in [0, 1], float64 on the CPU; ``.expand(batch)`` it for the network."""
        if isinstance(timestep, Tensor):
            timestep = timestep.detach().to("cpu", torch.float64)
        return self.schedule.alpha(timestep)

    def alpha_after(self, timestep: float | Tensor) -> Float[Tensor, ""]:
        """Survival probability after the step from ``timestep``: 1 after the last.

        Raises:
            ValueError: a time that is not one of ``timesteps``.
        """
        return self.alphas[self._place(timestep) + 1]

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample as it is: tokens have no scale."""
        return sample

    def add_noise(
        self,
        original_samples: Int[Tensor, "batch length"],
        timesteps: Float[Tensor, " batch"],
        generator: Generators = None,
        *,
        given: Bool[Tensor, "batch length"] | None = None,
        vocab_size: int | None = None,
    ) -> TokenState:
        """The tokens at one time in [0, 1] for each sequence, with the noise tokens of kernels that have them.

        Args:
            original_samples: clean tokens.
            timesteps: times.
            generator: one, or one for each sequence.
            given: positions that stay clean.
            vocab_size: K, if the config does not say.

        Raises:
            ValueError: a vocabulary size that is nowhere given, tokens outside it, times out of range.
        """
        kernel = self.kernel(vocab_size)
        return kernel.corrupt(original_samples, self.alpha(timesteps), generator=generator, given=given)

    @torch.no_grad()
    def step(
        self,
        model_output: Float[Tensor, "batch length vocab"],
        timestep: float | Tensor,
        sample: Int[Tensor, "batch length"],
        generator: Generators = None,
        return_dict: bool = True,
        *,
        noise_tokens: Int[Tensor, "batch length"] | None = None,
        given: Bool[Tensor, "batch length"] | None = None,
        valid: Bool[Tensor, "batch length"] | None = None,
    ) -> UniformDiffusionSchedulerOutput | tuple[Tensor, Tensor | None]:
        """One step of the reverse chain, from ``timestep`` to the next of ``timesteps``.

        Args:
            model_output: the network's raw logits at ``sample`` and ``alpha(timestep)``.
            timestep: one of ``timesteps``.
            sample: x_t.
            generator: one, or one for each sequence: a sequence is then the same in any batch.
            return_dict: False for ``(prev_sample, prev_noise)``.
            noise_tokens: u, for absorbing kernels.
            given: positions that are known and do not move.
            valid: False on padding.

        Raises:
            ValueError: a time that is not one of ``timesteps``, a vocabulary other than the config's.
        """
        place = self._place(timestep)
        kernel, model = self._read(model_output)
        state = ancestral_step(
            model,
            kernel,
            TokenState(tokens=sample, noise=noise_tokens),
            self.alphas[place].expand(len(sample)),
            self.alphas[place + 1].expand(len(sample)),
            canvas=TextBatch(tokens=sample, given=given, valid=valid),
            settings=self.settings,
            generator=generator,
        )
        return _output(state, return_dict)

    @torch.no_grad()
    def step_correct(
        self,
        model_output: Float[Tensor, "batch length vocab"],
        timestep: float | Tensor,
        sample: Int[Tensor, "batch length"],
        generator: Generators = None,
        return_dict: bool = True,
        *,
        given: Bool[Tensor, "batch length"] | None = None,
        valid: Bool[Tensor, "batch length"] | None = None,
    ) -> UniformDiffusionSchedulerOutput | tuple[Tensor, Tensor | None]:
        """One Gibbs correction at the noise level that the step from ``timestep`` has reached.

        Call it ``corrector_steps`` times, each with logits at the sample that the last one returned and at
        ``alpha_after(timestep)``. Arguments as for ``step``.

        Raises:
            ValueError: no corrector in the config, one with a Metropolis test, or the last step, after which nothing is
                left to correct.
        """
        place = self._place(timestep)
        if self.corrector is None:
            raise ValueError("the scheduler has no corrector; set corrector_steps in its config")
        if self.corrector.metropolis and self.corrector.selection != "random":
            raise ValueError(
                "a Metropolis test compares the network at two states, and here is one; use the pipeline, "
                "wellposed.udm.sample, or corrector_metropolis=False"
            )
        if place + 1 == len(self.timesteps):
            raise ValueError("after the last step every token is clean; correct the steps before it")
        kernel, model = self._read(model_output)
        state = correct(
            model,
            kernel,
            TokenState(tokens=sample),
            self.alphas[place + 1].expand(len(sample)),
            corrector=_single(self.corrector),
            canvas=TextBatch(tokens=sample, given=given, valid=valid),
            settings=self.settings,
            generator=generator,
        )
        return _output(state, return_dict)

    def _read(self, logits: Tensor) -> tuple[Kernel, GivenLogits]:
        kernel = self.kernel(logits.shape[-1])
        kind = cast(Any, self.config).prediction_kind
        return kernel, GivenLogits(logits=logits, kind=kind, channel=kernel.channel)

    def _place(self, timestep: float | Tensor) -> int:
        time = float(timestep)
        place = int((self._times - time).abs().argmin())
        if abs(float(self._times[place]) - time) > TIME_TOLERANCE * time:
            raise ValueError(
                f"timestep {time:g} is not one of the scheduler's; step through scheduler.timesteps, times in (0, 1]"
            )
        return place


@saved_class
class LeaveOneOutDDIMScheduler(DiscreteDDIMScheduler):
    r"""``DiscreteDDIMScheduler`` with the temperature where it belongs, draws of any vocabulary, an exact corrector.

    It takes the place of its parent wherever that is used, ``DiffusionGemmaPipeline`` first of all::

        pipe.scheduler = LeaveOneOutDDIMScheduler.from_config(pipe.scheduler.config)

    Steps are the integers 0 to n - 1, alpha = i / n, and a step's law at temperature 1 is the parent's. What differs:

    * a temperature other than 0 and 1 divides the leave-one-out logits (the parent: the denoiser's). The evidence of
      the position's own noisy token stays what it is; tempering it too leaves a factor ``R^(1/temperature - 1)``, which
      for a large vocabulary clings to noise;
    * ``generator`` may be one for each sequence;
    * the correction makes no copies of the logits in float64;
    * logits may be leave-one-out already (UDLM, DUO and what is trained with their objective), see ``prediction_kind``.

    At temperature 0, the default of a call, x_0 is the denoiser's argmax, as in the parent. A correction leaves the
    marginal law of its noise level as it is if positions are chosen at random, one at a time, which is
    ``corrector_selection="random", corrector_k=1``. An informed choice, or several at once, does not, although the
    parent's documentation says so; it is an approximation, often a good one.

    For DiffusionGemma itself the leave-one-out posterior is approximate in any case. Its network is told no time, so
    that it must guess what its own token is worth, and self-conditioning hands it logits that were computed from an
    earlier value of that token.

    Args:
        num_inference_steps: n.
        corrector_steps: Gibbs corrections after a step; 0 for none.
        corrector_k: positions that each resamples.
        corrector_selection: "random", "lowest_log_margin", "lowest_maxprob" or "lowest_current_prob".
        corrector_selection_tau: temperature of that choice.
        prediction_kind: what the logits are, "denoiser" or "leave_one_out".
        temper: what a temperature divides; "denoiser" is the parent's.

    Raises:
        ValueError: an unknown name, or a value out of range.
    """

    _compatibles: ClassVar[list[str]] = ["DiscreteDDIMScheduler"]

    @register_to_config
    def __init__(
        self,
        num_inference_steps: int = 32,
        corrector_steps: int = 0,
        corrector_k: int = 1,
        corrector_selection: Selection = "lowest_log_margin",
        corrector_selection_tau: float | int = 1.0,
        prediction_kind: PredictionKind = "denoiser",
        temper: PredictionKind = "leave_one_out",
    ) -> None:
        super().__init__(
            num_inference_steps=num_inference_steps,
            corrector_steps=corrector_steps,
            corrector_k=corrector_k,
            corrector_selection=corrector_selection,
            corrector_selection_tau=corrector_selection_tau,
        )
        if prediction_kind not in ("leave_one_out", "denoiser"):
            raise ValueError(f"prediction_kind is {prediction_kind!r}; write 'leave_one_out' or 'denoiser'")
        SamplingSettings(temper=temper)
        self.corrector = Corrector(
            steps=1, k=corrector_k, selection=corrector_selection, selection_temperature=corrector_selection_tau
        )

    @classmethod
    def from_config(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, config: Mapping[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """As diffusers', for configs of ``UniformDiffusionScheduler`` too."""
        names = ("corrector_selection_tau", "corrector_selection_temperature")
        return cast(Any, super()).from_config(config, return_unused_kwargs, **(_carried(config, names) | kwargs))

    @torch.no_grad()
    def step(
        self,
        model_output: Float[Tensor, "batch length vocab"],
        timestep: int | Tensor,
        sample: Int[Tensor, "batch length"],
        *,
        temperature: float | int = 0.0,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> DiscreteDDIMSchedulerOutput | tuple[Tensor, Tensor, Tensor, Tensor]:
        """As the parent's: draws x_0 everywhere, then x_s from the bridge towards it.

        Args:
            model_output: the network's raw logits.
            timestep: the step's number, from 0.
            sample: x_t.
            temperature: see the class; 0 takes the denoiser's argmax.
            generator: one, or one for each sequence.
            return_dict: False for ``(prev_sample, sampled_tokens, sampled_probs, pred_logits)``.

        Raises:
            ValueError: a negative temperature, or a step outside 0 to n - 1.
        """
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}; write 0 for the argmax, or a positive number")
        alpha_t, alpha_s = self._alphas(timestep)
        choices, routes, noise = (uniform_numbers(sample, generator) for _ in range(3))
        denoiser = self._rows(model_output, sample, alpha_t, "denoiser")
        if temperature == 0:
            x_0 = denoiser.logits.argmax(-1)
        else:
            tempered = denoiser
            if temperature != 1:
                tempered = self._rows(model_output, sample, alpha_t, cast(Any, self.config).temper)
                tempered = tempered.tempered(temperature).denoiser()
            x_0 = draw_tokens(tempered.logits, choices.flatten())
        sampled_probs = own_log_prob(denoiser.logits, x_0).exp()
        x_0 = x_0.view_as(sample)

        t, s = (torch.full_like(routes, alpha) for alpha in (alpha_t, alpha_s))
        take_clean, take_noise = uniform_routes((x_0 == sample).to(routes.dtype), t, s, routes, model_output.shape[-1])
        prev_sample = torch.where(take_noise, random_tokens(noise, model_output.shape[-1]), sample)
        prev_sample = torch.where(take_clean, x_0, prev_sample)
        return _ddim_output(prev_sample, x_0, sampled_probs.view(sample.shape), model_output, return_dict)

    @torch.no_grad()
    def step_correct(
        self,
        model_output: Float[Tensor, "batch length vocab"],
        timestep: int | Tensor,
        sample: Int[Tensor, "batch length"],
        *,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> DiscreteDDIMSchedulerOutput | tuple[Tensor, Tensor, Tensor, Tensor]:
        """As the parent's: one Gibbs correction at the level that step ``timestep`` has reached, untempered.

        ``sampled_tokens`` and ``sampled_probs`` are those of the ``corrector_k`` positions, in their order.

        Raises:
            ValueError: the last step, after which nothing is left to correct, or one outside 0 to n - 1.
        """
        _, alpha = self._alphas(timestep)
        if alpha == 1:
            raise ValueError("after the last step every token is clean; correct the steps before it")
        kernel = Uniform(model_output.shape[-1])
        plugged = Plugged(
            model=GivenLogits(logits=model_output, kind=cast(Any, self.config).prediction_kind),
            state=TokenState(tokens=sample),
            alpha=torch.full((len(sample),), alpha, dtype=torch.float64),
            canvas=TextBatch(tokens=sample),
            kind=kernel.plugs_in,
            settings=SamplingSettings(),
            record=SamplingRecord(),
        )
        everywhere = torch.ones_like(sample, dtype=torch.bool)
        if self.corrector.selection == "random":
            chosen = choose_positions(
                torch.zeros(sample.shape, device=sample.device), everywhere, self.corrector, generator
            )
            rows = plugged.predict(chosen)
        else:
            prediction = plugged.predict(everywhere)
            scores = scattered(selection_scores(prediction, self.corrector.selection), everywhere)
            chosen = choose_positions(scores, everywhere, self.corrector, generator)
            rows = prediction.rows(chosen.flatten())
        prev_sample = resample(plugged, rows, sample, chosen, generator)
        resampled = prev_sample[chosen]
        clean = own_log_prob(rows.logits, resampled).exp()
        probs = alpha * clean + (1 - alpha) / kernel.vocab_size
        shape = (len(sample), -1)
        return _ddim_output(prev_sample, resampled.view(shape), probs.view(shape), model_output, return_dict)

    def _rows(self, logits: Tensor, sample: Tensor, alpha: float, kind: PredictionKind) -> Prediction:
        """Every position's prediction, as rows."""
        own = cast(Any, self.config).prediction_kind
        return Prediction(
            kind=own,
            logits=logits.reshape(-1, logits.shape[-1]),
            # At alpha = 0 a token carries no evidence, which is also the limit; a Prediction does not go that far.
            alpha=torch.full((sample.numel(),), max(alpha, 1e-300), dtype=torch.float64),
            tokens=sample.flatten(),
        ).to(kind)

    def _alphas(self, timestep: int | Tensor) -> tuple[float, float]:
        index = int(timestep)
        if not 0 <= index < self.num_inference_steps:
            raise ValueError(f"step {index} is outside 0 to {self.num_inference_steps - 1}; see set_timesteps")
        return self._alpha(index), self._alpha(index + 1)


def _carried(config: Mapping[str, Any] | None, names: tuple[str, str]) -> dict[str, Any]:
    """What a config says in the words of the other scheduler, or says by its own default, as diffusers would not see.

    Args:
        config: of either.
        names: of the selection's temperature, here and there.
    """
    if not isinstance(config, Mapping):
        return {}
    here, there = names
    carried: dict[str, Any] = {}
    if "prediction_kind" in config:
        carried["prediction_kind"] = config["prediction_kind"]
    elif "corrector_selection_tau" in config:  # diffusers' own, which is fed denoisers
        carried["prediction_kind"] = "denoiser"
    if here not in config and there in config:
        carried[here] = config[there]
    return carried


def _single(corrector: Corrector) -> Corrector:
    return Corrector(
        steps=1,
        k=corrector.k,
        selection=corrector.selection,
        selection_temperature=corrector.selection_temperature,
    )


def _is_mps(device: str | torch.device | None) -> bool:
    return device is not None and torch.device(device).type == "mps"  # which has no float64


def _output(state: TokenState, return_dict: bool) -> Any:
    if not return_dict:
        return state.tokens, state.noise
    return UniformDiffusionSchedulerOutput(prev_sample=state.tokens, prev_noise=state.noise)


def _ddim_output(
    prev_sample: Tensor, sampled_tokens: Tensor, sampled_probs: Tensor, pred_logits: Tensor, return_dict: bool
) -> Any:
    if not return_dict:
        return prev_sample, sampled_tokens, sampled_probs, pred_logits
    return DiscreteDDIMSchedulerOutput(
        prev_sample=cast(Any, prev_sample),
        sampled_tokens=cast(Any, sampled_tokens),
        sampled_probs=sampled_probs,
        pred_logits=pred_logits,
    )
