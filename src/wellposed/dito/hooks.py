"""Token reduction inside the transformers of diffusers.

Everything runs in hooks of diffusers' registry. One *root* on the model counts steps, decides whether a step is dense,
a Matching step or a Reduction step, and publishes the decision to the *sites*: attention modules or whole blocks.
"""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import CacheContext, StateManager
from jaxtyping import Int
from torch import Tensor, nn

from wellposed.dito.adapters import HostBlock, find_blocks, supported_blocks
from wellposed.dito.config import TokenReductionConfig
from wellposed.dito.geometry import token_grid
from wellposed.dito.matching import TokenWindows
from wellposed.dito.registry import heal_hook, hooks_of, register_hook, unregister_hook
from wellposed.dito.schedule import Measurement
from wellposed.dito.sites import (
    AttentionSite,
    BlockSite,
    EntryHook,
    MatchEvent,
    Observer,
    Site,
    outside_graph,
)
from wellposed.dito.trajectory import (
    Call,
    ContextState,
    Mode,
    SiteState,
    StepRecord,
    Summary,
    Trajectory,
    time_to_data,
)

__all__ = [
    "MatchEvent",
    "StepRecord",
    "TokenReduction",
    "apply_token_reduction",
    "remove_token_reduction",
    "token_reduction",
]

logger = logging.getLogger(__name__)

ROOT_HOOK = "token_reduction"
SITE_HOOK = "token_reduction_site"
ENTRY_HOOK = "token_reduction_entry"

# Hooks inside of a site that replace a forward and do not mind how many rows it has: ours, and that of adapters under
# layerwise casting.
_HARMLESS_HOOKS = ("peft_autocast_disable",)


def apply_token_reduction(
    model: Any, config: TokenReductionConfig | None = None, *, observer: Observer | None = None
) -> "TokenReduction":
    """Make a transformer compute only some of its image tokens at most of its steps.

    At a Matching step every site runs dense and chooses, from its own output, which tokens the next Reduction steps
    drop and whose output they are given instead (arXiv 2605.22011). Generations are told apart by their timesteps,
    branches of guidance by the pipeline's cache contexts or by the order of calls, so that nothing leaks from one into
    another.

    Args:
        model: a transformer of diffusers, or a pipeline that has one.
        config: the settings; ``TokenReductionConfig()`` if None.
        observer: called with a :class:`MatchEvent` for every site of every Matching step.

    Returns:
        a handle with what happened and ``remove()``. At ratio 0 nothing is installed.

    Raises:
        ValueError: blocks that are not supported, a model that has token reduction already, full-covariance sampling or
            a cache that it cannot be combined with, sequence parallelism, an attention processor that ``keep_kv``
            cannot replace.
    """
    config = TokenReductionConfig() if config is None else config
    transformer = _transformer_of(model)
    blocks = find_blocks(transformer)
    for field in ("block_ratios", "block_reductions"):
        unknown = sorted(set(getattr(config, field)) - {block.name for block in blocks})
        if unknown:
            raise ValueError(f"{field} names {', '.join(unknown)}; the blocks are {_listed(blocks)}")
    _refuse_occupied(transformer)
    hosts = [block for block in blocks if config.ratio_of(block.name) > 0]
    root = _RootHook(transformer, config, hosts, observer)
    if hosts:
        root.install()
    return TokenReduction(root)


def remove_token_reduction(model: Any) -> None:
    """Take token reduction off a transformer or pipeline; the model is then what it was, whatever else has been hooked
    on or off meanwhile. Nothing happens where there is none.
    """
    root = _installed_root(_transformer_of(model))
    if root is not None:
        root.uninstall()


@contextmanager
def token_reduction(
    model: Any, *, config: TokenReductionConfig | None = None, observer: Observer | None = None, **fields: Any
) -> Iterator["TokenReduction"]:
    """Within the block, ``model`` samples with token reduction.

    Args:
        model: a transformer of diffusers, or a pipeline that has one.
        config: the settings, instead of ``fields``.
        observer: see :func:`apply_token_reduction`.
        **fields: of :class:`TokenReductionConfig`.

    Raises:
        ValueError: see :func:`apply_token_reduction`; or both ``config`` and ``fields``.
    """
    if config is not None and fields:
        raise ValueError(f"give either config or {', '.join(sorted(fields))}, not both")
    reduction = apply_token_reduction(model, config or TokenReductionConfig(**fields), observer=observer)
    try:
        yield reduction
    finally:
        reduction.remove()


