r"""Public checkpoints of discrete diffusion as networks of ours, with what they predict.

MDLM, UDLM (discrete-diffusion-guidance), DUO and the code of arXiv 2605.22765 share one network under one set of names,
and differ in what it was trained to say:

===================================  ====================  =====================  =================================
published as                         kernel                logits                 clean tokens K
===================================  ====================  =====================  =================================
MDLM (``mdlm-owt``, ...)             ``Masked``            either: at a mask      all rows but the mask's
                                                           they are the same
UDLM (``udlm-lm1b``, ...)            ``Uniform``           leave-one-out          all rows
DUO (``duo``, ...)                   ``Uniform``           leave-one-out          all rows: 50258 with GPT-2's
                                                                                  tokenizer, to which it adds [PAD]
2605.22765 ``udlm``                  ``Uniform``           as its                 the tokenizer's
2605.22765 ``max_coupling``          ``MaximalCoupling``   ``model_prediction``   the tokenizer's
2605.22765 ``audm``, ``reaudm``      ``Absorbing``, ...    denoiser               the tokenizer's
===================================  ====================  =====================  =================================

UDLM and DUO minimise the plug-in bound, whose minimiser is the leave-one-out posterior, although neither names it so:
predictor-corrector sampling and its temperature apply to them as they are. DUO's few-step models are distilled away
from that minimum and keep the parametrisation only.

The code of 2605.22765 gives a tokenizer without a mask token, GPT-2's, one row more (50258) and draws noise from the
tokenizer's own 50257. That row is never a clean token and is dropped.

Files are read as safetensors or with ``weights_only=True``; no code of a file or of a repository ever runs.
"""

import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from transformers import PreTrainedTokenizerFast
from transformers.utils import cached_file

from wellposed.udm.kernels import Kernel, kernel_named
from wellposed.udm.models import NetworkModel
from wellposed.udm.pipeline import UniformDiffusionPipeline
from wellposed.udm.scheduler import UniformDiffusionScheduler
from wellposed.udm.transformer import SINUSOIDS, UniformDiffusionTransformerModel

__all__ = [
    "PublishedAlgorithm",
    "PublishedModel",
    "convert_published",
    "load_hub_checkpoint",
    "load_lightning_checkpoint",
]

PublishedAlgorithm = Literal["mdlm", "udlm", "duo", "max_coupling", "audm", "reaudm"]

FIRST_TENSOR = "vocab_embed.embedding"
NOT_LEARNED = "rotary_emb.inv_freq"
NEVER = -65504.0  # a logit that is chosen never, and that half precision can hold

RENAMED = (
    (r"^vocab_embed\.embedding$", "token_embedding.weight"),
    (r"^conditioning_vocab_embed\.embedding$", "noise_embedding.weight"),
    (r"^conditioning_input_(proj|mlp)\.", "noise_fusion."),
    (r"^sigma_map\.mlp\.0\.", "time_embedding.linear_1."),
    (r"^sigma_map\.mlp\.2\.", "time_embedding.linear_2."),
    (r"^output_layer\.norm_final\.", "norm_out."),
    (r"^output_layer\.adaLN_modulation\.", "modulation_out."),
    (r"^output_layer\.linear\.", "proj_out."),
    (r"^blocks\.", "transformer_blocks."),
    (r"\.attn_(qkv|out)\.", r".attn.to_\1."),
    (r"\.adaLN_modulation\.", ".modulation."),
)


@dataclass(frozen=True, eq=False, kw_only=True)
class PublishedModel:
    """A public checkpoint, and what it is.

    Attributes:
        network: with its weights, in evaluation mode. Its config says what its logits are.
        kernel_name: the corruption it was trained with, as a scheduler's config has it.
        dropped: outputs of the published head that are no clean tokens and were left out.
    """

    network: UniformDiffusionTransformerModel
    kernel_name: str
    dropped: int

    @property
    def kernel(self) -> Kernel:
        """The corruption it was trained with."""
        return kernel_named(self.kernel_name, cast(Any, self.network.config).vocab_size)

    def token_model(self) -> NetworkModel:
        """For ``sample``, ``likelihood_bound`` and everything else that asks a ``TokenModel``."""
        return NetworkModel(
            network=self.network,
            kind=cast(Any, self.network.config).prediction_kind,
            channel=self.kernel.channel,
            knows_given=False,
        )

    def pipeline(self, tokenizer: PreTrainedTokenizerFast | None = None, **scheduler: Any) -> UniformDiffusionPipeline:
        """A pipeline, to sample from and to save in our own format.

        Args:
            tokenizer: the one of the checkpoint. Its size must be K; for DUO on GPT-2's, call
                ``tokenizer.add_special_tokens({"pad_token": "[PAD]"})`` first, as DUO does.
            scheduler: settings of ``UniformDiffusionScheduler`` (temperature, corrector_steps, ...).
        """
        kind = cast(Any, self.network.config).prediction_kind
        reverse = UniformDiffusionScheduler(kernel=self.kernel_name, prediction_kind=kind, **scheduler)
        return UniformDiffusionPipeline(self.network, reverse, tokenizer)


