"""Blocks that say themselves where their tokens are: the transformer of Lens, and one that shares no name with it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from diffusers import AutoencoderKLFlux2
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from wellposed.dito.adapters import find_blocks, supported_blocks
from wellposed.dito.config import TokenReductionConfig
from wellposed.dito.forecast import forecast, recommend
from wellposed.dito.schedule import FixedInterval
from wellposed.hooks import apply_token_reduction, remove_token_reduction, token_reduction
from wellposed.lens.pipeline import LensPipeline
from wellposed.lens.scheduler import LensFlowMatchScheduler
from wellposed.lens.transformer import LensTransformer2DModel, LensTransformerBlock

ROWS, COLUMNS, TEXT, PADDED = 4, 6, 5, 2
TOKENS = ROWS * COLUMNS
WIDTH, HEADS = 32, 2

# keep_kv computes keys apart from queries, which rounds differently.
ROUNDING = 1e-6


def settings(**fields: Any) -> TokenReductionConfig:
    """Of tiny models: no rounding to multiples of 16, no dense step at the end."""
    return TokenReductionConfig(**{"ratio": 0.5, "round_to": 1, "end_dense_steps": 0, **fields})


# --- a block of one's own


class OwnProcessor:
    """Joint attention, text first."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, turns: Any = None, is_word: Any = None
    ) -> tuple[Tensor, Tensor]:
        num_text = encoder_hidden_states.shape[1]
        streams = attn.of_words(encoder_hidden_states), attn.of_picture(hidden_states)
        parts = [part.unflatten(-1, (attn.heads, -1)) for part in torch.cat(streams, 1).chunk(3, -1)]
        query, key = ((part if turns is None else apply_rotary_emb(part, turns, sequence_dim=1)) for part in parts[:2])
        mask = None
        if is_word is not None:
            mask = torch.cat([is_word, is_word.new_ones(len(query), hidden_states.shape[1])], 1)[:, None, None]
        attended = dispatch_attention_fn(query, key, parts[2], attn_mask=mask).flatten(2)
        return attn.to_out[0](attended[:, num_text:]), attn.to_add_out(attended[:, :num_text])


class OwnAttention(nn.Module):
    _available_processors: ClassVar[list[Any]] = [OwnProcessor]

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.inner_dim = HEADS, WIDTH
        self.norm_q = self.norm_k = self.norm_added_q = self.norm_added_k = None
        self.of_picture, self.of_words = (nn.Linear(WIDTH, 3 * WIDTH, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])
        self.to_add_out = nn.Linear(WIDTH, WIDTH)
        self.processor: Any = OwnProcessor()

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, turns: Any = None, is_word: Any = None
    ) -> tuple[Tensor, Tensor]:
        named = {"encoder_hidden_states": encoder_hidden_states, "turns": turns, "is_word": is_word}
        return self.processor(self, hidden_states, **named)


class OwnBlock(nn.Module):
    """Returns the picture first, and calls it so."""

    token_layout: ClassVar[dict[str, Any]] = {
        "order": "text, image",
        "attention": "mixer",
        "condition": "mood",
        "rotation": "turns",
        "text_mask": "is_word",
        "image_qkv": "of_picture",
        "text_qkv": "of_words",
        "attention_input": "to_mixer",
    }

    def __init__(self) -> None:
        super().__init__()
        self.mixer = OwnAttention()
        self.shift = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.ff, self.ff_context = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def to_mixer(self, picture: Tensor, mood: Tensor) -> Tensor:
        return self.norm(picture) + self.shift(mood)[:, None]

    def forward(
        self, picture: Tensor, encoder_hidden_states: Tensor, mood: Tensor, turns: Any = None, is_word: Any = None
    ) -> tuple[Tensor, Tensor]:
        image, text = self.mixer(self.to_mixer(picture, mood), self.norm(encoder_hidden_states), turns, is_word)
        picture, encoder_hidden_states = picture + image, encoder_hidden_states + text
        return picture + self.ff(picture).sin(), encoder_hidden_states + self.ff_context(encoder_hidden_states).sin()


