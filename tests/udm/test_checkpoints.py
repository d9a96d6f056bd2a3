"""Public layouts, written out by their own names with random weights, against what the adapters make of them."""

import importlib.util
import json
import shutil
import sys
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from wellposed.data.tokenizers import byte_tokenizer
from wellposed.udm.checkpoints import convert_published, load_hub_checkpoint, load_lightning_checkpoint
from wellposed.udm.kernels import Absorbing, Masked, MaximalCoupling, RefreshedAbsorbing, TokenState, Uniform

SPEC = importlib.util.spec_from_file_location("published_networks", Path(__file__).with_name("published_networks.py"))
assert SPEC is not None and SPEC.loader is not None
published = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(published)

TOLERANCE = 1e-5
K = 11
ALPHA = torch.tensor([0.9, 0.05, 1.0], dtype=torch.float64)


def tokens(high: int = K, seed: int = 1) -> Tensor:
    return torch.randint(high, (3, 7), generator=torch.Generator().manual_seed(seed))


def settings(**values: Any) -> dict[str, Any]:
    return {"algo": values, "model": {"n_heads": 2}}


def ckpt(path: Path, network: Any, prefix: str, *, ema: Any = None, config: Any = None, **more: Any) -> Path:
    """What Lightning writes, less what nobody reads."""
    held = {
        "epoch": 3,
        "state_dict": OrderedDict(published.under(prefix, network).state_dict()),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-3}]}],
        **more,
    }
    if ema is not None:
        held["ema"] = {"decay": 0.9999, "num_updates": 7, "shadow_params": [p.detach() for p in ema.parameters()]}
    if config is not None:
        held["hyper_parameters"] = {"config": config}
    torch.save(held, path)
    return path


@torch.no_grad()
def assert_same(model: Any, theirs: Any, x: Tensor, sigma: Tensor, u: Tensor | None = None) -> None:
    size = model.network.config.vocab_size
    found = model.network(x, ALPHA, noise_ids=u).logits
    expected = theirs(x, sigma, u)[..., :size]
    assert expected.std() > 0.5  # the tolerance means something
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_udlm_as_a_repository_of_remote_code(tmp_path: Path) -> None:
    theirs = published.DIT(K)
    state = published.under("backbone", theirs).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    config = {"model_type": "udlm", "vocab_size": K, "n_heads": 2, "time_conditioning": True, "cfg": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_hub_checkpoint(tmp_path)
    assert (model.kernel, model.dropped) == (Uniform(K), 0)
    assert model.network.config.prediction_kind == "leave_one_out"
    assert not model.network.training
    assert_same(model, theirs, tokens(), -ALPHA.log())
    # As the room's samplers ask it: by rows, knowing what it is.
    rows = tokens() > 5
    prediction = model.token_model()(TokenState(tokens=tokens()), ALPHA, rows=rows)
    assert prediction.kind == "leave_one_out"
    torch.testing.assert_close(prediction.logits, theirs(tokens(), -ALPHA.log())[rows], atol=TOLERANCE, rtol=0)


def test_mdlm_as_a_repository_of_remote_code(tmp_path: Path) -> None:
    theirs = published.DIT(K + 1)
    save_file(
        {f"backbone.{name}": tensor for name, tensor in theirs.state_dict().items()}, tmp_path / "model.safetensors"
    )
    config = {"model_type": "mdlm", "vocab_size": K + 1, "n_heads": 2, "time_conditioning": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_hub_checkpoint(tmp_path)
    assert (model.kernel, model.dropped) == (Masked(K), 1)
    assert_same(model, theirs, tokens(K + 1), torch.zeros(3))


def test_duo_draws_noise_from_every_row(tmp_path: Path) -> None:
    theirs = published.DIT(K)
    save_file(
        {f"backbone.{name}": tensor for name, tensor in theirs.state_dict().items()}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "DUO", "causal": False, "n_heads": 2}))
    model = load_hub_checkpoint(tmp_path)
    assert (model.kernel, model.network.config.prediction_kind) == (Uniform(K), "leave_one_out")
    assert_same(model, theirs, tokens(), -ALPHA.log())