class TokenReduction:
    """What is installed on a model, and what it did in the generation that runs or ran last."""

    def __init__(self, root: "_RootHook") -> None:
        self._root = root
        self.config = root.config

    @property
    def site_names(self) -> tuple[str, ...]:
        """The modules whose tokens are reduced."""
        return tuple(site.name for site in self._root.sites)

    @property
    def steps(self) -> list[StepRecord]:
        """The model's calls, in order."""
        calls = [entry for summary in self._root.summaries.values() for entry in summary.steps]
        return [record for _, record in sorted(calls, key=lambda entry: entry[0])]

    @property
    def measurements(self) -> list[Measurement]:
        """What Matching steps said about the pairs they replaced, where the schedule asks for it."""
        self._root.settle()
        return [entry for summary in self._root.summaries.values() for entry in summary.measured]

    def drop_counts(self) -> dict[str, Int[Tensor, "batch tokens"]]:
        """Reduction steps in which each image token was dropped, by site; contexts one after the other on the batch."""
        self._root.settle()
        counts: dict[str, list[Tensor]] = {}
        for summary in self._root.summaries.values():
            for name, dropped in summary.counts.items():
                counts.setdefault(name, []).append(dropped.cpu())
        return {name: torch.cat(parts) for name, parts in counts.items()}

    def plan_bytes(self) -> int:
        """Memory that pairs take at this moment."""
        return sum(state.rows.num_bytes() for state in self._root.site_states() if state.rows is not None)

    def offset_bytes(self) -> int:
        """Memory that delta or linear recovery takes at this moment."""
        states = list(self._root.site_states())
        kept = [part for state in states for part in (state.offset, state.slope, state.previous) if part is not None]
        return sum(part.numel() * part.element_size() for part in kept)

    def remove(self) -> None:
        """Take it off the model; twice does nothing."""
        self._root.uninstall()


