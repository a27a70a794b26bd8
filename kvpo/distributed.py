"""Ranks: who does what, and what all must agree on.  A single process is a world of one: the same code, without a message.

    torchrun --nproc-per-node 8 -m kvpo align RECIPE --out RUN

Which groups a step has never depends on the ranks; each rank takes its share of them, gradients are added, and every
rank makes the same update.  Every rank enters every collective: what fails on one is an error on all, before the update.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Callable, Iterator, Sequence, TypeVar

import torch
import torch.distributed as dist

from kvpo.rendezvous import open_store
from kvpo.stopping import Stopped, giving_way

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run."""

    rank: int = 0
    world: int = 1
    store: dist.Store | None = None
    """Where each says what it is doing, for whoever waits in vain."""

    @classmethod
    def join(cls, device: torch.device, patience: float) -> Ranks:
        """Those that torchrun has started; alone without it.  They wait for each other ``patience`` seconds at most."""
        world, timeout = int(os.environ.get("WORLD_SIZE", "1")), timedelta(seconds=patience)
        if world == 1:
            return cls()
        rank, store = int(os.environ["RANK"]), open_store(timeout)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # what is agreed on goes by the CPU, where waiting in vain is an error and not the process's end
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        ranks = cls(rank, world, dist.PrefixStore("ranks", store))
        ranks.tell("start")
        return ranks

    def tell(self, doing: str) -> None:
        """What this rank does from now on."""
        if self.store is not None:
            with self._connected():
                self.store.set(f"doing/{self.rank}", f"{doing} since {time.strftime('%H:%M:%S')}")

    def leave(self) -> None:
        """At the end, or after an error: a process that ends with its connections open may be aborted while it does."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """This one writes."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of ``count`` groups are this rank's.  ValueError if some rank would have none."""
        if count < self.world:
            raise ValueError(f"{count} groups a step leave {self.world - count} of {self.world} ranks idle; set groups to {self.world} or a multiple, or start fewer processes")
        return range(self.rank, count, self.world)

    def stretch(self, count: int) -> range:
        """Which of ``count`` scripts are this rank's: neighbours, the first ones on the first rank."""
        return range(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order, on every rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        with self._connected():
            self.store.add(f"arrived/{self.rank}", 1)
            dist.all_gather_object(found, value)
        return found

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """To all others.  ConnectionError names those who did not come to a message, and what they were doing: killed, cut off, or beyond the patience."""
        try:
            yield
        except RuntimeError as error:  # torch's network errors are of this kind
            raise ConnectionError(f"rank {self.rank} waited in vain: {self._missing()} ({str(error).splitlines()[0][-160:]}). `patience` is how long to wait; go on with --resume") from None

    def _missing(self) -> str:
        try:
            arrived = [self.store.add(f"arrived/{r}", 0) for r in range(self.world)]
            missing = [r for r in range(self.world) if arrived[r] < arrived[self.rank]]
            return "; ".join(f"rank {r} did not come, it was in {self.store.get(f'doing/{r}').decode()}" for r in missing) or "a connection broke"
        except RuntimeError:
            return "torchrun or rank 0 is gone, and with it the store in which all say what they do"

    def together(self, work: Callable[[], T]) -> T:
        """What ``work`` gives; an error of any rank is raised on all of them.  So is `Stopped`, but where there is an error, that counts."""
        result, error = None, None
        try:
            with giving_way():
                result = work()
        except (ValueError, OSError, FloatingPointError, Stopped) as found:
            error = found
        said = enumerate(self.gather(("", "") if error is None else (type(error).__name__, str(error))))
        raised = sorted((kind == "Stopped", rank, kind, text) for rank, (kind, text) in said if kind)
        if error is not None and isinstance(error, Stopped) == raised[0][0]:
            raise error
        for _, rank, kind, text in raised:
            raise _ERRORS.get(kind, OSError)(f"rank {rank}: {text}")
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
        with self._connected():
            dist.all_reduce(flat)
        if flat[0] == 0:
            return
        for p, grad in zip(parameters, flat[1:].split([p.numel() for p in parameters])):
            p.grad = grad.view_as(p).clone()


_ERRORS = {"ValueError": ValueError, "FloatingPointError": FloatingPointError, "FileNotFoundError": FileNotFoundError, "Stopped": Stopped}


def restarted() -> bool:
    """torchrun has started these processes again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
