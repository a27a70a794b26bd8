"""Layout of the trained weights: whole on every rank, or shared out over the ranks by FSDP2.

Groups take unequally many passes (forks, horizons and skipped groups differ), and a pass of FSDP2
that gathers weights waits for the same pass of every other rank. So no pass gathers any: the
module's weights, in the dtype it computes in, stay whole from one update to the next, and gradients
add up whole, in float32. Shared out is what is kept per weight: float32 master, EMA, behaviour,
reference, moments. Ranks meet where all of them come by once a step: `add_gradients`, `total`,
`refresh`, and `whole`, before the groups. What is frozen is not sharded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard

from kvpo.distributed.ranks import Ranks


class Whole:
    """Every rank has all of everything."""

    def __init__(self, computing: Sequence[torch.nn.Parameter], ranks: Ranks):
        self.computing, self.ranks = computing, ranks
        self.masters = tuple(master_of(p) for p in computing)
        """float32, what the optimizer moves."""
        self.collecting = self.masters
        """Weights whose ``grad``, float32 and whole, sums up this rank's backward passes."""

    def whole(self, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        """A set of weights in the module's own shapes."""
        return weights

    def described(self, weights: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
        """Weights in the same memory as tensors that know the whole's shape, for a checkpoint."""
        return weights

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all parts of the weights."""
        return value

    def add_gradients(self) -> None:
        """Gradients of all ranks, added, to the masters."""
        self.ranks.add_gradients(self.masters)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the masters into the module's weights, after they have changed."""
        for p, master in zip(self.computing, self.masters):
            if p is not master:
                p.copy_(master)


class Shards:
    """Every rank has its part (of dimension 0) of the masters and of all sets, as plain tensors.

    ``transformer``: its ``trainable`` weights are sharded at the blocks and the root. All methods
    but `described` are entered by all ranks.
    """

    def __init__(self, transformer: torch.nn.Module, trainable: Sequence[str], ranks: Ranks):
        self.ranks = ranks
        self.mesh = init_device_mesh(next(transformer.parameters()).device.type, (ranks.world,))
        frozen = {p for name, p in transformer.named_parameters() if name not in set(trainable)}
        transformer.requires_grad_(
            False
            # FSDP2 wants one dtype of what it trains, but norms and modulation are float32 among bf16
        )
        self.modules = [*transformer.blocks, transformer]
        for module in self.modules:
            fully_shard(
                module,
                mesh=self.mesh,
                reshard_after_forward=False,
                mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False),
                ignored_params=frozen,
            )
            module.set_reshard_after_backward(False, recurse=False)
            module.set_requires_gradient_sync(False, recurse=False)
        named = dict(transformer.named_parameters())
        self.parts: list[DTensor] = [named[name] for name in trainable]
        self.masters = tuple(
            torch.nn.Parameter(p.to_local().to(torch.float32, copy=True)) for p in self.parts
        )
        with ranks.meeting():
            for module in self.modules:
                module.unshard()
        named = dict(transformer.named_parameters())
        self.computing = self.collecting = tuple(
            named[name].requires_grad_(True) for name in trainable
        )
        for p in self.computing:
            p.grad_dtype = torch.float32

    @torch.no_grad()
    def whole(self, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        with self.ranks.meeting():
            return [
                self._as_part_of(p, w.to(p.dtype)).full_tensor()
                for p, w in zip(self.parts, weights)
            ]

    def described(self, weights: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
        return [None if w is None else self._as_part_of(p, w) for p, w in zip(self.parts, weights)]

    def total(self, value: torch.Tensor) -> torch.Tensor:
        summed = value.clone()
        with self.ranks.meeting():
            dist.all_reduce(summed, group=self.mesh.get_group())
        return summed

    @torch.no_grad()
    def add_gradients(self) -> None:
        """A reduce-scatter a weight; no gradient where no rank has any."""
        has = torch.tensor(
            [float(any(p.grad is not None for p in self.computing))],
            device=self.computing[0].device,
        )
        if self.total(has) == 0:
            return
        with self.ranks.meeting():
            for master, p in zip(self.masters, self.computing):
                grad = torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad
                p.grad = None
                master.grad = (
                    DTensor.from_local(grad, self.mesh, [Partial()], run_check=False)
                    .redistribute(placements=[Shard(0)])
                    .to_local()
                )

    @torch.no_grad()
    def refresh(self) -> None:
        for module in self.modules:
            module.reshard()
        for p, master in zip(self.parts, self.masters):
            p.to_local().copy_(master)
        with self.ranks.meeting():
            for module in self.modules:
                module.unshard()
        for p in self.computing:
            p.requires_grad_(True)

    def _as_part_of(self, p: DTensor, local: torch.Tensor) -> DTensor:
        return DTensor.from_local(
            local, self.mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )


def master_of(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """The float32 weight that is trained for a parameter.

    It is the parameter itself, or one beside it that collects its gradients.
    """
    if parameter.dtype == torch.float32:
        return parameter
    master = torch.nn.Parameter(parameter.detach().float())

    def carry(
        p: torch.nn.Parameter,
    ) -> None:  # gradients of several passes and groups add up in float32
        master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
        p.grad = None

    parameter.register_post_accumulate_grad_hook(carry)
    return master