class _RootHook(ModelHook):
    """Counts, decides and publishes. Runs before the model's forward, outside of compiled code."""

    _is_stateful = True

    def __init__(
        self,
        transformer: nn.Module,
        config: TokenReductionConfig,
        hosts: list[HostBlock],
        observer: Observer | None,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.config = config
        self.observer = observer
        self.state_manager = StateManager(cast(Any, ContextState), (self.settle,))
        self.parameters = list(inspect.signature(type(transformer).forward).parameters)[1:]
        self.sites: list[Site] = []
        self.helpers: list[tuple[nn.Module, str, ModelHook]] = []
        self.summaries: dict[tuple[str, int, int], Summary] = {}  # by context, batch and branch
        self.contexts: set[str] = set()  # that the generation has named so far
        self.remaining = float("inf")  # of its time
        self.active: Trajectory | None = None
        self.calls = 0
        self.checked_step = False
        self.handles: list[Any] = []
        self.is_running = False
        self.is_installed = False
        for host in hosts:
            self._plan_host(host)

    def _plan_host(self, host: HostBlock) -> None:
        config = self.config
        attentions = host.attentions()
        if config.scope == "block":
            modules = [module for _, module in attentions]
            self.sites.append(BlockSite(config, host, host.name, host.module, self.observer, modules))
            return
        entry = EntryHook(host)
        for name, module in attentions:
            self.sites.append(AttentionSite(config, host, name, module, self.observer, entry))
        if config.metric == "input" or self.observer is not None:
            self.helpers.append((host.module, ENTRY_HOOK, entry))

    # --- on and off the model

    def install(self) -> None:
        """All hooks; or none, if one of them cannot be."""
        self.check_hosts()
        for site in self.sites:
            _refuse_inner_hooks(site)
        for site in self.sites:
            register_hook(site.module, SITE_HOOK, site)
        for module, name, hook in self.helpers:
            register_hook(module, name, hook)
        # The decision is made in a hook of torch's, because offloading puts another forward in place of the model's
        # after every generation; the registry's part is to carry contexts and resets here.
        self.handles = [
            self.transformer.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.transformer.register_forward_hook(self._after_forward),
        ]
        register_hook(self.transformer, ROOT_HOOK, self)
        HookRegistry.check_if_exists_or_initialize(self.transformer).invalidate_child_registries_cache()
        self.is_installed = True

    def uninstall(self) -> None:
        """All hooks, in whatever order others came and went."""
        if not self.is_installed:
            return
        self.settle()
        for handle in self.handles:
            handle.remove()
        for site in self.sites:
            unregister_hook(site.module, SITE_HOOK)
            site.mode = "dense"  # for whoever may have wrapped it meanwhile and still calls it
            if isinstance(site, BlockSite):
                site.restore_processors()
        for module, name, _ in self.helpers:
            unregister_hook(module, name)
        HookRegistry.check_if_exists_or_initialize(self.transformer).invalidate_child_registries_cache()
        unregister_hook(self.transformer, ROOT_HOOK)
        self.state_manager.reset()
        self.is_installed = False

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Called by pipelines at the end of a generation."""
        self.state_manager.reset()
        self.active = None
        self.remaining = float("-inf")  # whatever is called next is another generation
        return module

    # --- every call

    @outside_graph
    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            raise ValueError(
                "token reduction is for sampling: a reduced step's gradient would be that of another function. Call "
                "the model under torch.no_grad(), or take token reduction off with remove_token_reduction"
            )
        if self.is_running:  # the last call never came to its end: some sites have its pairs, others older ones
            for state in self.state_manager._state_cache.values():
                state.reset()
            self.remaining = float("-inf")
        self.settle()
        arguments = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        trajectory = self._trajectory(arguments)
        trajectory.read_measurements()
        trajectory.step += 1
        mode = self._decide(trajectory)
        record = StepRecord(context=trajectory.name, step=trajectory.step, mode=mode)
        trajectory.summary.steps.append((self.calls, record))
        self.calls += 1
        self.active = trajectory
        self._warn_if_bypassed(trajectory)
        for _, _, hook in self.helpers:
            heal_hook(hook)
        for site in self.sites:
            heal_hook(site)
            site.publish(trajectory, mode)
        self.is_running = True

    @outside_graph
    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.is_running = False

    def _trajectory(self, arguments: dict[str, Any]) -> Trajectory:
        manager = self.state_manager
        borrowed = manager._context is None  # many pipelines never name their calls
        if borrowed:
            manager.set_context(CacheContext("default"))
        try:
            name = manager.context.name
            state: ContextState = manager.get_state()  # type: ignore[assignment]
        finally:
            if borrowed:
                manager.set_context(None)
        pictures = arguments.get("x")
        if isinstance(pictures, list):
            batch, latents = len(pictures), pictures[0].unsqueeze(0)
        else:
            batch, latents = arguments["hidden_states"].shape[0], arguments["hidden_states"]
        call = Call(batch=batch, remaining=time_to_data(arguments), latents=latents)

        def start(branch: int) -> Trajectory:
            if len(state.trajectories) == 1 and branch == 0:
                self._begin(name, call.remaining)
            summary = self.summaries[name, batch, branch] = Summary()
            return self._start(name, arguments, summary)

        trajectory = state.trajectory(call, start)
        self.remaining = call.remaining
        return trajectory

    def _begin(self, context: str, remaining: float) -> None:
        """Forget the record of the last generation, at the first call of this one."""
        if remaining > self.remaining or context in self.contexts:
            self.summaries.clear()
            self.contexts.clear()
        self.contexts.add(context)

    def _start(self, name: str, arguments: dict[str, Any], summary: Summary) -> Trajectory:
        _refuse_covariance(self.transformer)
        self.check_hosts()
        for site in self.sites:
            heal_hook(site)
            _refuse_inner_hooks(site)
            if isinstance(site, BlockSite):
                site.substitute_processors()
        if arguments.get("kv_cache_mode") is not None:
            raise ValueError("cached keys of reference images are not supported by token reduction")
        config = getattr(self.transformer, "config", {})
        grid = token_grid(arguments, config.get("patch_size") if isinstance(config.get("patch_size"), int) else None)
        return Trajectory(
            name=name,
            windows=TokenWindows.of_coordinates(grid.coordinates, self.config.window, movable=grid.movable),
            generator=torch.Generator().manual_seed(self.config.seed),
            summary=summary,
            sites={site.name: SiteState() for site in self.sites},
        )

    def _decide(self, trajectory: Trajectory) -> Mode:
        config, step = self.config, trajectory.step
        if step < config.warmup_steps - 1 or (step >= config.warmup_steps and self._is_at_the_end(trajectory)):
            return "dense"
        schedule, measured = config.schedule, trajectory.summary.measured
        if step == config.warmup_steps - 1 or (
            schedule is not None and schedule.is_matching(step, trajectory.last_matching, measured)
        ):
            trajectory.last_matching = step
            trajectory.matchings += 1
            if config.ratio_by_pmr is not None:
                pmr = measured[-1].pmr if measured else None
                trajectory.factor = config.ratio_by_pmr.ratio(pmr, 1.0)
            return "match"
        return "reduce" if trajectory.factor > 0 else "dense"

    def _is_at_the_end(self, trajectory: Trajectory) -> bool:
        dense = self.config.end_dense_steps
        total = getattr(self.state_manager._context, "num_inference_steps", None) or self.config.num_inference_steps
        if dense == 0:
            return False
        if total is not None:
            return trajectory.step >= total - dense
        if dense > 1:
            raise ValueError(
                f"{dense} dense steps at the end need the number of steps, which this pipeline does not say; give "
                "TokenReductionConfig(num_inference_steps=...)"
            )
        return trajectory.ends_here()

    def _warn_if_bypassed(self, trajectory: Trajectory) -> None:
        is_after_first_match = trajectory.step == self.config.warmup_steps and trajectory.matchings
        if is_after_first_match and all(state.matching < 0 for state in trajectory.sites.values()):
            logger.warning(
                "nothing is reduced: the Matching step of context %r has reached none of %s. Something, such as "
                "offloading that was switched off since, has put other forwards in place of theirs; remove token "
                "reduction and apply it again",
                trajectory.name,
                ", ".join(trajectory.sites),
            )

    def check_hosts(self) -> None:
        """Raise where the settings need an attention that the sites do not have."""
        if self.config.keep_kv or self.config.proportional_attention:
            for site in self.sites:
                for _, attn in site.host.attentions():
                    site.host.adapter.check_processor(attn, keep_kv=self.config.keep_kv)

    @outside_graph
    def settle(self) -> None:
        """Bring the counts up to date with the sites that ran."""
        for site in self.sites:
            if site.has_reduced:
                site.state.uncounted += 1
                site.has_reduced = False
        if self.active is not None:
            self.active.read_measurements()
            for name, state in self.active.sites.items():
                state.settle()
                if state.counts is not None:
                    self.active.summary.counts[name] = state.counts

    def site_states(self) -> Iterator[SiteState]:
        """All that is kept at this moment."""
        for context in self.state_manager._state_cache.values():
            for trajectories in context.trajectories.values():
                for trajectory in trajectories:
                    yield from trajectory.sites.values()


def _refuse_inner_hooks(site: Site) -> None:
    """Ours must be the innermost of those that replace a forward: others then see sequences of full length."""
    names = list(hooks_of(site.module))
    before = names[: names.index(SITE_HOOK)] if SITE_HOOK in names else names
    inner = [name for name in before if _replaces_forward(site.module, name)]
    advice = '; a cache of attention outputs inside a block needs scope="attn"' if isinstance(site, BlockSite) else ""
    for module in site.module.modules():
        others = () if module is site.module else hooks_of(module)
        inner += [name for name in others if name not in _HARMLESS_HOOKS and _replaces_forward(module, name)]
    if inner:
        raise ValueError(
            f"{site.name} has the hook {', '.join(inner)} inside of token reduction, which would meet shortened "
            "sequences: disable the cache, apply token reduction first, and enable the cache then" + advice
        )


def _replaces_forward(module: nn.Module, name: str) -> bool:
    return hasattr(hooks_of(module)[name], "new_forward")


def _refuse_occupied(transformer: nn.Module) -> None:
    if _installed_root(transformer) is not None:
        raise ValueError("this model has token reduction already; call remove_token_reduction(model) first")
    _refuse_covariance(transformer)
    if getattr(transformer, "_parallel_config", None) is not None:
        raise ValueError(
            "sequence parallelism hands each device a part of the tokens; token reduction does not support it"
        )


def _refuse_covariance(transformer: nn.Module) -> None:
    forwards = (vars(transformer).get("forward"), vars(transformer).get("_old_forward"))
    if any(getattr(forward, "keeps_graph", False) for forward in forwards):
        raise ValueError(
            "full_covariance differentiates this model, and token reduction has no derivative that it could use; leave "
            "the full_covariance block first"
        )


def _installed_root(transformer: nn.Module) -> _RootHook | None:
    return hooks_of(transformer).get(ROOT_HOOK)


def _transformer_of(model: Any) -> nn.Module:
    model = getattr(model, "transformer", model) if not isinstance(model, nn.Module) else model
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{type(model).__name__} is neither a transformer nor a pipeline with one; token reduction takes a "
            f"pipeline such as FluxPipeline, or its transformer, with blocks of {', '.join(supported_blocks())}"
        )
    return model


def _listed(blocks: list[HostBlock]) -> str:
    return f"{blocks[0].name} to {blocks[-1].name}"
