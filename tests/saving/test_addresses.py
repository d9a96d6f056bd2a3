"""The names that checkpoints in the world carry, and a real pipeline around each of them: from disk and from a hub."""

import importlib
import inspect
import json
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionGemmaPipeline,
    DiffusionPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DModel,
)
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerFast

import wellposed
from wellposed.data.tokenizers import byte_tokenizer
from wellposed.hooks import full_covariance
from wellposed.models import (
    AutoencoderDecQ,
    DecQTransformer2DModel,
    FixedHeadsUNet2DModel,
    LensTransformer2DModel,
    UniformDiffusionTransformerModel,
)
from wellposed.pipelines import DecQPipeline, LanczosDDPMPipeline, LensPipeline, UniformDiffusionPipeline
from wellposed.saving import write_remote_code
from wellposed.schedulers import (
    LanczosDDPMScheduler,
    LanczosFlowMatchScheduler,
    LeaveOneOutDDIMScheduler,
    LensFlowMatchScheduler,
    ShiftedFlowScheduler,
    UniformDiffusionScheduler,
)

TEXT_PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3", "vae")


def unet(kind: type[UNet2DModel] = UNet2DModel, **heads: int) -> UNet2DModel:
    return kind(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        **(heads or {"attention_head_dim": 4}),
    )


def ddpm_scheduler() -> LanczosDDPMScheduler:
    return LanczosDDPMScheduler(beta_schedule="squaredcos_cap_v2", num_lanczos_steps=2, lanczos_tol=0.25)


def own_ddpm() -> DiffusionPipeline:
    return LanczosDDPMPipeline(unet(), ddpm_scheduler())


def stock_ddpm_with_fixed_heads() -> DiffusionPipeline:
    return DDPMPipeline(unet(FixedHeadsUNet2DModel, num_attention_heads=4), ddpm_scheduler())


def stock_ddpm() -> DiffusionPipeline:
    return DDPMPipeline(unet(), ddpm_scheduler())


def stock_sd3() -> DiffusionPipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
    )
    scheduler = LanczosFlowMatchScheduler(shift=3.0, num_lanczos_steps=2, eta=0.5)
    return StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, **dict.fromkeys(TEXT_PARTS))


def own_text(kernel: str = "uniform", **network: Any) -> DiffusionPipeline:
    transformer = UniformDiffusionTransformerModel(
        vocab_size=256, num_layers=1, num_attention_heads=2, attention_head_dim=4, **network
    )
    # Otherwise zero: an untrained head says nothing about the rest.
    torch.nn.init.normal_(transformer.proj_out.weight, generator=torch.Generator().manual_seed(0))
    scheduler = UniformDiffusionScheduler(
        kernel=kernel, prediction_kind=transformer.config.prediction_kind, timestep_spacing="geometric", top_p=0.9
    )
    return UniformDiffusionPipeline(transformer.eval(), scheduler, byte_tokenizer())


def own_text_masked() -> DiffusionPipeline:
    return own_text("masked", mask_token=True)


def own_text_absorbing() -> DiffusionPipeline:
    return own_text("absorbing", absorbing_fusion="separate_linear", prediction_kind="denoiser")


def own_latents() -> DiffusionPipeline:
    autoencoder = AutoencoderDecQ(
        encoder_hidden_size=16,
        encoder_patch_size=4,
        encoder_num_hidden_layers=2,
        encoder_input_size=8,
        encoder_config={"num_attention_heads": 2, "image_size": 8},
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
        patch_size=4,
        num_queries=3,
        condenser_layers=(0, 1),
        condenser_num_heads=2,
    )
    generator = DecQTransformer2DModel(
        sample_size=2,
        in_channels=16,
        num_queries=3,
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        head_hidden_size=16,
        head_num_layers=1,
        head_num_attention_heads=2,
        num_classes=2,
    )
    return DecQPipeline(autoencoder, generator, ShiftedFlowScheduler(shift=1.5))


def sample_own_latents(pipe: Any, generator: torch.Generator) -> Tensor:
    return pipe([0, 1], num_inference_steps=3, generator=generator, output_type="pt").images


def own_lens() -> DiffusionPipeline:
    transformer = LensTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        enc_hidden_dim=8,
        axes_dims_rope=(4, 2, 2),
        selected_layer_index=(0, 1),
    )
    for linear in (transformer.norm_out.linear, transformer.proj_out):  # otherwise zero
        torch.nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(0))
    vae = AutoencoderKLFlux2(block_out_channels=(4,) * 4, layers_per_block=1, latent_channels=4, norm_num_groups=2)
    # With a text encoder: tests/lens/test_pipeline.py.
    return LensPipeline(LensFlowMatchScheduler(), vae.eval(), None, None, transformer.eval(), release="turbo")