def test_a_mask_inside_the_vocabulary(tmp_path: Path) -> None:
    """BERT's: [MASK] keeps its id as a token that is never clean, and the mask of the kernel is another row."""
    theirs, mask = published.DIT(K), 4
    path = ckpt(tmp_path / "mdlm.ckpt", theirs, "backbone", config=settings(name="mdlm", time_conditioning=False))
    model = load_lightning_checkpoint(path, mask_token_id=mask)
    assert (model.kernel, model.dropped) == (Masked(K), 0)
    x = tokens()
    assert (x == mask).any()
    with torch.no_grad():
        expected = theirs(x, torch.zeros(3))
        found = model.network(torch.where(x == mask, K, x)).logits
    assert (found[..., mask] < -6e4).all()
    others = torch.arange(K) != mask
    torch.testing.assert_close(found[..., others], expected[..., others], atol=TOLERANCE, rtol=0)
    out = model.pipeline()(length=200, num_inference_steps=3, output_type="ids")
    assert (out.ids[0] != mask).all() and (out.ids[0] < K).all()


THEIRS = {
    "udlm": (Uniform, None, {"model_prediction": "mean_loo"}, "leave_one_out"),
    "udlm as denoiser": (Uniform, None, {"model_prediction": "mean"}, "denoiser"),
    "max_coupling": (MaximalCoupling, None, {"model_prediction": "mean"}, "denoiser"),
    "audm": (Absorbing, "separate_linear", {}, "denoiser"),
    "reaudm": (RefreshedAbsorbing, "shared_mlp", {}, "denoiser"),
    "remdlm": (Masked, None, {"time_conditioning": False}, "denoiser"),
}


@pytest.mark.parametrize(
    ("case", "row"),
    # Rows beyond the tokenizer's. (A mask inside the vocabulary has a test of its own.)
    [(case, row) for case in THEIRS for row in (0, 1) if row or THEIRS[case][0] is not Masked],
)
def test_the_code_of_the_paper(tmp_path: Path, case: str, row: int) -> None:
    kernel, fusion, said, kind = THEIRS[case]
    theirs = published.DIT(K + row, fusion=fusion)
    config = settings(name=case.split()[0], **said)
    path = ckpt(tmp_path / "last.ckpt", theirs, "diffusion.model.backbone", config=config)
    model = load_lightning_checkpoint(path, vocab_size=K)
    assert (model.kernel, model.dropped) == (kernel(K), row)
    assert model.network.config.prediction_kind == kind
    sigma = torch.zeros(3) if kernel is Masked else -ALPHA.log()
    noise = None
    if fusion:
        noise = torch.where(tokens(2, seed=3) == 0, tokens(), tokens(seed=4))
    assert_same(model, theirs, tokens(K + (kernel is Masked)), sigma, noise)


@pytest.mark.parametrize(
    ("algorithm", "sigma"), [("mdlm", torch.zeros(3)), ("udlm", -ALPHA.log()), ("max_coupling", -ALPHA.log())]
)
def test_what_is_not_said_is_as_published(algorithm: Any, sigma: Tensor) -> None:
    theirs = published.DIT(K)
    model = convert_published(theirs.state_dict(), algorithm=algorithm, num_attention_heads=2)
    assert_same(model, theirs, tokens(model.kernel.vocab_size), sigma)
    assert model.network.config.prediction_kind == ("leave_one_out" if algorithm == "udlm" else "denoiser")


def test_averaged_weights_are_taken_in_their_order(tmp_path: Path) -> None:
    trained, averaged = published.DIT(K, fusion="separate_linear"), published.DIT(K, fusion="separate_linear", seed=1)
    path = ckpt(tmp_path / "a.ckpt", trained, "diffusion.model.backbone", ema=averaged, config=settings(name="audm"))
    for ema, expected in ((True, averaged), (False, trained)):
        model = load_lightning_checkpoint(path, vocab_size=K, ema=ema)
        assert_same(model, expected, tokens(), -ALPHA.log(), tokens(seed=4))
    other = published.DIT(K, fusion="separate_linear", blocks=3)
    path = ckpt(tmp_path / "b.ckpt", trained, "diffusion.model.backbone", ema=other, config=settings(name="audm"))
    with pytest.raises(ValueError, match="do not line up"):
        load_lightning_checkpoint(path, vocab_size=K)


