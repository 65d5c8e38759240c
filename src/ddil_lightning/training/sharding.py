"""Networks split over the processes (FSDP2): the strategy `fsdp2`, what it shards, and how whole networks come back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn

from ddil_lightning.backbones.network import Network
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.processes import IN_STEP, PATIENCE, wait_at_most


class Sharded(ModelParallelStrategy):
    """`trainer.strategy=fsdp2`: every process keeps its share of the weights, gradients, averages and optimiser states.

    The frozen pipeline stays whole on every process (`model.memory.teacher_dtype` halves it), because each call would gather it anew.
    Checkpoints are single files with whole weights, as under DDP.

    Args:
        process_group_backend: nccl or gloo; by default what the devices have.
        timeout: how long a process waits for the others before it gives up.
    """

    def __init__(self, process_group_backend: str | None = None, timeout: timedelta = PATIENCE) -> None:
        super().__init__(
            tensor_parallel_size=1, save_distributed_checkpoint=False, process_group_backend=process_group_backend, timeout=timeout
        )

    def setup_environment(self) -> None:
        """Shard over all processes. Lightning's own default would take the number of nodes, and split nothing within one."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Raises ValueError for a checkpoint of whole networks: its optimisers number their states in another order."""
        clocks = torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=True).get("ddil", {})
        if not clocks.get("sharded"):
            raise ValueError(f"the checkpoint {checkpoint_path} was written with whole networks: go on without trainer.strategy=fsdp2")
        return super().load_checkpoint(checkpoint_path, weights_only)


StrategyRegistry.register("fsdp2", Sharded, description="Networks sharded over all processes (FSDP2)", override=True)


def check_strategy(strategy: Any, precision: str, shares: bool = False, offload: bool = False) -> None:
    """Raises ValueError for another strategy that splits networks (roll-outs, averages and the export would not find them whole), for a
    gradient scaler over shards, and for shards of networks of which some parts are others' too (`shares`) or that move (`offload`)."""
    if isinstance(strategy, Sharded):
        if shares:
            raise ValueError(
                "model.adapter puts all roles on one frozen network, which fsdp2 would split for each of them: take trainer.strategy ddp"
            )
        if offload:
            raise ValueError("memory.offload moves whole networks, which fsdp2 splits: leave one of the two out")
        if precision == "16-mixed":
            raise ValueError("trainer.precision 16-mixed scales gradients, which is not supported under fsdp2: take bf16-mixed")
    elif isinstance(strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
        raise ValueError(
            f"trainer.strategy {type(strategy).__name__} splits the networks in a way that is not supported: take fsdp2, or ddp where "
            "every process has memory for them whole"
        )


def be_patient(strategy: Any) -> None:
    """Have DDP wait as long as fsdp2 does, unless it was told another time: the first process prepares data for all, which of millions of
    pictures takes longer than the 30 minutes that Lightning gives it."""
    if isinstance(strategy, DDPStrategy) and strategy._timeout == default_pg_timeout:
        strategy._timeout = PATIENCE


def in_step(strategy: Any, yes: bool) -> None:
    """Have the processes wait for each other as long as a training may need, IN_STEP, or (`yes` is false) PATIENCE again; who was told a
    time of its own keeps it."""
    if getattr(strategy, "_timeout", None) is PATIENCE:  # an equal one is a user's own
        wait_at_most(IN_STEP if yes else PATIENCE)


def shard(networks: Iterable[nn.Module], mesh: Any) -> None:
    """Split networks, each a root of its own."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for network in networks:
        network.to(memory_format=torch.contiguous_format)  # FSDP2 cuts plain layouts only
        # Resharded after every forward, the root too: else a network that is never trained would stay gathered.
        for part in (*(network.blocks() if isinstance(network, Network) else ()), network):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
        if isinstance(network, Network):
            for name in ("features", "with_features"):  # other ways in than forward
                register_fsdp_forward_method(network, name)


def share(p: Tensor) -> Tensor:
    """What this process holds of a parameter, differentiably: all of it where nothing is sharded."""
    return p.to_local() if hasattr(p, "to_local") else p


@contextmanager
def kept(network: nn.Module) -> Iterator[None]:
    """Inside, a backward pass leaves the weights of a sharded network gathered: another one goes through the same graph."""
    parts: list[Any] = [part for part in network.modules() if hasattr(part, "set_reshard_after_backward")]
    for part in parts:
        part.set_reshard_after_backward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_backward(True, recurse=False)


def networks(method: nn.Module) -> Iterator[nn.Module]:
    """The networks behind a method's submodules: those of its roles, and other modules with parameters, called by their forward."""
    for child in method.children():
        network = child.network if isinstance(child, Denoiser) else child
        if next(network.parameters(), None) is not None:
            yield network


def skeleton(network: nn.Module) -> nn.Module:
    """A copy of a network that is not sharded yet, without memory for its weights."""
    empty: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in network.parameters()}
    return copy.deepcopy(network, empty)


def gather(network: nn.Module, bare: nn.Module) -> nn.Module | None:
    """The frozen whole of a sharded network in its skeleton `bare`, on the first process; None on the others. All must ask together."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if torch.distributed.get_rank():
        return None
    made = copy.deepcopy(bare)
    made.load_state_dict(state, assign=True)
    return made.requires_grad_(False).eval()


class Shards:
    """The networks of a method under `fsdp2`, and the deployed one whole, for what the first process does alone."""

    def __init__(self) -> None:
        self.whole: nn.Module | None = None  # the deployed network, gathered of its shards or with its adapters merged
        self._bare: nn.Module | None = None  # the same without its weights

    @property
    def split(self) -> bool:
        """Whether the networks are split over the processes."""
        return self._bare is not None

    def set_up(self, method: nn.Module, deployed: nn.Module, strategy: Any) -> None:
        """Split the networks of `method`, where the strategy says so."""
        self.whole = None
        if isinstance(strategy, Sharded) and not self.split:
            self._bare = skeleton(deployed)
            shard(networks(method), strategy.device_mesh["data_parallel"])

    def gather(self, deployed: nn.Module, device: torch.device) -> None:
        """Make the deployed network whole on the first process. All processes ask together; does nothing where none is split."""
        if self._bare is not None:
            found = gather(deployed, self._bare)
            self.whole = None if found is None else found.to(device)

    def forget(self) -> None:
        """Let go of the whole network."""
        self.whole = None
