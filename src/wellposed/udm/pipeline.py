"""Text from a prompt, a text with holes, or nothing, by discrete diffusion."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from diffusers import DiffusionPipeline, DiscreteDDIMScheduler
from diffusers.utils import BaseOutput
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from wellposed.batches import TextBatch
from wellposed.saving import saved_class
from wellposed.udm.draws import Generators
from wellposed.udm.kernels import Kernel, TokenState
from wellposed.udm.models import NetworkModel
from wellposed.udm.remasking import Remasking
from wellposed.udm.sampler import sample, split_budget
from wellposed.udm.scheduler import UniformDiffusionScheduler
from wellposed.udm.transformer import UniformDiffusionTransformerModel

__all__ = ["UniformDiffusionPipeline", "UniformDiffusionPipelineOutput", "prompt_canvas"]

TOKENS_PER_HOLE = 8

TokensPerHole = int | Sequence[int] | Sequence[Sequence[int]]

StepEndCallback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None]


@dataclass
class UniformDiffusionPipelineOutput(BaseOutput):
    """What the pipeline returns.

    Attributes:
        texts: the whole texts, what was given included; None where ids were asked for.
        ids: their tokens, one vector for each text.
        evaluations: calls of the network, each with all texts at once.
    """

    texts: list[str] | None
    ids: list[Tensor]
    evaluations: int


class _InterruptedError(Exception):
    """Leaves the sampler's loop after a step."""

    def __init__(self, state: TokenState) -> None:
        super().__init__()
        self.state = state


def prompt_canvas(
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    length: int | None = None,
    hole: str | None = "____",
    tokens_per_hole: TokensPerHole = TOKENS_PER_HOLE,
) -> TextBatch:
    """Prompts as tokens that are given, with places to be written.

    The pieces of text between holes are tokenized one by one and stand in the result letter for letter, spaces at their
    ends included; no special tokens are added.

    Args:
        tokenizer: of the model.
        prompts: each a text to continue to ``length`` tokens, a text with holes, or both.
        length: tokens of each result. None: as many as its pieces and holes take; text after the last hole is then not
            continued.
        hole: marks a place to be written; None if nothing does.
        tokens_per_hole: tokens of a hole: one number for all, one for each hole of a prompt, or such a list for each
            prompt.

    Returns:
        Tokens with ``given``; shorter ones are padded at their end, which ``valid`` says.

    Raises:
        ValueError: no prompts, a prompt with nothing to write, one longer than ``length``, numbers of tokens that do
            not match the holes.
    """
    if not prompts:
        raise ValueError("there is no prompt in the list; pass at least one, or None to write without one")
    texts: list[list[int]] = []
    knowns: list[list[bool]] = []
    for index, prompt in enumerate(prompts):
        pieces = prompt.split(hole) if hole else [prompt]
        sizes = _sizes_of(tokens_per_hole, index, len(prompts), len(pieces) - 1)
        ids: list[int] = []
        known: list[bool] = []
        for piece, size in zip(pieces, [*sizes, 0], strict=True):
            encoded = tokenizer.encode(piece, add_special_tokens=False)
            ids += encoded + [0] * size
            known += [True] * len(encoded) + [False] * size
        if length is not None:
            if len(ids) > length:
                raise ValueError(f"prompt {index} takes {len(ids)} tokens with its holes, more than length={length}")
            known += [False] * (length - len(ids))
            ids += [0] * (length - len(ids))
        if all(known):
            raise ValueError(
                f"prompt {index} leaves nothing to write: mark a place with {hole!r}, or pass length, the number of "
                f"tokens to continue it to (it has {len(ids)})"
            )
        texts.append(ids)
        knowns.append(known)
    longest = max(map(len, texts))
    valid = torch.tensor([[i < len(ids) for i in range(longest)] for ids in texts])
    return TextBatch(
        tokens=torch.tensor([ids + [0] * (longest - len(ids)) for ids in texts]),
        given=torch.tensor([known + [False] * (longest - len(known)) for known in knowns]),
        valid=None if bool(valid.all()) else valid,
    )