def load_hub_checkpoint(
    name: str | Path,
    *,
    algorithm: PublishedAlgorithm | None = None,
    mask_token_id: int | None = None,
    revision: str = "main",
) -> PublishedModel:
    """A repository of remote code as a network of ours, without running its code.

    ``kuleshov-group/mdlm-owt``, ``kuleshov-group/udlm-lm1b``, ``s-sahoo/duo`` and their like: ``config.json`` and
    ``model.safetensors`` are all that is read.

    Args:
        name: hub id, or a folder with those two files.
        algorithm: what it is; None: what its config says.
        mask_token_id: the mask of an MDLM whose tokenizer has one (BERT: 103); None if it is the last row.
        revision: branch, tag or commit on the hub.

    Raises:
        OSError: a file is not there, and the hub cannot be reached or has none of that name.
        ValueError: a network of another kind.
    """
    try:
        files = [cached_file(str(name), file, revision=revision) for file in ("config.json", "model.safetensors")]
    except OSError as error:
        raise OSError(
            f"{str(name)!r} is no folder here with config.json and model.safetensors, is not in the cache, and could "
            f"not be fetched; fetch it once where there is a network (hf download {name}), or give its folder"
        ) from error
    config: dict[str, Any] = json.loads(Path(str(files[0])).read_text(encoding="utf-8"))
    if config.get("causal") or config.get("cfg"):
        raise ValueError(f"{str(name)!r} is autoregressive or conditioned on classes, which this network is not")
    if "n_heads" not in config:
        raise ValueError(f"the config of {str(name)!r} has no 'n_heads': it is no model of this family")
    chosen = _algorithm_named(algorithm or str(config.get("model_type")).lower(), str(name))
    state = load_file(str(files[1]))
    prefix = _prefix(state, str(name))
    return convert_published(
        {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)},
        algorithm=chosen,
        num_attention_heads=config["n_heads"],
        time_conditioning=config.get("time_conditioning"),
        mask_token_id=mask_token_id,
    )


def load_lightning_checkpoint(
    path: str | Path,
    *,
    vocab_size: int | None = None,
    algorithm: PublishedAlgorithm | None = None,
    num_attention_heads: int | None = None,
    prediction_kind: Literal["leave_one_out", "denoiser"] | None = None,
    time_conditioning: bool | None = None,
    mask_token_id: int | None = None,
    ema: bool = True,
) -> PublishedModel:
    """A training checkpoint (``last.ckpt``) of MDLM, UDLM, DUO or 2605.22765.

    Besides tensors such files hold settings and sometimes a tokenizer, as objects of libraries. Those are replaced by
    stand-ins that do nothing, from which the settings are read where they are plain values. What an argument says goes
    before what the file says.

    Args:
        path: the file.
        vocab_size: K. Needed for the code of 2605.22765, where it is ``tokenizer.vocab_size`` (GPT-2: 50257); the
            others follow from the file.
        algorithm: what it was trained as.
        num_attention_heads: heads (the published sizes: very_tiny 4, tiny 8, small 12, medium 16).
        prediction_kind: what the head was trained to say (2605.22765: ``model_prediction`` is "mean_loo" or "mean").
        time_conditioning: whether the network was fed the time; MDLM's are not.
        mask_token_id: the mask, where the tokenizer has one (BERT: 103); None if it is the row after the clean tokens.
        ema: take the averaged weights where the file has them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, a network of another kind, or something that must be said and is not.
    """
    path = Path(path)
    held = _read(path)
    weights = held.get("backbone_state_dict", held.get("state_dict", held))
    prefix = _prefix(weights, str(path))
    state = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    averages = held.get("ema")
    if ema and isinstance(averages, Mapping):
        state = _averaged(state, cast(Mapping[str, Any], averages)["shadow_params"], str(path))

    settings = _plain(cast(Mapping[str, Any], held.get("hyper_parameters") or {}).get("config")) or {}
    own: dict[str, Any] = settings.get("algo") or settings
    heads = num_attention_heads or (settings.get("model") or {}).get("n_heads")
    if not isinstance(heads, int):
        raise ValueError(
            f"{str(path)!r} does not say how many attention heads its network has: pass num_attention_heads (very_tiny "
            "4, tiny 8, small 12, medium 16)"
        )
    name = algorithm or own.get("name") or _older_name(settings)
    if name is None:
        raise ValueError(f"{str(path)!r} does not say what it was trained as: pass algorithm, e.g. 'udlm'")
    chosen = _algorithm_named(name, str(path))
    # The code of 2605.22765, whose rows are those of the tokenizer or one more.
    is_theirs = prefix.startswith("diffusion.") or "backbone_state_dict" in held
    if is_theirs and vocab_size is None and chosen != "mdlm":
        raise ValueError(
            f"{str(path)!r} may have one row more than its tokenizer has tokens: pass vocab_size=tokenizer.vocab_size "
            "(GPT-2: 50257, BERT: 30522)"
        )
    if prediction_kind is None and own.get("model_prediction") in ("mean", "mean_loo"):
        prediction_kind = "denoiser" if own["model_prediction"] == "mean" else "leave_one_out"
    if time_conditioning is None and isinstance(own.get("time_conditioning"), bool):
        time_conditioning = own["time_conditioning"]
    return convert_published(
        state,
        algorithm=chosen,
        num_attention_heads=heads,
        vocab_size=vocab_size,
        prediction_kind=prediction_kind,
        time_conditioning=time_conditioning,
        mask_token_id=mask_token_id,
    )


