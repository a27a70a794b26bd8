"""Meeting point of a run's ranks: a key-value store, fresh for every start.

torchrun by default shares one store among all starts of a job, with the addresses of killed
processes still in it, and listens on every interface. On one node a prefix tells the starts apart;
over nodes, whose counts of restarts differ, torchrun is told to share none, and the first rank
opens one that listens on the cluster's interface alone.
"""

from __future__ import annotations

import functools
import os
import socket
from datetime import timedelta

import torch.distributed as dist

from kvpo.common.files import first_line

UNSHARED = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""torchrun's switch; then every start has a port of its own."""
MEETING = timedelta(minutes=1)
"""Wait for the store to be there; it is tried twice.

torchrun opens the store before it starts ranks, and a first rank is about as fast as the others.
With `patience`, ranks whose torchrun is killed meanwhile would stay for that long.
"""


def open_store(timeout: timedelta) -> dist.Store:
    """Open or join the store that torchrun's environment names.

    Raises ValueError over several nodes without `UNSHARED`, ConnectionError where no store is
    found.
    """
    address = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    world = int(os.environ["WORLD_SIZE"])
    open_at = functools.partial(
        dist.TCPStore, address, port, world, timeout=MEETING, wait_for_workers=False
    )
    shared, rank = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True", int(os.environ["RANK"])
    if shared and os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        raise ValueError(
            f"torchrun over several nodes can not start anew with its shared store; set {UNSHARED}=1 in the environment of every torchrun (see docs/cluster.md)"
        )
    prefix = f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}" if shared else ""
    listening = (
        {"is_master": True, "master_listen_fd": socket.create_server((address, port)).detach()}
        if rank == 0 and not shared
        else {"is_master": False}
    )
    try:
        store = open_at(**listening)
    except RuntimeError as error:  # torch's network errors are of this kind
        raise ConnectionError(
            f"rank {rank} found no store at {address}:{port} ({first_line(error)[-160:]}); rank 0, or torchrun on one node, opens it: "
            "is that up, and is its address the cluster's interface, without a firewall between (docs/cluster.md)?"
        ) from None
    store.set_timeout(timeout)
    return dist.PrefixStore(prefix, store)