def test_a_network_under_two_names_and_one_without_any(tmp_path: Path) -> None:
    """Sudoku's trainer registers it twice; ``backbone_state_dict`` has no prefix."""
    theirs = published.DIT(K)
    both = {
        **published.under("backbone.backbone", theirs).state_dict(),
        **published.under("diffusion.model.backbone", theirs).state_dict(),
    }
    torch.save({"state_dict": both, "hyper_parameters": {"config": settings(name="udlm")}}, tmp_path / "two.ckpt")
    assert_same(load_lightning_checkpoint(tmp_path / "two.ckpt", vocab_size=K), theirs, tokens(), -ALPHA.log())
    torch.save({"backbone_state_dict": theirs.state_dict()}, tmp_path / "none.ckpt")
    said: dict[str, Any] = {"algorithm": "udlm", "num_attention_heads": 2}
    with pytest.raises(ValueError, match="pass vocab_size"):
        load_lightning_checkpoint(tmp_path / "none.ckpt", **said)
    model = load_lightning_checkpoint(tmp_path / "none.ckpt", **said, vocab_size=K)
    assert_same(model, theirs, tokens(), -ALPHA.log())


@pytest.mark.parametrize(
    ("config", "kernel"),
    [
        ({"parameterization": "subs", "time_conditioning": False}, Masked(K)),
        ({"diffusion": "absorbing_state", "parameterization": "subs", "time_conditioning": False}, Masked(K)),
        ({"diffusion": "uniform", "parameterization": "d3pm", "time_conditioning": True}, Uniform(K + 1)),
    ],
    ids=["MDLM", "MDLM of discrete-diffusion-guidance", "UDLM"],
)
def test_older_configs_name_no_algorithm(tmp_path: Path, config: dict[str, Any], kernel: Any) -> None:
    theirs = published.DIT(K + 1)
    path = ckpt(tmp_path / "m.ckpt", theirs, "backbone", config={**config, "model": {"n_heads": 2}}, ema=theirs)
    model = load_lightning_checkpoint(path)
    assert model.kernel == kernel
    sigma = torch.zeros(3) if isinstance(kernel, Masked) else -ALPHA.log()
    assert_same(model, theirs, tokens(K + 1), sigma)


@pytest.fixture
def omegaconf(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """Values as OmegaConf pickles them (2.4): containers with ``_content``, leaves with ``_val``, parents, metadata."""
    kinds: dict[str, Any] = {}
    for module, name in {"dictconfig": "DictConfig", "nodes": "AnyNode", "base": "Metadata"}.items():
        where = f"omegaconf.{module}"
        kinds[name] = type(name, (), {"__module__": where, "__getstate__": lambda self: self.held})
        monkeypatch.setitem(sys.modules, where, types.ModuleType(where))
        setattr(sys.modules[where], name, kinds[name])
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))

    def wrapped(value: Any, parent: Any = None) -> Any:
        meta = kinds["Metadata"]()
        meta.held = {"ref_type": Any, "flags": {}, "resolver_cache": defaultdict(dict)}
        node = kinds["DictConfig" if isinstance(value, dict) else "AnyNode"]()
        node.held = {"_metadata": meta, "_parent": parent}
        if isinstance(value, dict):
            node.held["_content"] = {key: wrapped(entry, node) for key, entry in value.items()}
        else:
            node.held["_val"] = value
        return node

    return wrapped


class Trap:
    """Unpickled in earnest, it copies a file."""

    def __init__(self, *paths: Path) -> None:
        self.paths = tuple(map(str, paths))

    def __reduce__(self) -> Any:
        return (shutil.copyfile, self.paths)


def test_settings_are_read_and_nothing_in_the_file_runs(tmp_path: Path, omegaconf: Callable[[Any], Any]) -> None:
    theirs = published.DIT(K)
    path = ckpt(
        tmp_path / "last.ckpt",
        theirs,
        "backbone",
        config=omegaconf(settings(name="duo_base", time_conditioning=True)),
        tokenizer=Trap(Path(__file__), tmp_path / "sprung"),
        optimizer=torch.optim.AdamW,
    )
    model = load_lightning_checkpoint(path)
    assert model.kernel == Uniform(K)
    assert_same(model, theirs, tokens(), -ALPHA.log())
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(Exception, match="Unsupported global|not an allowed global"):
        torch.load(path, weights_only=True)  # the stand-ins are gone again