class BareBlock(OwnBlock):
    """Neither positions nor padding."""

    token_layout: ClassVar[dict[str, Any]] = {**OwnBlock.token_layout, "rotation": None, "text_mask": None}


STREAMS = {
    "return_hidden_states_index": 0,
    "return_encoder_hidden_states_index": 1,
    "hidden_states_argument_name": "picture",
}
for kind in (OwnBlock, BareBlock):
    TransformerBlockRegistry.register(kind, TransformerBlockMetadata(**STREAMS))


class OwnModel(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, patch_size: int = 2) -> None:
        super().__init__()
        self.x_embedder, self.context_embedder = nn.Linear(4, WIDTH), nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(OwnBlock() for _ in range(2))
        self.proj_out = nn.Linear(WIDTH, 4)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        timestep: Tensor,
        img_shapes: Any,
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        x, text = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        further: dict[str, Any] = {}
        if not isinstance(self.blocks[0], BareBlock):
            angles = torch.outer(torch.arange(x.shape[1] + text.shape[1]), 0.1 + torch.arange(WIDTH // HEADS // 2))
            angles = angles.repeat_interleave(2, 1)
            further = {"turns": (angles.cos(), angles.sin()), "is_word": encoder_hidden_states_mask}
        for block in self.blocks:
            x, text = block(x, text, timestep[:, None].expand(-1, WIDTH), **further)
        return (self.proj_out(x),)


class BareModel(OwnModel):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(BareBlock() for _ in range(2))


# --- models and calls


@dataclass(frozen=True)
class Host:
    """A model with random weights and calls of it, at times of the generation in [0, 1], noise at 0."""

    model: Any
    arguments: Callable[[float, int], dict[str, Any]]

    def __call__(self, progress: float = 0.0, *, batch: int = 2) -> Tensor:
        with torch.no_grad():
            return self.model(**self.arguments(progress, batch), return_dict=False)[0]

    def denoise(self, steps: int = 2, *, batch: int = 2) -> Tensor:
        return torch.stack([self(step / 6, batch=batch) for step in range(steps)])


def weighed(model: nn.Module) -> nn.Module:
    """Weights of a size at which every term of a block matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise if parameter.ndim > 1 else 1 + 0.1 * noise)
    return model.eval()


def lens(noise: Any, *, text: int = TEXT, padded: int = PADDED) -> Host:
    model = LensTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=HEADS,
        inner_dim=WIDTH,
        enc_hidden_dim=8,
        axes_dims_rope=[4, 6, 6],
        selected_layer_index=[0, 1],
    )

    def arguments(progress: float, batch: int) -> dict[str, Any]:
        first, last = (noise(batch, TOKENS, 16, seed=seed) for seed in (1, 2))
        return {
            "hidden_states": (1 - progress) * first + progress * last,
            "encoder_hidden_states": [noise(batch, text, 8, seed=seed) for seed in (3, 4)],
            "encoder_hidden_states_mask": padding(batch, text, padded),
            "timestep": torch.full((batch,), 1 - progress),
            "img_shapes": [(1, ROWS, COLUMNS)] * batch,
        }

    return Host(weighed(model), arguments)


def padding(batch: int, text: int, padded: int) -> Tensor:
    """Of the last text."""
    mask = torch.ones(batch, text, dtype=torch.bool)
    mask[-1, text - padded :] = False
    return mask


def own(noise: Any, kind: type = OwnModel) -> Host:
    def arguments(progress: float, batch: int) -> dict[str, Any]:
        first, last = (noise(batch, TOKENS, 4, seed=seed) for seed in (1, 2))
        return {
            "hidden_states": (1 - progress) * first + progress * last,
            "encoder_hidden_states": noise(batch, TEXT, 8, seed=3),
            "encoder_hidden_states_mask": padding(batch, TEXT, PADDED),
            "timestep": torch.full((batch,), 1 - progress),
            "img_shapes": [(1, ROWS, COLUMNS)] * batch,
        }

    return Host(weighed(kind()), arguments)


HOSTS: dict[str, Callable[[Any], Host]] = {
    "lens": lens,
    "lens, no padding": lambda noise: lens(noise, padded=0),
    "lens, no text": lambda noise: lens(noise, text=0, padded=0),
    "own": own,
    "bare": lambda noise: own(noise, BareModel),
}


every_host = pytest.mark.parametrize("host", HOSTS, indirect=True)


@pytest.fixture(params=["lens", "own"])
def host(request: pytest.FixtureRequest, tiny: SimpleNamespace) -> Host:
    return HOSTS[request.param](tiny.noise)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()


# --- laws at the front door


WAYS: dict[str, dict[str, Any]] = {
    "dense keys": {"recovery": "delta"},
    "reduced keys": {"keep_kv": False, "recovery": "copy"},
    "merge": {"recovery": "copy", "reduction": "merge"},
    "proportional": {"keep_kv": False, "recovery": "copy", "proportional_attention": True},
}


@every_host
@pytest.mark.parametrize("scope", ["attn", "block"])
@pytest.mark.parametrize(("way", "batch"), [*((way, 2) for way in WAYS), ("reduced keys", 1)])
def test_pairs_that_drop_nothing_change_nothing(
    host: Host, tiny: SimpleNamespace, scope: Any, way: str, batch: int
) -> None:
    expected = host.denoise(batch=batch)
    config = settings(scope=scope, matcher=tiny.keeps_all(), **WAYS[way])
    with token_reduction(host.model, config=config) as reduction:
        found = host.denoise(batch=batch)
        assert [record.mode for record in reduction.steps] == ["match", "reduce"]
    assert_close(found, expected)


def test_ratio_0_installs_nothing(host: Host) -> None:
    expected = host.denoise(3)
    before = {name: set(vars(module)) for name, module in host.model.named_modules()}
    with token_reduction(host.model, ratio=0.0) as reduction:
        assert {name: set(vars(module)) for name, module in host.model.named_modules()} == before
        assert torch.equal(host.denoise(3), expected)
        assert reduction.site_names == ()


@pytest.mark.parametrize("scope", ["attn", "block"])
@pytest.mark.parametrize("keep_kv", [True, False])
def test_removal_leaves_the_model_as_it_was(host: Host, scope: Any, keep_kv: bool) -> None:
    expected = host.denoise(3)
    before = {name: set(vars(module)) for name, module in host.model.named_modules()}
    processors = [attn.processor for block in find_blocks(host.model) for _, attn in block.attentions()]
    apply_token_reduction(host.model, settings(scope=scope, keep_kv=keep_kv))
    assert not torch.equal(host.denoise(3), expected)
    remove_token_reduction(host.model)
    assert {name: set(vars(module)) for name, module in host.model.named_modules()} == before
    after = [attn.processor for block in find_blocks(host.model) for _, attn in block.attentions()]
    assert all(found is old for found, old in zip(after, processors, strict=True))
    assert torch.equal(host.denoise(3), expected)


@dataclass
class Seen:
    """What the first block was given and returned at one call."""

    block: nn.Module
    given: dict[str, Any]
    image: Tensor
    text: Tensor


def first_block(host: Host, progress: float, batch: int) -> Seen:
    block = find_blocks(host.model)[0].module
    names, calls = list(inspect.signature(type(block).forward).parameters)[1:], []

    def keep(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append(({**dict(zip(names, args, strict=False)), **kwargs}, output))

    handle = block.register_forward_hook(keep, with_kwargs=True)
    host(progress, batch=batch)
    handle.remove()
    ((given, output),) = calls
    streams = TransformerBlockRegistry.get(type(block))
    image, text = streams.return_hidden_states_index, streams.return_encoder_hidden_states_index
    return Seen(block, given, output[image], output[text])


def kept_rows(events: list[Any], site: str) -> Tensor:
    (event,) = (event for event in events if event.site.startswith(site))
    return event.correspondence.keep


@every_host
@pytest.mark.parametrize("scope", ["attn", "block"])
@pytest.mark.parametrize("batch", [1, 2])
def test_with_dense_keys_the_rows_that_are_kept_are_those_of_the_dense_block(
    host: Host, scope: Any, batch: int
) -> None:
    """The text's too: neither rotation nor padding has lost its rows."""
    dense, events = first_block(host, 0.2, batch), []
    with token_reduction(host.model, config=settings(scope=scope), observer=events.append):
        host(0.0, batch=batch)
        found = first_block(host, 0.2, batch)
    keep = kept_rows(events, find_blocks(host.model)[0].name)
    assert keep.shape == (batch, TOKENS // 2)
    index = keep.unsqueeze(2).expand(-1, -1, found.image.shape[2])
    assert_close(found.image.gather(1, index), dense.image.gather(1, index))
    assert not torch.allclose(found.image, dense.image, rtol=1e-4, atol=1e-4)
    if dense.text.numel():
        assert_close(found.text, dense.text)


@every_host
@pytest.mark.parametrize("batch", [1, 2])
def test_with_reduced_keys_a_block_sees_the_rows_that_are_kept(host: Host, batch: int) -> None:
    """The block itself, on each sample's rows and their positions."""
    events: list[Any] = []
    config = settings(keep_kv=False, recovery="copy")
    with token_reduction(host.model, config=config, observer=events.append):
        host(0.0, batch=batch)
        found = first_block(host, 0.2, batch)
    keep, layout = kept_rows(events, find_blocks(host.model)[0].name), type(found.block).token_layout
    image_name = TransformerBlockRegistry.get(type(found.block)).hidden_states_argument_name
    for sample in range(batch):
        alone = {name: value[[sample]] if isinstance(value, Tensor) else value for name, value in found.given.items()}
        alone[image_name] = alone[image_name][:, keep[sample]]
        if layout["rotation"] is not None:
            words = torch.arange(found.text.shape[1])
            rows = {
                "image, text": torch.cat([keep[sample], TOKENS + words]),
                "text, image": torch.cat([words, len(words) + keep[sample]]),
            }[layout["order"]]
            alone[layout["rotation"]] = tuple(table[rows] for table in found.given[layout["rotation"]])
        with torch.no_grad():
            output = found.block(**alone)
        streams = TransformerBlockRegistry.get(type(found.block))
        assert_close(found.image[[sample]][:, keep[sample]], output[streams.return_hidden_states_index])
        if found.text.numel():
            assert_close(found.text[[sample]], output[streams.return_encoder_hidden_states_index])


def test_two_generations_are_equal(host: Host) -> None:
    config = settings(recovery="linear", schedule=FixedInterval(interval=2))
    with token_reduction(host.model, config=config) as reduction:
        first = host.denoise(5)
        assert torch.equal(host.denoise(5), first)
        assert [record.mode for record in reduction.steps] == ["match", "reduce"] * 2 + ["match"]


@pytest.mark.parametrize("scope", ["attn", "block"])
def test_two_pictures_of_the_pipeline_are_equal(tiny: SimpleNamespace, scope: Any) -> None:
    """Guidance against no text at all, in a context of its own."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32
    )
    pipe = LensPipeline(
        scheduler=LensFlowMatchScheduler(),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        transformer=lens(tiny.noise).model,
    )
    pipe.set_progress_bar_config(disable=True)
    features = {"prompt_embeds": tiny.noise(1, 2, TEXT, 8, seed=3), "height": 16 * ROWS, "width": 16 * COLUMNS}

    def picture() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 5, "guidance_scale": 4.0, "output_type": "pt", "return_dict": False}
        return pipe(**features, **options, generator=generator)[0]

    dense = picture()
    with token_reduction(pipe, ratio=0.5, round_to=1, scope=scope) as reduction:
        found = picture()
        assert torch.equal(picture(), found)
        assert not torch.equal(found, dense)
        for context in ("cond", "uncond"):
            modes = [record.mode for record in reduction.steps if record.context == context]
            assert modes == ["match", "reduce", "reduce", "reduce", "dense"]
    assert torch.equal(picture(), dense)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of importing the compiler
def test_compiled_blocks_share_a_graph_for_each_kind_of_step(tiny: SimpleNamespace) -> None:
    host, graphs = lens(tiny.noise), []
    with token_reduction(host.model, config=settings()):
        expected = host.denoise(4)

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    with token_reduction(host.model, config=settings()):
        host.model.compile_repeated_blocks(fullgraph=False, backend=backend)
        assert torch.equal(host.denoise(4), expected)
        assert len(graphs) == 2  # dense, reduced: for both blocks
    torch._dynamo.reset()


# --- less is computed, and as much as is forecast


@pytest.mark.parametrize("scope", ["attn", "block"])
@pytest.mark.parametrize("keep_kv", [True, False])
def test_sequences_are_shorter_at_reduction_steps(
    host: Host, monkeypatch: pytest.MonkeyPatch, scope: Any, keep_kv: bool
) -> None:
    lengths: list[tuple[int, int]] = []
    original = nn.functional.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        lengths.append((query.shape[-2], key.shape[-2]))
        return original(query, key, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    rows: list[int] = []
    for name, module in host.model.named_modules():
        if name.endswith((".img_mlp", ".ff")):
            module.register_forward_pre_hook(lambda _module, args: rows.append(args[0].shape[1]))
    with token_reduction(host.model, config=settings(scope=scope, keep_kv=keep_kv)):
        host.denoise(2)
    full, half = lengths[0][0], lengths[0][0] - TOKENS // 2
    assert lengths == [(full, full)] * 2 + [(half, full if keep_kv else half)] * 2
    assert rows == [TOKENS] * 2 + [TOKENS // 2 if scope == "block" else TOKENS] * 2


class Counted(FlopCounterMode):
    """With the CPU's fused attention, which torch leaves out."""

    def __init__(self) -> None:
        def fused(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
            batch, heads, queries, width = query
            return 4 * batch * heads * queries * key[2] * width

        fused_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        super().__init__(display=False, custom_mapping={fused_attention: fused})


def counted(host: Host, progress: float) -> int:
    with Counted() as counter:
        host(progress)
    return counter.get_total_flops()


@pytest.mark.parametrize("scope", ["attn", "block"])
@pytest.mark.parametrize("keep_kv", [True, False])
def test_calls_take_what_is_forecast(host: Host, scope: Any, keep_kv: bool) -> None:
    config = settings(scope=scope, keep_kv=keep_kv, recovery="delta")
    blocks = find_blocks(host.model)
    text = first_block(host, 0.0, 2).text.shape[1]
    size = {"height": 16 * ROWS, "width": 16 * COLUMNS, "text_tokens": text, "batch_size": 2}
    found = forecast(host.model, config, **size)
    assert found.dense_flops == counted(host, 0.0)
    with token_reduction(host.model, config=config) as reduction:
        assert counted(host, 0.0) == found.dense_flops + found.matching_flops
        reduced = counted(host, 0.1)
        assert tuple(site.name for site in found.sites) == reduction.site_names
        assert found.plan_bytes == reduction.plan_bytes()
        assert found.offset_bytes == reduction.offset_bytes() > 0
    # With dense keys the image's modulation is computed for the keys and again for the rest.
    modulations = [getattr(block.module, name, None) for block in blocks for name in ("img_mod", "shift")]
    layers = [layer for module in modulations if module for layer in module.modules() if isinstance(layer, nn.Linear)]
    again = 2 * sum(2 * layer.in_features * layer.out_features for layer in layers)
    assert len(layers) == len(blocks)
    assert reduced == found.reduced_flops + again * (keep_kv and scope == "block")
    assert found.reduced_flops < found.dense_flops


def test_the_released_size_without_weights() -> None:
    with torch.device("meta"):
        model = LensTransformer2DModel()
    found = recommend(model, height=1024, width=1024, num_inference_steps=20).forecast
    assert (len(found.sites), found.sites[0].num_tokens, found.num_text) == (48, 4096, 128)
    assert found.config.scope == "block" and 1.5 < found.step_speed_up < 1.8


def test_a_picture_of_unknown_tokens_cannot_be_forecast(tiny: SimpleNamespace) -> None:
    model = own(tiny.noise).model
    model.register_to_config(patch_size=None)
    with pytest.raises(ValueError, match="config.patch_size of OwnModel is None"):
        forecast(model, settings(), height=64, width=64)


# --- what is refused


def layout(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in {**OwnBlock.token_layout, **changes}.items() if value != "left out"}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (None, r"BrokenBlock.token_layout is None; give a mapping with the keys order, attention, .*A block of your"),
        (layout(condition="left out", extra="x"), "lacks condition and has the unknown keys extra; give a mapping"),
        (layout(rotation="left out"), "lacks rotation and has the unknown keys none"),
        (layout(image_qkv=None), r"token_layout\['image_qkv'\] is None; .* \"text_mask\" may be None"),
        (layout(order="picture, text"), 'is "?.picture, text.; expected one of image, text, text, image'),
        (layout(attention="nothing"), "BrokenBlock has no nothing, which a token_layout promises"),
        (layout(condition="temb"), "BrokenBlock has no argument temb"),
        (layout(image_qkv="img_qkv", text_mask="mask"), "BrokenBlock has no argument mask"),
        (layout(image_qkv="img_qkv"), "BrokenBlock.mixer has no img_qkv"),
        (layout(attention_input="norm2"), "BrokenBlock has no norm2"),
    ],
)
def test_a_broken_layout_is_refused(broken: Any, message: str, tiny: SimpleNamespace) -> None:
    kind: Any = type("BrokenBlock", (OwnBlock,), {"token_layout": broken})
    TransformerBlockRegistry.register(kind, TransformerBlockMetadata(**STREAMS))
    model = own(tiny.noise).model
    model.blocks = nn.ModuleList([kind()])
    before = set(vars(model))
    with pytest.raises(ValueError, match=message):
        apply_token_reduction(model)
    assert set(vars(model)) == before


def test_a_block_that_is_not_registered_is_refused(tiny: SimpleNamespace) -> None:
    model = own(tiny.noise).model
    model.blocks[1] = type("UnknownBlock", (OwnBlock,), {})()
    with pytest.raises(ValueError, match="UnknownBlock has a token_layout, but .*TransformerBlockRegistry.register"):
        apply_token_reduction(model)


def test_a_block_without_a_layout_is_refused_with_what_is_supported(tiny: SimpleNamespace) -> None:
    class SilentBlock(nn.Module):
        pass

    model = own(tiny.noise).model
    model.blocks[1] = SilentBlock()
    listed = ", ".join(supported_blocks())
    with pytest.raises(ValueError, match=f"has SilentBlock; token reduction supports {listed} and blocks with a token"):
        apply_token_reduction(model)


def test_dense_keys_need_the_blocks_own_processor_and_a_plain_projection(host: Host) -> None:
    blocks = find_blocks(host.model)
    attn, projection = blocks[0].attentions()[0][1], blocks[0].adapter.layout.image_qkv
    original, processor = getattr(attn, projection), attn.processor
    setattr(attn, projection, nn.Sequential(original))
    with pytest.raises(ValueError, match="queries and keys are one Sequential"):
        apply_token_reduction(host.model)
    with token_reduction(host.model, config=settings(keep_kv=False)):
        assert host.denoise().isfinite().all()
    setattr(attn, projection, original)
    attn.processor = AttnProcessor()
    with pytest.raises(ValueError, match=f"attention by {type(processor).__name__}; this model has AttnProcessor"):
        apply_token_reduction(host.model)


def test_the_class_is_never_asked(tiny: SimpleNamespace) -> None:
    """Lens is in no list; a copy of its block under another name is another block that says the same."""
    assert LensTransformerBlock.__name__ not in supported_blocks()
    host = lens(tiny.noise)
    with token_reduction(host.model, config=settings()):
        expected = host.denoise()
    kind = type("Copied", (LensTransformerBlock,), {})
    streams = {"return_hidden_states_index": 1, "return_encoder_hidden_states_index": 0}
    TransformerBlockRegistry.register(kind, TransformerBlockMetadata(**streams))
    for block in host.model.transformer_blocks:
        block.__class__ = kind
    with token_reduction(host.model, config=settings()):
        assert torch.equal(host.denoise(), expected)