def convert_published(
    state: Mapping[str, Tensor],
    *,
    algorithm: PublishedAlgorithm,
    num_attention_heads: int,
    vocab_size: int | None = None,
    prediction_kind: Literal["leave_one_out", "denoiser"] | None = None,
    time_conditioning: bool | None = None,
    mask_token_id: int | None = None,
) -> PublishedModel:
    """Published weights, under their own names, as a network of ours. Sizes are those of the tensors.

    Args:
        state: ``vocab_embed.embedding``, ``blocks.0.attn_qkv.weight``, ...; no prefix.
        algorithm: what it was trained as.
        num_attention_heads: heads.
        vocab_size: K; None: as the table of this module says.
        prediction_kind: what the head was trained to say; None: as the table says, and leave-one-out or denoiser for
            "udlm" and "max_coupling", their own defaults.
        time_conditioning: whether it was fed the time; None: all but MDLM's.
        mask_token_id: the mask of an MDLM; None if it is the row after the clean tokens.

    Raises:
        ValueError: weights of another network, a vocabulary that is not theirs.
    """
    rows = state[FIRST_TENSOR].shape[0]
    masked = algorithm == "mdlm"
    size = vocab_size or (rows - 1 if masked and mask_token_id is None else rows)
    _check_rows(rows, size, algorithm, mask_token_id)
    extra = [size if mask_token_id is None else mask_token_id] if masked else []
    ours = {_renamed(name): tensor.float() for name, tensor in state.items() if name != NOT_LEARNED}
    for name in ("token_embedding.weight", "noise_embedding.weight", "proj_out.weight", "proj_out.bias"):
        if name in ours:
            kept = [*range(size), *extra] if name == "token_embedding.weight" else [*range(size)]
            ours[name] = ours[name][kept]
    if masked and mask_token_id is not None:
        ours["proj_out.bias"][mask_token_id] = NEVER
    network = UniformDiffusionTransformerModel(
        **_sizes(state, num_attention_heads),
        vocab_size=size,
        mask_token=masked,
        time_conditioning=not masked if time_conditioning is None else time_conditioning,
        prediction_kind=prediction_kind or ("leave_one_out" if algorithm in ("udlm", "duo") else "denoiser"),
    )
    problems = network.load_state_dict(ours, strict=False)
    if problems.missing_keys or problems.unexpected_keys:
        raise ValueError(
            "these are weights of another network: "
            f"missing {problems.missing_keys[:3]}, not known here {problems.unexpected_keys[:3]}"
        )
    names = {"mdlm": "masked", "max_coupling": "maximal_coupling", "audm": "absorbing", "reaudm": "refreshed_absorbing"}
    return PublishedModel(network=network.eval(), kernel_name=names.get(algorithm, "uniform"), dropped=rows - size)


def _check_rows(rows: int, size: int, algorithm: str, mask_token_id: int | None) -> None:
    if algorithm == "duo" and size != rows:
        raise ValueError(f"DUO's noise is any of the {rows} rows of its table, vocab_size is {size}; leave it out")
    if algorithm == "mdlm" and not 0 <= (size if mask_token_id is None else mask_token_id) < rows:
        raise ValueError(
            f"the table has {rows} rows, none of them for the mask of {size} clean tokens; pass mask_token_id if the "
            "tokenizer has a mask of its own"
        )
    if not rows - 1 <= size <= rows:
        raise ValueError(
            f"the table has {rows} rows, which is neither vocab_size={size} nor one more: this is another tokenizer's"
        )