def test_files_of_the_old_format(tmp_path: Path) -> None:
    theirs = published.DIT(K)
    torch.save(
        {
            "state_dict": published.under("backbone", theirs).state_dict(),
            "hyper_parameters": {"config": settings(name="duo")},
        },
        tmp_path / "old.ckpt",
        _use_new_zipfile_serialization=False,
    )
    assert_same(load_lightning_checkpoint(tmp_path / "old.ckpt"), theirs, tokens(), -ALPHA.log())


def test_a_pipeline_from_a_checkpoint_can_be_saved_in_our_format(tmp_path: Path) -> None:
    theirs = published.DIT(256)
    model = convert_published(theirs.state_dict(), algorithm="udlm", num_attention_heads=2)
    pipe = model.pipeline(byte_tokenizer(), corrector_steps=1, corrector_k=2, temperature=0.9)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    first, second = (
        one(length=9, num_inference_steps=3, generator=torch.Generator().manual_seed(0)) for one in (pipe, again)
    )
    assert first.texts == second.texts
    assert first.evaluations == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "duo", "vocab_size": K - 1}, "any of the 11 rows"),
        ({"algorithm": "udlm", "vocab_size": K - 2}, "neither vocab_size=9 nor one more"),
        ({"algorithm": "udlm", "vocab_size": K + 1}, "neither vocab_size=12 nor one more"),
        ({"algorithm": "mdlm", "vocab_size": K}, "none of them for the mask"),
        ({"algorithm": "udlm", "num_attention_heads": 3}, "3 heads and 256 sinusoids do not make"),
    ],
)
def test_weights_that_are_something_else_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert_published(published.DIT(K).state_dict(), **({"num_attention_heads": 2} | options))


def test_other_networks_are_refused(tmp_path: Path) -> None:
    state = published.DIT(K).state_dict()
    causal = {name: tensor for name, tensor in state.items() if "sigma_map" not in name}
    with pytest.raises(ValueError, match="autoregressive"):
        convert_published(causal, algorithm="duo", num_attention_heads=2)
    conditioned = {**state, "cond_map.embedding_table.weight": torch.ones(3, 12)}
    with pytest.raises(ValueError, match=r"not known here \['cond_map"):
        convert_published(conditioned, algorithm="udlm", num_attention_heads=2)
    lame = published.DIT(K, fusion="separate_linear").state_dict()
    lame.pop("conditioning_input_proj.bias")
    with pytest.raises(ValueError, match=r"missing \['noise_fusion"):
        convert_published(lame, algorithm="audm", num_attention_heads=2)


def test_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    theirs = published.DIT(K)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_lightning_checkpoint(tmp_path / "absent.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(ValueError, match="cannot be read without running code"):
        load_lightning_checkpoint(tmp_path / "text.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="no training state"):
        load_lightning_checkpoint(tmp_path / "list.ckpt")
    torch.save({"state_dict": {"conditioning_vocab_embed.embedding": torch.ones(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of this family"):
        load_lightning_checkpoint(tmp_path / "other.ckpt")
    silent = ckpt(tmp_path / "silent.ckpt", theirs, "backbone")
    with pytest.raises(ValueError, match="pass num_attention_heads"):
        load_lightning_checkpoint(silent)
    with pytest.raises(ValueError, match="pass algorithm"):
        load_lightning_checkpoint(silent, num_attention_heads=2)
    sedd = ckpt(tmp_path / "sedd.ckpt", theirs, "backbone", config=settings(name="sedd"))
    with pytest.raises(ValueError, match="is a 'sedd'"):
        load_lightning_checkpoint(sedd)


def test_repositories_that_are_something_else_are_refused(tmp_path: Path) -> None:
    save_file(published.DIT(K).state_dict(), tmp_path / "model.safetensors")
    for config, message in (
        ({"model_type": "duo", "causal": True, "n_heads": 2}, "autoregressive or conditioned"),
        ({"model_type": "udlm", "cfg": True, "n_heads": 2}, "autoregressive or conditioned"),
        ({"model_type": "bert", "n_heads": 2}, "is a 'bert'"),
        ({"model_type": "duo"}, "no 'n_heads'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            load_hub_checkpoint(tmp_path)
    with pytest.raises(OSError, match="no folder here with config.json and model.safetensors"):
        load_hub_checkpoint(tmp_path / "nothing")
