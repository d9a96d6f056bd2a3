"""Tiny real components: a Lens transformer of 332 thousand parameters, FLUX.2's autoencoder, and inputs for both."""

import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLFlux2

from tests.lens.chat_server import Endpoint
from tests.lens.tiny_gpt_oss import tiny_gpt_oss, tiny_tokenizer
from wellposed.lens.pipeline import LensPipeline
from wellposed.lens.scheduler import LensFlowMatchScheduler
from wellposed.lens.transformer import LensTransformer2DModel

TINY: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "inner_dim": 64,
    "enc_hidden_dim": 64,
    "axes_dims_rope": [4, 14, 14],
    "selected_layer_index": [0, 1, 2, 3],
}


@pytest.fixture
def build_lens() -> Callable[..., LensTransformer2DModel]:
    """A network whose weights all say something; an untrained one says zero."""

    def lens(**fields: Any) -> LensTransformer2DModel:
        model = LensTransformer2DModel(**{**TINY, **fields}).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                centre = 1.0 if "norm" in name and parameter.ndim == 1 and "linear" not in name else 0.0
                parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
        return model

    return lens


@pytest.fixture
def lens_inputs() -> Callable[..., dict[str, Any]]:
    """Arguments of a call: pictures of ``rows`` x ``columns`` tokens, texts of ``text`` tokens, the last ``padded`` of
    the last one masked.
    """

    def inputs(
        rows: int = 3, columns: int = 5, text: int = 6, *, batch: int = 2, padded: int = 0, dtype: Any = torch.float32
    ) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)
        mask = torch.ones(batch, text, dtype=torch.bool)
        mask[-1, text - padded :] = False
        features = torch.randn(4, batch, text, TINY["enc_hidden_dim"], generator=generator, dtype=torch.float64)
        return {
            "hidden_states": torch.randn(batch, rows * columns, 16, generator=generator, dtype=torch.float64).to(dtype),
            "encoder_hidden_states": list(features.to(dtype)),
            "encoder_hidden_states_mask": mask,
            "timestep": torch.linspace(0.2, 0.9, batch),
            "img_shapes": [(1, rows, columns)] * batch,
        }

    return inputs


@pytest.fixture
def tiny_vae() -> AutoencoderKLFlux2:
    """With statistics that differ from channel to channel."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        vae: Any = AutoencoderKLFlux2(
            block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32
        ).eval()
    generator = torch.Generator().manual_seed(2)
    vae.bn.running_mean.copy_(torch.randn(16, generator=generator))
    vae.bn.running_var.copy_(torch.rand(16, generator=generator) + 0.1)
    return vae


@pytest.fixture
def pipes(build_lens: Callable[..., LensTransformer2DModel], tiny_vae: AutoencoderKLFlux2) -> Callable[..., Any]:
    """Pipelines of tiny real parts, all of them; ``scheduler`` are its fields, the rest is the pipeline's."""

    def pipeline(*, scheduler: dict[str, Any] | None = None, **fields: Any) -> LensPipeline:
        parts = {
            "scheduler": LensFlowMatchScheduler(**(scheduler or {})),
            "vae": tiny_vae,
            "text_encoder": tiny_gpt_oss(),
            "tokenizer": tiny_tokenizer(),
            "transformer": build_lens(),
        }
        pipe = LensPipeline(**{**parts, **fields})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return pipeline


@pytest.fixture
def endpoint() -> Iterator[type[Endpoint]]:
    """A server that is running at ``url``, answers with ``answers`` and keeps ``requests``."""
    handler = type("EndpointHere", (Endpoint,), {"answers": [], "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    handler.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()