def _sizes_of(tokens_per_hole: TokensPerHole, index: int, prompts: int, holes: int) -> list[int]:
    """Tokens of each hole of one prompt."""
    if isinstance(tokens_per_hole, int):
        sizes = [tokens_per_hole] * holes
    else:
        listed: Sequence[Any] = tokens_per_hole
        if any(isinstance(entry, Sequence) for entry in listed):
            if len(listed) != prompts:
                raise ValueError(f"tokens_per_hole has {len(listed)} lists for {prompts} prompts; give one for each")
            listed = listed[index]
        sizes = list(cast(Sequence[int], listed))
        if len(sizes) != holes:
            raise ValueError(
                f"tokens_per_hole has {len(sizes)} numbers, prompt {index} has {holes} holes; give one for each hole, "
                "or one number for all"
            )
    if any(size < 1 for size in sizes):
        raise ValueError(f"tokens_per_hole is {tokens_per_hole}; a hole takes at least 1 token")
    return sizes


@saved_class
class UniformDiffusionPipeline(DiffusionPipeline):
    r"""Writes texts by discrete diffusion: freely, after a prompt, or into the holes of one.

    ::

        pipe("def area(r):\n    return ____ * r ** 2", num_inference_steps=64, corrector_steps=2).texts[0]

    Args:
        transformer: the network.
        scheduler: the reverse process. Where it differs from the network in what its logits are, the network is right
            (``prediction_kind``); diffusers' own is converted.
        tokenizer: of the network's vocabulary; None for sequences that are no text.

    Raises:
        ValueError: components that do not fit together: another vocabulary, a kernel that the network was not built
            for.
    """

    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs: ClassVar[list[str]] = ["tokens"]
    _optional_components: ClassVar[list[str]] = ["tokenizer"]
    _interrupt = False
    _num_timesteps = 0

    def __init__(
        self,
        transformer: UniformDiffusionTransformerModel,
        scheduler: UniformDiffusionScheduler | DiscreteDDIMScheduler,
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> None:
        super().__init__()
        network = cast(Any, transformer.config)
        own = scheduler if isinstance(scheduler, UniformDiffusionScheduler) else None
        if own is None or cast(Any, own.config).prediction_kind != network.prediction_kind:
            kind = UniformDiffusionScheduler if own is None else type(own)
            own = cast(Any, kind).from_config(scheduler.config, prediction_kind=network.prediction_kind)
        _check_fit(network, own.kernel(network.vocab_size), cast(Any, own.config).kernel)
        if tokenizer is not None and len(tokenizer) != network.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens and the transformer writes {network.vocab_size}: one of "
                "them belongs to another checkpoint"
            )
        self.register_modules(transformer=transformer, scheduler=own, tokenizer=tokenizer)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        num_inference_steps: int = 64,
        length: int | None = None,
        num_texts_per_prompt: int = 1,
        hole: str | None = "____",
        tokens_per_hole: TokensPerHole | None = None,
        given_tokens: Tensor | None = None,
        given_mask: Tensor | None = None,
        evaluations: int | None = None,
        temperature: float | int | None = None,
        top_p: float | int | None = None,
        top_k: int | None = None,
        min_p: float | int | None = None,
        corrector_steps: int | None = None,
        corrector_k: int | None = None,
        remasking: Remasking | None = None,
        strategy: Literal["ancestral", "confidence"] = "ancestral",
        generator: Generators = None,
        output_type: Literal["text", "ids"] = "text",
        return_dict: bool = True,
        callback_on_step_end: StepEndCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("tokens",),
    ) -> UniformDiffusionPipelineOutput | tuple[Any, ...]:
        """Writes texts.

        What is given stays as it is. A network with ``given_embedding`` is told which tokens those are; one for masked
        or absorbing noise sees it. One for uniform noise without that embedding takes them for noisy tokens, follows
        them loosely, and a warning says so.

        Args:
            prompt: a text or several, with ``hole`` wherever something is to be written; without holes it is continued
                to ``length`` tokens. None for texts from nothing, of ``length`` tokens.
            num_inference_steps: steps of the sampler; corrections come on top.
            length: tokens of a text, the prompt included. None: what pieces and holes of the prompt take.
            num_texts_per_prompt: how many texts to write for each prompt.
            hole: what marks a place to be written; None if nothing does.
            tokens_per_hole: tokens of a hole, 8 by default: a number, one for each hole, or a list for each prompt.
            given_tokens: in place of a prompt, tokens of whole sequences (the clues of a puzzle), (prompts, length);
                anything where ``given_mask`` is False.
            given_mask: True where a token is given, bool of the same shape.
            evaluations: calls of the network to spend, corrections included, in place of ``num_inference_steps``; see
                ``split_budget``.
            temperature: in place of the scheduler's, as are the next five.
            top_p: nucleus of a draw.
            top_k: likeliest tokens that a draw may choose from.
            min_p: least probability relative to the likeliest.
            corrector_steps: Gibbs corrections after a step; 0 for none.
            corrector_k: positions that each resamples.
            remasking: revision for masked and absorbing kernels.
            strategy: "confidence" writes the likeliest tokens where they gain most, see ``confidence_step``.
            generator: one, or one for each text: a text is then the same in any batch of its length.
            output_type: "ids" leaves texts out and needs no tokenizer.
            return_dict: False for ``(texts, ids, evaluations)``.
            callback_on_step_end: called with (pipe, step, timestep, {"tokens": x}) after every step; may return other
                tokens in a dict. Setting ``pipe._interrupt = True`` in it ends the loop.
            callback_on_step_end_tensor_inputs: what the callback wants to see.

        Raises:
            ValueError: prompts and options that do not make a task; each says what to write instead.
        """
        if output_type not in ("text", "ids"):
            raise ValueError(f"output_type is {output_type!r}; write 'text' or 'ids'")
        if output_type == "text" and self.tokenizer is None:
            raise ValueError("the pipeline has no tokenizer; write output_type='ids'")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            known = ", ".join(self._callback_tensor_inputs)
            raise ValueError(f"callback tensor inputs can be {known}; got also {', '.join(sorted(unknown))}")
        canvas = self._canvas(prompt, length, hole, tokens_per_hole, given_tokens, given_mask)
        canvas = _repeated(canvas, num_texts_per_prompt, self._execution_device)
        if isinstance(generator, Sequence) and len(generator) != len(canvas.tokens):
            raise ValueError(
                f"got {len(generator)} generators for {len(canvas.tokens)} texts; pass one, or one for each text"
            )
        options = {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "corrector_steps": corrector_steps,
            "corrector_k": corrector_k,
        }
        scheduler = self._scheduler_with({name: value for name, value in options.items() if value is not None})
        corrected = None
        if evaluations is not None:
            num_inference_steps, corrected = split_budget(evaluations, scheduler.corrector)
        scheduler.set_timesteps(num_inference_steps)
        plan = None
        if remasking is not None:
            if cast(Any, scheduler.config).timestep_spacing != "linear":
                raise ValueError(
                    "remasking is planned on a linear grid; use a scheduler with timestep_spacing='linear'"
                )
            plan = remasking.plan(num_inference_steps, schedule=scheduler.schedule)
        model, calls = self._model(scheduler, canvas)

        self._interrupt, self._num_timesteps = False, num_inference_steps
        with cast(Any, self).progress_bar(total=num_inference_steps) as progress:

            def on_step(index: int, state: TokenState) -> TokenState:
                if callback_on_step_end is not None:
                    shown = {"tokens": state.tokens} if callback_on_step_end_tensor_inputs else {}
                    answer = callback_on_step_end(self, index, scheduler.timesteps[index], shown) or {}
                    state = replace(state, tokens=answer.get("tokens", state.tokens))
                progress.update()
                if self.interrupt:
                    raise _InterruptedError(state)
                return state

            try:
                tokens, _ = sample(
                    model,
                    scheduler.kernel(self.transformer.config.vocab_size),
                    canvas,
                    scheduler.alphas if plan is None else plan.alphas,
                    settings=scheduler.settings,
                    corrector=scheduler.corrector,
                    corrected_steps=corrected,
                    sigmas=None if plan is None else plan.sigmas,
                    strategy=strategy,
                    generator=generator,
                    on_step=on_step,
                )
            except _InterruptedError as interrupted:
                tokens = interrupted.state.tokens
        self.maybe_free_model_hooks()

        ids = [row if canvas.valid is None else row[canvas.valid[i]] for i, row in enumerate(tokens)]
        texts = self._decoded(ids) if output_type == "text" else None
        output = UniformDiffusionPipelineOutput(texts=texts, ids=ids, evaluations=len(calls))
        return output if return_dict else (texts, ids, len(calls))

    @property
    def interrupt(self) -> bool:
        """Set ``pipe._interrupt = True`` in a callback to stop after the current step."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Steps of the running call."""
        return self._num_timesteps

    def _canvas(
        self,
        prompt: str | Sequence[str] | None,
        length: int | None,
        hole: str | None,
        tokens_per_hole: TokensPerHole | None,
        given_tokens: Tensor | None,
        given_mask: Tensor | None,
    ) -> TextBatch:
        if (given_tokens is None) != (given_mask is None):
            raise ValueError("given_tokens and given_mask belong together; pass both, or neither")
        if given_tokens is not None and given_mask is not None:
            if prompt is not None:
                raise ValueError("a prompt and given_tokens say the same thing twice; pass one of them")
            if length not in (None, given_tokens.shape[1]):
                raise ValueError(f"given_tokens are {given_tokens.shape[1]} long, length is {length}; leave it out")
            return self._given_canvas(given_tokens, given_mask)
        if length is not None and length < 1:
            raise ValueError(f"length is {length}; a text has at least 1 token")
        if prompt is None:
            if length is None:
                raise ValueError("how long the texts should be is not said: pass length, a prompt with holes, or both")
            return TextBatch(tokens=torch.zeros(1, length, dtype=torch.long))
        if self.tokenizer is None:
            raise ValueError("the pipeline has no tokenizer to read a prompt with; pass given_tokens and given_mask")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        sizes = TOKENS_PER_HOLE if tokens_per_hole is None else tokens_per_hole
        return prompt_canvas(self.tokenizer, prompts, length=length, hole=hole, tokens_per_hole=sizes)

    def _given_canvas(self, given_tokens: Tensor, given_mask: Tensor) -> TextBatch:
        vocab_size = self.transformer.config.vocab_size
        if given_mask.dtype != torch.bool or given_mask.shape != given_tokens.shape:
            raise ValueError(
                f"given_mask must be bool with the shape of given_tokens, {tuple(given_tokens.shape)}; got "
                f"{given_mask.dtype} of shape {tuple(given_mask.shape)}"
            )
        if given_tokens.ndim != 2 or given_tokens.numel() == 0:
            raise ValueError(f"given_tokens must have shape (prompts, length), got {tuple(given_tokens.shape)}")
        known = given_tokens[given_mask]
        if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < vocab_size:
            raise ValueError(
                f"given tokens must lie in 0..{vocab_size - 1}, the network's vocabulary; got values in "
                f"{int(known.min())}..{int(known.max())}"
            )
        if bool(given_mask.all(-1).any()):
            raise ValueError("a sequence of given_tokens is given entirely, which leaves nothing to write")
        return TextBatch(tokens=given_tokens.long().masked_fill(~given_mask, 0), given=given_mask)

    def _scheduler_with(self, options: dict[str, Any]) -> UniformDiffusionScheduler:
        if not options:
            return self.scheduler
        return type(self.scheduler).from_config(self.scheduler.config, **options)

    def _model(self, scheduler: UniformDiffusionScheduler, canvas: TextBatch) -> tuple[NetworkModel, list[None]]:
        """The network, as the sampler asks it, and a list that grows by one entry with every call."""
        config = self.transformer.config
        kernel = scheduler.kernel(config.vocab_size)
        if kernel.channel == "uniform" and canvas.given is not None and not config.given_embedding:
            warnings.warn(
                "this network was built without given_embedding: under uniform noise it takes given tokens for noisy "
                "ones and follows them loosely, least of all in the first steps; train one with given_embedding=True "
                "for prompts and infilling",
                stacklevel=3,
            )
        calls: list[None] = []

        def network(**inputs: Any) -> Any:
            calls.append(None)
            return self.transformer(**inputs)

        model = NetworkModel(
            network=network,
            kind=config.prediction_kind,
            channel=kernel.channel,
            knows_given=config.given_embedding,
        )
        return model, calls

    def _decoded(self, ids: Sequence[Tensor]) -> list[str]:
        # The masks that an interrupted chain may still hold decode to nothing.
        return [cast(str, self.tokenizer.decode(row.tolist(), skip_special_tokens=True)) for row in ids]


def _check_fit(network: Any, kernel: Kernel, name: str) -> None:
    if kernel.channel == "masked" and not network.mask_token:
        raise ValueError("a masked kernel needs a network with an input vector for the mask, mask_token=True")
    if (kernel.channel == "absorbing") != (network.absorbing_fusion is not None):
        raise ValueError(
            f"the scheduler's kernel is {name!r} and the network's absorbing_fusion is {network.absorbing_fusion!r}: "
            "absorbing kernels, and only they, need a network that sees the noise tokens"
        )


def _repeated(canvas: TextBatch, times: int, device: torch.device) -> TextBatch:
    if times < 1:
        raise ValueError(f"num_texts_per_prompt is {times}; write at least 1")

    def each(values: Tensor | None) -> Any:
        return None if values is None else values.to(device).repeat_interleave(times, 0)

    return TextBatch(tokens=each(canvas.tokens), given=each(canvas.given), valid=each(canvas.valid))
