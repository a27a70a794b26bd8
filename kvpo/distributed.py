"""Ranks: who does what, and what all must agree on.  A single process is a world of one: the same code, without a message.

    torchrun --nproc-per-node 8 -m kvpo align RECIPE --out RUN

Which groups a step has never depends on the ranks; each rank takes its share of them, gradients are added, and every
rank makes the same update.  Every rank enters every collective: what fails on one is an error on all, before the update.
Ranks may stand in rows that share one group (`Ranks.split`, `kvpo.branch_parallel`); a row is `Ranks` again.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Callable, Sequence, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others; a group at full size takes minutes."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, or those of them along one dimension of a mesh."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    """Where tensors are when they are sent."""
    channel: dist.ProcessGroup | None = None
    """Whom messages go to; None: all processes."""

    @classmethod
    def join(cls, device: torch.device) -> Ranks:
        """Those that torchrun has started; alone without it."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls(device=device)
        if not dist.is_initialized():
            store, rank, world = next(dist.rendezvous("env://", timeout=PATIENCE))
            if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":  # torchrun (2.13) keeps one store over its restarts: addresses of killed processes are still in it
                store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world, timeout=PATIENCE)
        return cls(dist.get_rank(), world, device)

    def split(self, size: int) -> tuple[Ranks, Ranks]:
        """Rows of ``size`` neighbours: (this rank's column, one rank of every row; its row).  ValueError if they leave a rank over."""
        if self.world % size:
            raise ValueError(f"branch_parallel = {size} does not divide {self.world} processes; start a multiple of {size} by torchrun --nproc-per-node, or set branch_parallel to 1")
        if self.world == 1:
            return self, self
        mesh = init_device_mesh(self.device.type, (self.world // size, size), mesh_dim_names=("group", "branch"))
        column, row = (replace(self, rank=m.get_local_rank(), world=m.size(), channel=m.get_group()) for m in (mesh["group"], mesh["branch"]))
        dist.distributed_c10d._set_pg_timeout(PATIENCE, row.channel)  # NCCL's own is ten minutes, and a mesh is not told
        return column, row

    def leave(self) -> None:
        """At the end, or after an error: a process that ends with its connections open may be aborted while it does."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """This one writes."""
        return self.rank == 0

    @property
    def last(self) -> bool:
        return self.rank == self.world - 1

    def share(self, count: int) -> range:
        """Which of ``count`` groups are this rank's.  ValueError if some rank would have none."""
        if count < self.world:
            raise ValueError(f"{count} groups a step leave {self.world - count} of {self.world} ranks idle; set groups to {self.world} or a multiple, start fewer processes, or let several share a group by branch_parallel")
        return range(self.rank, count, self.world)

    def stretch(self, count: int) -> range:
        """Which of ``count`` scripts or branches are this rank's: neighbours, the first ones on the first rank."""
        return range(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order, on every rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self.channel)
        return found

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's ``x``, on every rank."""
        if self.world == 1:
            return x
        total = x.to(self.device, copy=True)
        dist.all_reduce(total, group=self.channel)
        return total.to(x.device)

    def together(self, work: Callable[[], T]) -> T:
        """What ``work`` gives; an error of any rank is raised on all of them."""
        result, error = None, None
        try:
            result = work()
        except (ValueError, OSError, FloatingPointError) as found:
            error = found
        for rank, (kind, text) in enumerate(self.gather(("", "") if error is None else (type(error).__name__, str(error)))):
            if error is not None:
                raise error
            if kind:
                raise _ERRORS.get(kind, OSError)(f"rank {rank if self.channel is None else dist.get_global_rank(self.channel, rank)}: {text}")
        return result

    def only_first(self, work: Callable[[], Any]) -> None:
        """Done by the first rank; the others wait, and share its error."""
        self.together(work if self.first else lambda: None)

    @torch.no_grad()
    def add_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Every gradient becomes the sum over ranks, in one message; none where no rank has any."""
        if self.world == 1:
            return
        has = torch.tensor([float(any(p.grad is not None for p in parameters))], device=parameters[0].device)
        flat = torch.cat([has, *((torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters)])
        dist.all_reduce(flat, group=self.channel)
        if flat[0] == 0:
            return
        for p, grad in zip(parameters, flat[1:].split([p.numel() for p in parameters])):
            p.grad = grad.view_as(p).clone()


_ERRORS = {"ValueError": ValueError, "FloatingPointError": FloatingPointError, "FileNotFoundError": FileNotFoundError}


def restarted() -> bool:
    """torchrun has started these processes again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
