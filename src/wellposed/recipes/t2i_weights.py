"""What of a network a stage trains, and how that leaves the run: all its weights, or an adapter beside them."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch

from wellposed.lens.adapters import AdapterOnly, add_adapter, save_adapter
from wellposed.lens.objectives import freeze_unread
from wellposed.lens.transformer import LensTransformer2DModel
from wellposed.recipes.optimize import averaged_network, seeded_network
from wellposed.recipes.t2i_recipe import LoraSettings
from wellposed.training import Run

__all__ = ["AdapterBeside", "WholeNetwork"]


class WholeNetwork:
    """All weights but those that no loss reaches.

    Attributes:
        network: the network.
        module: what is trained: the same.

    Args:
        network: what it reads is unfrozen, the rest frozen, in place.
    """

    def __init__(self, network: LensTransformer2DModel) -> None:
        freeze_unread(network)
        self.network = self.module = network

    @contextmanager
    def averaged(self, run: Run, player: str, folder: Path) -> Generator[LensTransformer2DModel | None]:
        """The network with its averaged weights, on the main rank; every rank calls it.

        Args:
            run: the run in progress.
            player: the network's.
            folder: where a sharded network may be put together.
        """
        if run.config.sharding == "fsdp2":
            yield averaged_network(run, player, LensTransformer2DModel, folder)
            return
        with run.evaluating(player):  # not a copy: a card that trains four billion weights has no room for one
            yield self.network if run.workers.is_main else None

    def save(self, network: LensTransformer2DModel, folder: Path) -> None:
        """Write what was trained into a pipeline's folder."""
        network.save_pretrained(folder / "transformer")


class AdapterBeside:
    """An adapter beside frozen weights.

    Attributes:
        network: the network with its adapter.
        module: what is trained: the adapter.

    Args:
        network: gets an adapter, in place.
        settings: of the adapter.
        seed: of its weights.
        device: where the network is to compute.
    """

    def __init__(
        self, network: LensTransformer2DModel, settings: LoraSettings, *, seed: int, device: torch.device
    ) -> None:
        def adapted() -> LensTransformer2DModel:
            add_adapter(network, rank=settings.rank, alpha=settings.alpha, mlps=settings.mlps)
            return network

        # Before it moves: a device has random numbers of its own.
        self.network = seeded_network(adapted, seed)
        torch.nn.Module.to(self.network, device)
        self.module = AdapterOnly(self.network)

    @contextmanager
    def averaged(self, run: Run, player: str, folder: Path) -> Generator[LensTransformer2DModel | None]:
        """See :class:`WholeNetwork`."""
        with run.evaluating(player):
            yield self.network if run.workers.is_main else None

    def save(self, network: LensTransformer2DModel, folder: Path) -> None:
        """See :class:`WholeNetwork`."""
        save_adapter(network, folder)