def _sizes(state: Mapping[str, Tensor], heads: int) -> dict[str, Any]:
    """The network's config, as far as it can be read off its tensors."""
    needed = ("sigma_map.mlp.0.weight", "blocks.0.attn_qkv.weight", "blocks.0.mlp.0.weight", "output_layer.linear.bias")
    if any(name not in state for name in needed):
        absent = next(name for name in needed if name not in state)
        raise ValueError(
            f"there is no tensor {absent!r}: these are weights of another network (an autoregressive one has no "
            "'sigma_map')"
        )
    width = state[FIRST_TENSOR].shape[1]
    cond_dim, sinusoids = state["sigma_map.mlp.0.weight"].shape
    if width % heads or sinusoids != SINUSOIDS:
        raise ValueError(f"{heads} heads and {sinusoids} sinusoids do not make a network of width {width}")
    fusion = None
    if "conditioning_input_proj.weight" in state:
        fusion = "separate_linear"
    elif "conditioning_input_mlp.0.weight" in state:
        fusion = "shared_mlp"
    return {
        "num_layers": sum(bool(re.fullmatch(r"blocks\.\d+\.norm1\.weight", name)) for name in state),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "cond_dim": cond_dim,
        "mlp_ratio": state["blocks.0.mlp.0.weight"].shape[0] // width,
        "absorbing_fusion": fusion,
    }


def _renamed(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _algorithm_named(name: str, where: str) -> PublishedAlgorithm:
    match name:
        case "mdlm" | "remdlm":
            return "mdlm"
        case "duo" | "duo_base" | "distillation":
            return "duo"
        case "udlm" | "max_coupling" | "audm" | "reaudm":
            return name
        case _:
            raise ValueError(
                f"{where!r} is a {name!r}; known here are mdlm, udlm, duo, max_coupling, audm and reaudm: pass "
                "algorithm if it is one of them"
            )


def _older_name(settings: Mapping[str, Any]) -> str | None:
    """MDLM's own code and UDLM's do not name an algorithm."""
    match settings.get("diffusion", "absorbing_state"), settings.get("parameterization"):
        case "absorbing_state", "subs":
            return "mdlm"
        case "uniform", "d3pm":
            return "udlm"
        case _, parameterization:
            return parameterization


def _prefix(state: Mapping[str, Any], where: str) -> str:
    """What stands before the names of the network's tensors."""
    found = [
        name.removesuffix(FIRST_TENSOR) for name in state if name == FIRST_TENSOR or name.endswith(f".{FIRST_TENSOR}")
    ]
    if not found:
        raise ValueError(f"{where!r} holds no tensor {FIRST_TENSOR!r}: it is no checkpoint of this family")
    # The code of 2605.22765 saves some networks under two names; others carry a teacher along.
    preferred = [prefix for prefix in found if prefix.startswith("diffusion.") or prefix == "backbone."]
    return (preferred or found)[0]


def _averaged(state: Mapping[str, Tensor], averages: Sequence[Tensor], where: str) -> dict[str, Tensor]:
    """The averaged weights: a list without names, in the order in which the network registers its parameters."""
    names = [name for name in state if name != NOT_LEARNED]
    shapes = [state[name].shape for name in names]
    if [average.shape for average in averages] != shapes:
        raise ValueError(
            f"the averaged weights in {where!r} do not line up with the network's; pass ema=False for the others"
        )
    return dict(zip(names, averages, strict=True))


class _StandIn:
    """In place of an object of a library: keeps what it was filled with, and does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {str(path)!r}; give the path of a .ckpt file")
    zipped = zipfile.is_zipfile(path)
    # Every name that torch does not know to be harmless stands for the same empty class while the file is read.
    strangers = get_unsafe_globals_in_checkpoint(path) if zipped else []
    try:
        with safe_globals([(_StandIn, name) for name in strangers]):
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:
        # The format's own exception would have to be imported from pickle, which this package does not do.
        raise ValueError(
            f"{str(path)!r} cannot be read without running code that it asks for ({type(error).__name__}: {error}); "
            "where you trust it, save {'state_dict': ..., 'ema': ...} of it with torch.save and give that file"
        ) from error
    if not isinstance(held, Mapping):
        raise ValueError(f"{str(path)!r} holds no training state")
    return cast(Mapping[str, Any], held)


def _plain(value: Any) -> Any:
    """OmegaConf's containers and nodes, read as stand-ins, as the values in them."""
    if isinstance(value, _StandIn):
        state = cast(Any, value.state)
        return _plain(state.get("_content", state.get("_val"))) if isinstance(state, dict) else None
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in cast(dict[Any, Any], value).items()}
    return value
