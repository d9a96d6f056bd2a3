"""DiffusionGemma under the room's samplers and correctors."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from wellposed.udm.kernels import TokenState
from wellposed.udm.prediction import Prediction

__all__ = ["DiffusionGemmaDenoiser"]


@dataclass(frozen=True, eq=False, kw_only=True)
class DiffusionGemmaDenoiser:
    """One canvas of a ``DiffusionGemmaForBlockDiffusion`` after a prompt, as a ``TokenModel``: a denoiser.

    It was trained with cross-entropy under uniform noise, so its logits are a denoiser's, and the leave-one-out
    posterior follows by conversion. Approximately: the network is told no time, so that it must guess from the canvas
    what its own token is worth. Self-conditioning would leak more of that token, through logits that were computed from
    an earlier canvas; here it is off, which the network was trained for as well. For generation with it, put
    ``LeaveOneOutDDIMScheduler`` into diffusers' pipeline.

    Attributes:
        model: transformers' model.
        cache: keys and values of the prompt, see ``after``.
        prompt_mask: True where the prompt is no padding.
    """

    model: Any
    cache: Any
    prompt_mask: Bool[Tensor, "batch prompt"]

    @classmethod
    @torch.no_grad()
    def after(
        cls,
        model: Any,
        prompt_ids: Int[Tensor, "batch prompt"],
        prompt_mask: Bool[Tensor, "batch prompt"] | None = None,
    ) -> "DiffusionGemmaDenoiser":
        """Reads a prompt once.

        Args:
            model: transformers' model.
            prompt_ids: the prompt, chat template included.
            prompt_mask: False on padding.
        """
        mask = torch.ones_like(prompt_ids, dtype=torch.bool) if prompt_mask is None else prompt_mask
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        positions = torch.arange(prompt_ids.shape[1], device=prompt_ids.device).unsqueeze(0)
        model.model.encoder(
            input_ids=prompt_ids, attention_mask=mask.long(), past_key_values=cache, position_ids=positions
        )
        return cls(model=model, cache=cache, prompt_mask=mask)

    def __call__(
        self,
        state: TokenState,
        alpha: Float[Tensor, " batch"],
        *,
        given: Bool[Tensor, "batch length"] | None = None,
        valid: Bool[Tensor, "batch length"] | None = None,
        rows: Bool[Tensor, "batch length"] | None = None,
    ) -> Prediction:
        """See ``TokenModel``. alpha is needed for conversions only, and given tokens look like any others.

        Raises:
            ValueError: padding, which a canvas has none of.
        """
        if valid is not None:
            raise ValueError("a canvas of DiffusionGemma has no padding; write texts of one length")
        tokens = state.tokens
        start = self.prompt_mask.shape[1]
        everything = torch.cat([self.prompt_mask, torch.ones_like(tokens, dtype=torch.bool)], dim=1)
        masks = self.model.model.decoder.create_diffusion_decoder_attention_mask(
            config=self.model.config,
            inputs_embeds=torch.empty((*tokens.shape, 0), device=tokens.device),
            past_key_values=self.cache,
            decoder_attention_mask=everything,
        )
        logits = self.model(
            decoder_input_ids=tokens,
            past_key_values=self.cache,
            decoder_attention_mask=masks,
            decoder_position_ids=torch.arange(start, start + tokens.shape[1], device=tokens.device).unsqueeze(0),
        ).logits
        prediction = Prediction(kind="denoiser", logits=logits, alpha=alpha, tokens=tokens)
        return prediction if rows is None else prediction.rows(rows)
