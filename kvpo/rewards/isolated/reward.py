"""A reward outside this process: in a worker with an environment of its own, or on a server.

    Isolated("envs/hpsv3", environment="hpsv3")            the environment that `kvpo reward-env create hpsv3` makes
    Isolated("my/scorer.py", url="http://127.0.0.1:8100")  its server: python worker.py --reward my/scorer.py --http 8100
    Isolated("classic")                                    any reward, in a second process of this Python

What it is (family, bounds ...) is known without starting anything, from the class or from the
file's SPEC, so that a recipe can be checked; the handshake then verifies that the other side thinks
the same. A worker that breaks is started again and asked once more; if it breaks at that too, the
request fails.
"""

from __future__ import annotations

import ast
import json
import os
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvpo.rewards.base import UNBOUNDED, RewardSpec, VideoBatch
from kvpo.rewards.isolated import wire
from kvpo.rewards.isolated.environments import ENVS, python_of
from kvpo.rewards.isolated.links import Broken, Server, Worker
from kvpo.rewards.measured import Measured
from kvpo.rewards.registry import make_reward

WORKER = Path(__file__).with_name("worker.py")
RANK_VARIABLES = [
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
]
"""Variables by which torchrun makes ranks; they are kept from a worker.

A worker is no rank, and a library in it that believed so would wait for the others.
"""
NOT_FOR_WORKERS = {*RANK_VARIABLES, "PYTHONHOME"}