def sample_lens(pipe: Any, generator: torch.Generator) -> Tensor:
    features = torch.randn(1, 2, 3, 8, generator=generator)
    call = {"prompt_embeds": features, "height": 32, "width": 48, "generator": generator, "output_type": "pt"}
    return pipe(**call).images


def stock_gemma() -> DiffusionPipeline:
    # Without its model: diffusers 0.42 itself cannot load what it has saved of it, transformers' class lying in a
    # folder called like one of its pipelines.
    scheduler = LeaveOneOutDDIMScheduler(corrector_steps=2, corrector_k=3, temper="denoiser")
    return DiffusionGemmaPipeline(model=None, scheduler=scheduler, processor=None)


def sample_own_text(pipe: Any, generator: torch.Generator) -> Tensor:
    return torch.stack(pipe("a____b", num_inference_steps=3, num_texts_per_prompt=2, generator=generator).ids)


def sample_stock_gemma(pipe: Any, generator: torch.Generator) -> Tensor:
    logits = torch.randn(2, 6, 9, generator=generator)
    tokens = torch.randint(9, (2, 6), generator=generator)
    return pipe.scheduler.step_correct(logits, 4, tokens, generator=generator).prev_sample


def sample_own_ddpm(pipe: Any, generator: torch.Generator) -> Tensor:
    return pipe(batch_size=2, num_inference_steps=3, generator=generator, output_type="latent").images


def sample_stock_ddpm(pipe: Any, generator: torch.Generator) -> Tensor:
    with full_covariance(pipe, num_lanczos_steps=1):
        return torch.as_tensor(pipe(num_inference_steps=3, generator=generator, output_type="np").images)


def sample_stock_sd3(pipe: Any, generator: torch.Generator) -> Tensor:
    text = {"prompt_embeds": torch.ones(1, 5, 8), "pooled_prompt_embeds": torch.ones(1, 8)}
    size = {"height": 64, "width": 64, "guidance_scale": 1.0, "output_type": "latent"}
    with full_covariance(pipe, num_lanczos_steps=1, generator=generator):
        return pipe(**text, **size, num_inference_steps=3, generator=generator).images


@dataclass(frozen=True, kw_only=True)
class Home:
    """A real pipeline in which a saved class lives, and the module that people import its class from."""

    build: Callable[[], DiffusionPipeline]
    sample: Callable[[Any, torch.Generator], Tensor]
    loader: str
    absent: Mapping[str, None] = field(default_factory=dict)
    change: tuple[str, Any] = ("num_lanczos_steps", 5)


# Frozen: a name may be added, with its pipeline. To remove or rename one is to break every checkpoint that carries it.
HOMES = {
    **dict.fromkeys(
        ("AutoencoderDecQ", "DecQPipeline", "DecQTransformer2DModel", "ShiftedFlowScheduler"),
        Home(build=own_latents, sample=sample_own_latents, loader="wellposed.pipelines", change=("shift", 2.5)),
    ),
    "FixedHeadsUNet2DModel": Home(build=stock_ddpm_with_fixed_heads, sample=sample_stock_ddpm, loader="diffusers"),
    "LanczosDDPMPipeline": Home(build=own_ddpm, sample=sample_own_ddpm, loader="wellposed.pipelines"),
    "LanczosDDPMScheduler": Home(build=stock_ddpm, sample=sample_stock_ddpm, loader="diffusers"),
    "LanczosFlowMatchScheduler": Home(
        build=stock_sd3, sample=sample_stock_sd3, loader="diffusers", absent=dict.fromkeys(TEXT_PARTS)
    ),
    **dict.fromkeys(
        ("LensFlowMatchScheduler", "LensPipeline", "LensTransformer2DModel"),
        Home(build=own_lens, sample=sample_lens, loader="wellposed.pipelines", change=("mu_rule", "smooth")),
    ),
    "LeaveOneOutDDIMScheduler": Home(
        build=stock_gemma,
        sample=sample_stock_gemma,
        loader="diffusers",
        absent=dict.fromkeys(("model", "processor")),
        change=("corrector_k", 5),
    ),
    "UniformDiffusionPipeline": Home(
        build=lambda: own_text(given_embedding=True),
        sample=sample_own_text,
        loader="wellposed.pipelines",
        change=("temperature", 0.5),
    ),
    "UniformDiffusionScheduler": Home(
        build=own_text_absorbing, sample=sample_own_text, loader="wellposed.pipelines", change=("temperature", 0.5)
    ),
    "UniformDiffusionTransformerModel": Home(
        build=own_text_masked, sample=sample_own_text, loader="wellposed.pipelines", change=("temperature", 0.5)
    ),
}


