"""Full-covariance sampling in pipelines that know nothing of it."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from wellposed.denoisers import refuse_guidance_embedding
from wellposed.lgs.branches import NetworkCalls
from wellposed.lgs.jacobian import ProductMethod, linearize
from wellposed.lgs.pipeline import LanczosDDPMPipeline
from wellposed.lgs.scheduler import LanczosDDPMScheduler, LanczosFlowMatchScheduler

__all__ = ["full_covariance"]

_NETWORK_NAMES = ("unet", "transformer", "transformer_2")


@contextmanager
def full_covariance(
    pipe: Any,
    *,
    num_lanczos_steps: int = 3,
    tol: float | None = None,
    amortize: int = 0,
    method: ProductMethod = "vjp",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    **scheduler_config: Any,
) -> Iterator[LanczosDDPMScheduler | LanczosFlowMatchScheduler]:
    """Within the block, ``pipe`` samples with the full posterior covariance of every reverse step.

    Replaces the pipeline's scheduler by ``LanczosDDPMScheduler`` (any scheduler with betas) or
    ``LanczosFlowMatchScheduler``, with the old one's config, and wraps the denoising network's forward so that its
    Jacobian is at hand when the scheduler steps. Both are undone on leaving, also after an exception. A deterministic
    or multi-step solver is thereby replaced by ancestral sampling, which wants more steps.

    Args:
        pipe: a pipeline with ``unet`` or ``transformer`` and ``scheduler``: DDPM, DiT, Stable Diffusion, SD3, ...
        num_lanczos_steps: m, the most Jacobian products a step may take; a step costs about 1 + m forward passes.
        tol: relative error at which m stops growing, 1e-2 say; None for a fixed m.
        amortize: see ``LanczosSettings.amortize``.
        method: how products are computed; "difference" for models that cannot be differentiated.
        generator: for the noise of every step, in pipelines that hand none to their scheduler (DiT, SD3, Flux).
        **scheduler_config: further config of the new scheduler, e.g. ``timestep_spacing="linspace"``.

    Yields:
        The scheduler in force; its ``record`` says what the last chain has cost.

    Raises:
        ValueError: for a pipeline without a network or a known scheduler, a distilled network that says so, a
            ControlNet, a cache, weights that move or are recast after every call, a network that is wrapped already, or
            an unknown config key.
    """
    networks = _networks(pipe)
    for name, model in networks.items():
        _check_network(name, model)
    scheduler = _lanczos_scheduler(
        pipe.scheduler,
        num_lanczos_steps=num_lanczos_steps,
        lanczos_tol=tol,
        lanczos_amortize=amortize,
        **scheduler_config,
    )
    calls = NetworkCalls()
    scheduler.network_calls, scheduler.default_generator = calls, generator
    previous = pipe.scheduler
    with ExitStack() as stack:
        stack.callback(calls.clear)
        for model in networks.values() if num_lanczos_steps > 0 else ():
            stack.enter_context(_linearized(model, calls, method))
        stack.callback(setattr, pipe, "scheduler", previous)
        pipe.scheduler = scheduler
        yield scheduler


class _LinearizedForward:
    """Runs the network with a graph to its sample, keeps the graph for the scheduler, returns the output without it."""

    keeps_graph = True  # read by hooks that have no derivative

    def __init__(
        self, module: nn.Module, forward: Callable[..., Any], calls: NetworkCalls, method: ProductMethod
    ) -> None:
        functools.update_wrapper(self, forward)
        self.forward = forward
        self.calls = calls
        self.method: ProductMethod = method
        self.module = module
        self.sample_name = list(inspect.signature(type(_unwrapped(module)).forward).parameters)[1]
        self.is_active = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_active:
            return self.forward(*args, **kwargs)
        with torch.inference_mode(False):
            args, kwargs = tree_map(lambda leaf: leaf.clone() if _is_inference(leaf) else leaf, (args, kwargs))
        x, rest = (args[0], args[1:]) if args else (kwargs.pop(self.sample_name), ())
        if not isinstance(x, Tensor):
            raise ValueError(
                f"{type(_unwrapped(self.module)).__name__} takes its sample as a {type(x).__name__}; full_covariance "
                "needs one tensor for the batch"
            )
        first: list[Any] = []

        def predict(x: Tensor) -> Tensor:
            output = self.forward(x, *rest, **kwargs)
            if not first:
                first.append(output)
            return output[0] if not isinstance(output, Tensor) else output

        linear = linearize(predict, x, method=self.method, module=self.module)
        self.calls.add(linear)
        return _with_output(first[0], linear.output)


@contextmanager
def _linearized(model: nn.Module, calls: NetworkCalls, method: ProductMethod) -> Iterator[None]:
    """``model`` with its innermost forward wrapped.

    accelerate keeps the forward of an offloaded model in ``_old_forward`` and puts it back after every call of the
    pipeline; wrapping that one keeps us in place.
    """
    slot = "_old_forward" if "_old_forward" in vars(model) else "forward"
    original, was_own = getattr(model, slot), slot in vars(model)
    wrapped = _LinearizedForward(model, original, calls, method)
    setattr(model, slot, wrapped)
    try:
        yield
    finally:
        wrapped.is_active = False  # in case something else has wrapped it meanwhile
        for name in ("_old_forward", "forward"):
            if vars(model).get(name) is wrapped:
                setattr(model, name, original)
        if not was_own and vars(model).get("forward") == original:
            del model.forward


def _with_output(output: Any, tensor: Tensor) -> Any:
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, tuple):
        return (tensor, *output[1:])
    first = next(iter(output.keys()))
    return type(output)(**{**output, first: tensor})


def _is_inference(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_inference()


def _unwrapped(module: nn.Module) -> nn.Module:
    return getattr(module, "_orig_mod", module)


def _networks(pipe: Any) -> dict[str, nn.Module]:
    if isinstance(pipe, LanczosDDPMPipeline):
        raise ValueError(
            "LanczosDDPMPipeline samples with the full covariance by itself; choose m with pipe.scheduler = "
            "LanczosDDPMScheduler.from_config(pipe.scheduler.config, num_lanczos_steps=...)"
        )
    if isinstance(getattr(pipe, "controlnet", None), nn.Module):
        raise ValueError(
            "a ControlNet computes part of the prediction from x_t outside the network, where it is not "
            "differentiated: the covariance would be wrong; use a pipeline without one"
        )
    networks = {name: model for name in _NETWORK_NAMES if isinstance(model := getattr(pipe, name, None), nn.Module)}
    if not networks or getattr(pipe, "scheduler", None) is None:
        raise ValueError(
            f"{type(pipe).__name__} has no denoising network (unet or transformer) with a scheduler; full_covariance "
            "takes a diffusers pipeline such as DDPMPipeline"
        )
    return networks


def _check_network(name: str, model: nn.Module) -> None:
    config = getattr(model, "config", {})
    refuse_guidance_embedding(config)
    if config.get("time_cond_proj_dim", None) is not None:
        raise ValueError(
            f"{name}.config.time_cond_proj_dim is set: the network was distilled to imitate guidance, so its output is "
            "not E[x_0 | x_t] and its Jacobian is not a posterior covariance; use an undistilled checkpoint"
        )
    slots = (vars(model).get("forward"), vars(model).get("_old_forward"))
    if any(isinstance(slot, _LinearizedForward) and slot.is_active for slot in slots):
        raise ValueError("this pipeline is inside a full_covariance block already; blocks do not nest")
    if "token_reduction" in getattr(getattr(model, "_diffusers_hook", None), "hooks", {}):
        raise ValueError(
            f"token reduction is on the {name}, and it has no derivative for full_covariance to use; call "
            "remove_token_reduction(pipe) first"
        )
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(
            f"{name}.compile() compiles our wrapper along with the model; use {name}.compile_repeated_blocks() or "
            f"pipe.{name} = torch.compile(pipe.{name}) instead"
        )
    if getattr(model, "is_cache_enabled", False):
        raise ValueError(
            f"a cache is enabled on the {name}: its Jacobian is not the model's; call {name}.disable_cache()"
        )
    for child_name, child in model.named_modules():
        offloads = getattr(getattr(child, "_hf_hook", None), "offload", False)
        hooks = getattr(getattr(child, "_diffusers_hook", None), "hooks", {})
        if offloads or "group_offloading" in hooks or "layerwise_casting" in hooks:
            raise ValueError(
                f"{'.'.join(filter(None, (name, child_name)))} moves or recasts its weights after every call, so that "
                "a saved graph would read other numbers; use enable_model_cpu_offload, or full precision storage"
            )


def _lanczos_scheduler(scheduler: Any, **config: Any) -> LanczosDDPMScheduler | LanczosFlowMatchScheduler:
    kind, old = type(scheduler).__name__, scheduler.config
    if "LCM" in kind or "TCD" in kind:
        raise ValueError(
            f"{kind} belongs to a network distilled to few steps, which is no conditional mean; load the undistilled "
            "network and set pipe.scheduler to the DDPMScheduler that it was trained with"
        )
    if kind.startswith("FlowMatch") or isinstance(scheduler, LanczosFlowMatchScheduler):
        return _from_config(LanczosFlowMatchScheduler, old, config)
    if getattr(scheduler, "alphas_cumprod", None) is None or old.get("use_flow_sigmas", False):
        raise ValueError(
            f"{kind} has no alphas_cumprod, so the Gaussian path of its model is unknown; set pipe.scheduler to the "
            "DDPMScheduler or FlowMatchEulerDiscreteScheduler that the model was trained with"
        )
    if old.get("prediction_type", "epsilon") not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(f"prediction_type {old.prediction_type!r} is none of epsilon, sample, v_prediction")
    if "clip_sample" not in old:
        # A scheduler without the word does not clip, but DDPMScheduler's default does; latents leave [-1, 1].
        config.setdefault("clip_sample", False)
    converted = _from_config(LanczosDDPMScheduler, old, config)
    before, after = scheduler.alphas_cumprod.cpu().double(), converted.alphas_cumprod.double()
    # Some schedulers replace the very last value, 0 at zero terminal SNR, by a tiny one.
    if before.shape != after.shape or not torch.allclose(before[:-1], after[:-1], rtol=1e-3, atol=1e-6):
        raise ValueError(
            f"{kind} shifts its noise schedule in a way that DDPMScheduler's config cannot say; set pipe.scheduler to "
            "a DDPMScheduler with trained_betas that give the same alphas_cumprod"
        )
    return converted


def _from_config(kind: type[Any], old: Any, config: dict[str, Any]) -> Any:
    known = set(inspect.signature(kind.__init__).parameters)
    unknown = sorted(set(config) - known)
    if unknown:
        raise ValueError(f"{kind.__name__} has no config {', '.join(unknown)}; see its docstring for those it has")
    # Said again, because diffusers forgets values that were the old class's defaults.
    shared = {key: value for key, value in old.items() if key in known and value is not None}
    return kind.from_config(old, **{**shared, **config})
