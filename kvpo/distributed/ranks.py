"""Ranks: who does what, and what all must agree on.

A single process is a world of one: the same code, without a message.

    torchrun --nproc-per-node 8 -m kvpo align RECIPE --out RUN

Which groups a step has never depends on the ranks; each rank takes its share of them, gradients are
added, and every rank makes the same update. Every rank enters every collective: what fails on one
is an error on all, before the update. Ranks may stand in rows that share one group (`Ranks.split`,
`kvpo.distributed.branches`); a row is `Ranks` again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from kvpo.common.files import first_line
from kvpo.distributed.rendezvous import open_store
from kvpo.distributed.signals import Stopped, giving_way, heed

T = TypeVar("T")


class Lost(ConnectionError):
    """A rank that did not come, or torchrun that is gone: nothing more can be agreed on."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, or those of them along one dimension of a mesh."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    """Device of the tensors that are sent."""
    channel: dist.ProcessGroup | None = None
    """Process group that messages go to; None: all processes."""
    store: dist.Store | None = None
    """Store in which each rank says what it is doing, for ranks that wait in vain."""
    name: str = "all"
    """Name of this set of processes in the store."""
    parent: int = 0
    """Process id of torchrun, which has started this one."""

    @classmethod
    def join(cls, device: torch.device, patience: float) -> Ranks:
        """Join torchrun's process group; without torchrun, a group of one.

        Ranks wait for each other ``patience`` seconds at most.
        """
        world, timeout = int(os.environ.get("WORLD_SIZE", "1")), timedelta(seconds=patience)
        if world == 1:
            return cls(device=device)
        if not dist.is_initialized():
            backend = (
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
                # what is agreed on goes by the CPU, where waiting in vain is an error and not the
                # process's end
            )
            store = open_store(timeout)
            try:
                dist.init_process_group(
                    backend,
                    store=store,
                    rank=int(os.environ["RANK"]),
                    world_size=world,
                    timeout=timeout,
                )
            except RuntimeError as error:
                raise Lost(
                    f"rank {os.environ['RANK']} did not meet all {world} ranks at the start ({first_line(error)[-160:]}); see what the others say"
                ) from None
        ranks = cls(
            dist.get_rank(),
            world,
            device,
            store=dist.PrefixStore("ranks", dist.distributed_c10d._get_default_store()),
            parent=os.getppid(),
        )
        ranks.tell("start")
        return ranks

    def split(self, size: int, patience: float) -> tuple[Ranks, Ranks]:
        """Rows of ``size`` neighbours: (this rank's column, one rank of every row; its row).
        ValueError if they leave a rank over."""
        if self.world % size:
            raise ValueError(
                f"branch_parallel = {size} does not divide {self.world} processes; start a multiple of {size} by torchrun --nproc-per-node, or set branch_parallel to 1"
            )
        if self.world == 1:
            return self, self
        with self._connected():
            mesh = init_device_mesh(
                self.device.type, (self.world // size, size), mesh_dim_names=("group", "branch")
            )
        names = {"group": f"column {self.rank % size}", "branch": f"row {self.rank // size}"}
        column, row = (
            replace(
                self,
                rank=mesh[d].get_local_rank(),
                world=mesh[d].size(),
                channel=mesh[d].get_group(),
                name=name,
            )
            for d, name in names.items()
        )
        for part in (column, row):
            # a mesh is not told, and NCCL's own is ten minutes
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=patience), part.channel)
        return column, row

    def tell(self, doing: str) -> None:
        """Publish what this process is doing, and check whether any rank was asked to stop.

        Raises `Lost` where torchrun is gone: a new one would start a run that still goes on.
        """
        if self.store is None:
            return
        if os.getppid() != self.parent:
            raise Lost(
                f"rank {dist.get_rank()} has lost torchrun (process {self.parent}), which has ended or was killed; go on with --resume"
            )
        with self._connected():
            self.store.set(f"doing/{dist.get_rank()}", f"{doing} since {time.strftime('%H:%M:%S')}")
            if self.store.check(["stopped"]):
                heed(self.store.get("stopped").decode())

    def apart(self, name: str, patience: float) -> Ranks:
        """The same ranks on a CPU process group of their own, for another thread; all enter."""
        if self.world == 1:
            return self
        with self._connected():
            channel = dist.new_group(timeout=timedelta(seconds=patience), backend="gloo")
        return replace(self, device=torch.device("cpu"), channel=channel, name=name)

    @property
    def first(self) -> bool:
        """This rank writes what only one should."""
        return self.rank == 0

    @property
    def last(self) -> bool:
        return self.rank == self.world - 1

    def share(self, count: int) -> range:
        """Indices of this rank's groups, of ``count``; ValueError if some rank would have none."""
        if count < self.world:
            raise ValueError(
                f"{count} groups a step leave {self.world - count} of {self.world} ranks idle; set groups to {self.world} or a multiple, start fewer processes, "
                "or let several share a group by branch_parallel"
            )
        return range(self.rank, count, self.world)

    def stretch(self, count: int) -> range:
        """Indices of this rank's scripts or branches, of ``count``: neighbours, in rank order."""
        return range(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order, on every rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        with self.meeting():
            dist.all_gather_object(found, value, group=self.channel)
        return found

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's ``x``, on every rank."""
        if self.world == 1:
            return x
        total = x.to(self.device, copy=True)
        with self.meeting():
            dist.all_reduce(total, group=self.channel)
        return total.to(x.device)

    def process(self, rank: int) -> int:
        """Number of a rank among all processes."""
        return rank if self.channel is None else dist.get_global_rank(self.channel, rank)

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """A context for messages that all ranks enter.

        `Lost` names those who did not come, and what they were doing: killed, cut off, or beyond
        the patience.
        """
        if self.world == 1:
            yield
            return
        assert self.store is not None, "several ranks have one"
        with self._connected():
            self.store.add(f"arrived/{self.name}/{self.rank}", 1)
            yield

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch's network errors are of this kind
            who = self.process(self.rank)
            raise Lost(
                f"rank {who} waited in vain: {self._missing()} ({first_line(error)[-160:]}). `patience` is how long to wait; go on with --resume"
            ) from None

    def _missing(self) -> str:
        store = self.store
        assert store is not None, "several ranks have one"
        try:
            arrived = [store.add(f"arrived/{self.name}/{r}", 0) for r in range(self.world)]
            missing = [
                self.process(r) for r in range(self.world) if arrived[r] < arrived[self.rank]
            ]
            return (
                "; ".join(
                    f"rank {r} did not come, it was in {store.get(f'doing/{r}').decode()}"
                    for r in missing
                )
                or "a connection broke"
            )
        except RuntimeError:
            return "torchrun or rank 0 is gone, and with it the store in which all say what they do"

    @contextmanager
    def together(self) -> Iterator[None]:
        """The body is work that may fail: an error of any rank is raised on all of them.

        `Stopped` is one of these errors, but where a rank has another one, that counts. All ranks
        enter, and leave together.
        """
        error: BaseException | None = None
        try:
            with giving_way():
                yield
        except Lost:  # of a row: to gather now would be to wait once more
            raise
        except (ValueError, OSError, FloatingPointError, Stopped) as found:
            error = found
            if isinstance(found, Stopped):
                self._say_stopped(str(found))
        self._raise_what_any_has(error)

    def _say_stopped(self, reason: str) -> None:
        """Tell the others by the store: they need not end their share of the step first."""
        if self.store is not None:
            with self._connected():
                self.store.set("stopped", reason)

    def _raise_what_any_has(self, error: BaseException | None) -> None:
        own = ("", "") if error is None else (type(error).__name__, str(error))
        # False sorts before True, so `Stopped` comes behind the errors.
        raised = sorted(
            (kind == "Stopped", rank, kind, text)
            for rank, (kind, text) in enumerate(self.gather(own))
            if kind
        )
        if error is not None and isinstance(error, Stopped) == raised[0][0]:
            raise error
        for _, rank, kind, text in raised:
            said = text if kind == "Stopped" else f"rank {self.process(rank)}: {text}"
            raise _ERRORS.get(kind, OSError)(said)

    def only_first(self, work: Callable[[], Any]) -> None:
        """Let the first rank do the work; the others wait, and share its error."""
        with self.together():
            if self.first:
                work()

    @torch.no_grad()
    def add_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Every gradient becomes the sum over ranks, in one message; none where no rank has any."""
        if self.world == 1:
            return
        has = torch.tensor(
            [float(any(p.grad is not None for p in parameters))], device=parameters[0].device
        )
        flat = torch.cat(
            [
                has,
                *(
                    (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                    for p in parameters
                ),
            ]
        )
        with self.meeting():
            dist.all_reduce(flat, group=self.channel)
        if flat[0] == 0:
            return
        for p, grad in zip(parameters, flat[1:].split([p.numel() for p in parameters])):
            p.grad = grad.view_as(p).clone()


_ERRORS = {
    "ValueError": ValueError,
    "FloatingPointError": FloatingPointError,
    "FileNotFoundError": FileNotFoundError,
    "Stopped": Stopped,
}


def leave() -> None:
    """Leave at the end, or after an error: the others hear of it at once."""
    if dist.is_initialized():
        dist.destroy_process_group()


def restarted() -> bool:
    """torchrun has started these processes again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