def test_every_saved_class_has_a_home() -> None:
    assert set(wellposed.SAVED_CLASSES) == set(HOMES)


@pytest.mark.parametrize("name", sorted(HOMES))
def test_address_is_frozen(name: str) -> None:
    saved = getattr(wellposed, name)
    assert (saved.__module__, saved.__name__, saved.__qualname__) == ("wellposed", name, name)
    assert getattr(importlib.import_module(wellposed.SAVED_CLASSES[name]), name) is saved


def test_everything_that_can_be_saved_has_an_address() -> None:
    """A model, scheduler, pipeline or tokenizer without ``@saved_class`` would be saved under the path of its file."""
    bases = tuple(getattr(wellposed, base) for base in wellposed._LOADER_BASES)
    modules = [importlib.import_module(found.name) for found in pkgutil.walk_packages(wellposed.__path__, "wellposed.")]
    assert modules
    stray = {
        f"{value.__module__}.{value.__name__}"
        for module in modules
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, bases) and value.__module__.startswith("wellposed.")
    }
    assert stray == set(), "wear @saved_class, or do not inherit from what can be saved"


def stored_config(component: Any) -> dict[str, Any]:
    return {key: value for key, value in json.loads(component.to_json_string()).items() if not key.startswith("_")}


def assert_same_components(left: DiffusionPipeline, right: DiffusionPipeline) -> None:
    assert type(left) is type(right)
    for name, component in left.components.items():
        twin = getattr(right, name)
        assert type(twin) is type(component)
        if component is None:
            continue
        if isinstance(component, PreTrainedTokenizerFast):
            assert twin.backend_tokenizer.to_str() == component.backend_tokenizer.to_str()
            continue
        assert stored_config(twin) == stored_config(component)
        if isinstance(component, torch.nn.Module):
            weights = twin.state_dict()
            assert all(torch.equal(weights[key], value) for key, value in component.state_dict().items())


@pytest.mark.parametrize("name", sorted(HOMES))
def test_round_trip_from_disk(name: str, tmp_path: Path) -> None:
    home = HOMES[name]
    pipe = home.build()
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert name == index["_class_name"] or ["wellposed", name] in index.values()

    again = type(pipe).from_pretrained(tmp_path, **home.absent)
    again.set_progress_bar_config(disable=True)
    assert_same_components(pipe, again)
    first, second = (home.sample(one, torch.Generator().manual_seed(0)) for one in (pipe, again))
    assert first.isfinite().all()
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("name", sorted(HOMES))
def test_component_can_be_passed_on_loading(name: str, tmp_path: Path) -> None:
    home = HOMES[name]
    pipe = home.build()
    pipe.save_pretrained(tmp_path)
    option, value = home.change
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **{option: value})
    again = type(pipe).from_pretrained(tmp_path, scheduler=scheduler, **home.absent)
    assert again.scheduler.config[option] == value != pipe.scheduler.config[option]


def test_scheduler_of_a_stock_checkpoint_becomes_ours(tmp_path: Path) -> None:
    DDPMPipeline(unet(), DDPMScheduler(beta_end=0.01)).save_pretrained(tmp_path)
    scheduler = LanczosDDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert (scheduler.config.beta_end, scheduler.config.num_lanczos_steps) == (0.01, 3)


SUMMARY = """
import json
def summary(pipe):
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    networks = [getattr(pipe, name, None) for name in ("unet", "transformer")]
    settings = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    return {
        "classes": {name: [type(part).__module__.split(".")[0], type(part).__name__] for name, part in parts.items()},
        "pipeline": type(pipe).__name__,
        "settings": settings,
        "weights": sum(float(v.double().abs().sum()) for n in networks if n for v in n.state_dict().values()),
    }
"""


def summary(pipe: DiffusionPipeline) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(SUMMARY, namespace)
    return json.loads(json.dumps(namespace["summary"](pipe)))