@dataclass
class Isolated(Measured):
    """A proxy with the interface of the reward it runs elsewhere.

    Raises ValueError for what can not be one, and where the scorer raises or returns other than a
    number per clip; OSError, with what the worker last wrote to stderr, where the other side
    breaks.
    """

    name: str
    """Name of any reward, a scorer file (.py), or ``envs/NAME``.

    The latter is the scorer shipped with an environment.
    """
    params: Mapping[str, Any] = field(default_factory=dict)
    environment: str = ""
    """Name of an environment, or a Python; "" = this Python."""
    url: str = ""
    """http://host:port of a server; "" = a worker started here."""
    timeout: float = 600.0
    """Seconds for a reply, loading included."""
    devices: str = ""
    """CUDA_VISIBLE_DEVICES of the worker, "1" for a card of its own.

    "" = as here, on the device that `load` names.
    """
    spec: RewardSpec = field(init=False)
    packages: Mapping[str, str] = field(init=False, default_factory=dict)
    """Versions on the other side, known once it is loaded."""

    def __post_init__(self):
        if self.timeout <= 0:
            raise ValueError(
                f"reward {self.name!r}: timeout = {self.timeout} must be above 0 seconds"
            )
        try:
            self._params = json.dumps(dict(self.params), allow_nan=False, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"reward {self.name!r}: params = {self.params} can not be sent to another process ({error}); give plain numbers, texts and lists"
            ) from None
        self.spec = spec_of(self.name, self.params)
        self._link: Worker | Server | None = Server(self.url) if self.url else None
        self._busy = threading.Lock()  # one request at a time
        self._device, self._most = "cpu", wire.ANY

    def load(self, device: str | torch.device = "cpu") -> None:
        self._device = "cuda" if self.devices else str(device)
        self._link = self._link or Worker(*self._command())
        with self._busy:
            try:
                self._handshake()
            except Broken as error:
                raise OSError(
                    f"{self._who} can not be loaded: {error}. Run `kvpo rewards list` to see what it needs"
                ) from None

    def offload(self) -> None:
        """A server's model stays where it is."""
        if self._link is not None and self._link.open and not self.url:
            self._ask({"do": "offload"})

    def close(self) -> None:
        """Ends the worker; the next request starts another."""
        if self._link is not None:
            self._link.close()

    def measure(self, batch: VideoBatch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        frames = batch.frames.cpu().contiguous().numpy()
        if frames.nbytes > self._most:
            raise ValueError(
                f"{self._who}: {len(batch)} clips are {frames.nbytes} bytes and its server takes {self._most}; start it with a larger --most-mb, or send fewer clips at a time"
            )
        reply = self._ask(
            {
                "do": "score",
                "shape": frames.shape,
                "fps": float(batch.fps),
                "prompts": batch.prompts,
                "history": batch.history,
            },
            frames,
        )
        parts = {
            name: self._tensor(f"part {name!r}", values, len(batch))
            for name, values in reply.get("parts", {}).items()
        }
        return self._tensor("scores", reply.get("scores"), len(batch)), parts

    @property
    def _who(self) -> str:
        return f"reward {self.spec.name!r}"

    def _command(self) -> tuple[list[str], dict[str, str]]:
        """Command that starts a worker, and its variables.

        Another Python's packages are its own.
        """
        environ = {
            key: value
            for key, value in os.environ.items()
            if key not in NOT_FOR_WORKERS and not key.startswith("TORCHELASTIC_")
        }
        path = (
            ""
            if self.environment
            else os.pathsep.join(
                filter(None, [str(WORKER.parents[3]), os.environ.get("PYTHONPATH")])
            )
        )
        environ |= {"PYTHONPATH": path} | (
            {"CUDA_VISIBLE_DEVICES": self.devices} if self.devices else {}
        )
        return [
            python_of(self.environment),
            str(WORKER),
            "--reward",
            str(scorer_file(self.name) or self.name),
            "--params",
            self._params,
        ], environ

    def _handshake(self) -> None:
        """Loads it on the other side.  ValueError where that is not the reward asked for."""
        hello = self._reply({"do": "load", "device": self._device})
        spec = as_spec(hello["spec"], "the other side")
        there = json.dumps(hello["params"], sort_keys=True)
        differs = [
            f.name
            for f in fields(spec)
            if f.name != "weights" and getattr(spec, f.name) != getattr(self.spec, f.name)
        ]
        if differs:
            raise ValueError(
                f"{self._who}: the other side runs {spec.name!r}, which differs in {', '.join(differs)}; run the same reward and version on both sides"
            )
        if there != self._params:
            raise ValueError(
                f"{self._who}: the other side runs it with params {there}, asked for is {self._params}; start it with those"
            )
        self.spec, self.packages, self._most = spec, hello["packages"], hello.get("most", wire.ANY)

    def _ask(
        self, header: Mapping[str, Any], frames: np.ndarray | None = None
    ) -> Mapping[str, Any]:
        """The reply; where the other side breaks, that of a second try."""
        if self._link is None:
            raise RuntimeError(f"{self._who} is not loaded; call load(device) before score(batch)")
        with self._busy:
            try:
                return self._once(header, frames)
            except Broken as error:
                warnings.warn(
                    f"{self._who} is asked once more: {error}", RuntimeWarning, stacklevel=2
                )
            try:
                return self._once(header, frames)
            except Broken as error:
                raise OSError(f"{self._who} failed twice: {error}") from None

    def _once(self, header: Mapping[str, Any], frames: np.ndarray | None) -> Mapping[str, Any]:
        assert self._link is not None, "it is loaded"
        if not self._link.open:
            self._handshake()
        return self._reply(header, frames)

    def _reply(
        self, header: Mapping[str, Any], frames: np.ndarray | None = None
    ) -> Mapping[str, Any]:
        assert self._link is not None, "it is loaded"
        reply = self._link.ask({"protocol": wire.PROTOCOL, **header}, frames, self.timeout)
        if "error" in reply:
            raise ValueError(
                f"{self._who} failed on the other side: {reply['error']}; correct it there, or take the reward out of the recipe"
            )
        if reply.get("protocol") != wire.PROTOCOL:
            raise ValueError(
                f"{self._who}: the other side speaks protocol {reply.get('protocol')}, this one {wire.PROTOCOL}; both need the same kvpo"
            )
        return reply

    def _tensor(self, what: str, values: Any, count: int) -> torch.Tensor:
        """float32 [count], NaN for null."""
        if (
            not isinstance(values, list)
            or len(values) != count
            or not all(value is None or isinstance(value, (int, float)) for value in values)
        ):
            raise ValueError(
                f"{self._who} returned {what} = {values!r} for {count} clips; it must be one number per clip, or None where a clip can not be measured"
            )
        return torch.tensor(
            [float("nan") if value is None else value for value in values], dtype=torch.float32
        )


def scorer_file(name: str) -> Path | None:
    """The scorer file that a name means, if it means one.  ValueError where that is not there."""
    if not name.endswith(".py") and not name.startswith("envs/"):
        return None
    path = Path(name) if name.endswith(".py") else ENVS / name.removeprefix("envs/") / "scorer.py"
    if not path.is_file():
        raise ValueError(
            f"reward {name!r}: there is no scorer file {path}; shipped are {', '.join(f'envs/{p.parent.name}' for p in sorted(ENVS.glob('*/scorer.py')))}"
        )
    return path.resolve()


def spec_of(name: str, params: Mapping[str, Any]) -> RewardSpec:
    """Read a reward's spec without running it.

    A file's SPEC is read, not executed, for what it imports is not installed here. Raises
    ValueError where it has none.
    """
    path = scorer_file(name)
    if path is None:
        return make_reward(name, params).spec
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SPEC":
            try:
                return as_spec(ast.literal_eval(node.value), str(path))
            except ValueError as error:
                raise ValueError(
                    f"{path}: SPEC must be a dictionary of plain values ({error})"
                ) from None
    raise ValueError(
        f'{path} has no SPEC = {{"name": ..., "family": ...}} at its top level; add it'
    )


def as_spec(values: Mapping[str, Any], source: str) -> RewardSpec:
    """Make a spec from JSON or a literal: lists for tuples, None for a missing bound.

    Raises ValueError that names ``source`` for unknown or missing entries.
    """
    known = [f.name for f in fields(RewardSpec)]
    if wrong := [key for key in values if key not in known] + [
        key for key in ("name", "family") if key not in values
    ]:
        raise ValueError(
            f"the SPEC of {source} has unknown or missing entries: {', '.join(wrong)}; it takes {', '.join(known)}"
        )
    plain: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
    if "bounds" in plain:
        plain["bounds"] = tuple(
            limit if own is None else own
            for own, limit in zip(plain["bounds"] or (None, None), UNBOUNDED)
        )
    return RewardSpec(**plain)