def load(name: str, pipe: DiffusionPipeline, where: str) -> str:
    home = HOMES[name]
    return (
        f"from {home.loader} import {type(pipe).__name__} as Pipeline\n"
        f"print(json.dumps(summary(Pipeline.from_pretrained({where!r}, **{dict(home.absent)}))))\n"
    )


def refused(load: str, because: str) -> str:
    return (
        f"try: {load}\n"
        f"except ValueError as refusal: assert {because!r} in str(refusal), refusal\n"
        "else: raise AssertionError('diffusers needs no help any more: saving.py can lose some')\n"
    )


def test_every_address_loads_from_a_hub(hub: tuple[Path, str], fresh_python: Callable[..., str]) -> None:
    root, endpoint = hub
    pipes = {name: home.build() for name, home in HOMES.items()}
    for name, pipe in pipes.items():
        pipe.save_pretrained(root / "someone" / name)
    stock = "diffusers.DDPMPipeline.from_pretrained('someone/LanczosDDPMScheduler')"
    code = SUMMARY + "import diffusers, wellposed\n" + refused(stock, "wellposed.py as defined in `model_index.json`")
    code += "import wellposed.schedulers\n"
    code += "".join(load(name, pipe, f"someone/{name}") for name, pipe in pipes.items())
    lines = fresh_python(code, endpoint).splitlines()
    assert [json.loads(line) for line in lines] == [summary(pipe) for pipe in pipes.values()]


def test_the_published_layout_of_lens_loads_from_a_hub(hub: tuple[Path, str], fresh_python: Callable[..., str]) -> None:
    """Its index names a text encoder's class that no library has, and looks for ours in diffusers."""
    root, endpoint = hub
    folder = root / "someone" / "Lens"
    pipe: Any = own_lens()
    sizes = {"num_hidden_layers": 1, "num_local_experts": 2, "num_experts_per_tok": 1, "vocab_size": 16}
    sizes |= {"hidden_size": 8, "intermediate_size": 8, "head_dim": 4, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    pipe.register_modules(text_encoder=GptOssForCausalLM(GptOssConfig(**sizes)))
    pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "LensGptOssEncoder"]
    index["transformer"] = ["diffusers", "LensTransformer2DModel"]
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    code = SUMMARY + "from wellposed.pipelines import LensPipeline as Pipeline\n"
    found = json.loads(
        fresh_python(code + "print(json.dumps(summary(Pipeline.from_pretrained('someone/Lens'))))", endpoint)
    )
    assert found == summary(pipe)


def test_stock_pipelines_find_us_once_the_package_is_imported(tmp_path: Path, fresh_python: Callable[..., str]) -> None:
    """``import wellposed`` alone is enough for a folder: the loader's question imports the room."""
    pipes = {name: home.build() for name, home in HOMES.items() if home.loader == "diffusers"}
    for name, pipe in pipes.items():
        pipe.save_pretrained(tmp_path / name)
    stock = f"diffusers.DDPMPipeline.from_pretrained({str(tmp_path / 'LanczosDDPMScheduler')!r})"
    code = SUMMARY + "import diffusers\n" + refused(stock, "import wellposed") + "import wellposed\n"
    code += "".join(load(name, pipe, str(tmp_path / name)) for name, pipe in pipes.items())
    lines = fresh_python(code).splitlines()
    assert [json.loads(line) for line in lines] == [summary(pipe) for pipe in pipes.values()]


def test_plain_diffusion_pipeline_needs_remote_code(tmp_path: Path, fresh_python: Callable[..., str]) -> None:
    pipe = own_ddpm()
    pipe.save_pretrained(tmp_path)
    with pytest.raises(AttributeError, match="LanczosDDPMPipeline"):
        DiffusionPipeline.from_pretrained(tmp_path)
    write_remote_code(tmp_path)
    code = SUMMARY + (
        "from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)\n"
        "print(json.dumps(summary(pipe)))\n"
        f"pipe.save_pretrained({str(tmp_path / 'again')!r})\n"
    )
    assert json.loads(fresh_python(code)) == summary(pipe)
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["scheduler"] == ["wellposed", "LanczosDDPMScheduler"]
    with pytest.raises(ValueError, match="has its remote code already"):
        write_remote_code(tmp_path)


def test_remote_code_needs_a_pipeline_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass the folder that pipeline.save_pretrained wrote"):
        write_remote_code(tmp_path)
    DDPMPipeline(unet(), DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names no class of wellposed"):
        write_remote_code(tmp_path)
