"""KVPO aligns streaming video generators to rewards by exploring in the KV cache.

    import kvpo

    run = kvpo.align("mini", out="runs/a", steps=30)
    story = ["a small red circle moves right slowly in the night", "it turns blue"]
    video = kvpo.generate(kvpo.load("runs/a:ema"), story, seconds=9)
    print(kvpo.evaluate("runs/a:ema", against="mini", scripts=64))

`import kvpo` itself imports nothing: a name's module, and with it torch, is imported when the name
is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvpo.api.functions import align, evaluate, explore, generate, load
    from kvpo.config import RunConfig
    from kvpo.rewards.base import Reward, RewardSpec, VideoBatch
    from kvpo.types import Script

    __version__: str

_HOMES = {
    "align": "kvpo.api.functions",
    "load": "kvpo.api.functions",
    "generate": "kvpo.api.functions",
    "evaluate": "kvpo.api.functions",
    "explore": "kvpo.api.functions",
    "RunConfig": "kvpo.config",
    "Script": "kvpo.types",
    "Reward": "kvpo.rewards.base",
    "RewardSpec": "kvpo.rewards.base",
    "VideoBatch": "kvpo.rewards.base",
}
"""Public name -> the module that defines it."""

__all__ = [
    "Reward",
    "RewardSpec",
    "RunConfig",
    "Script",
    "VideoBatch",
    "__version__",
    "align",
    "evaluate",
    "explore",
    "generate",
    "load",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for, and keeps it."""
    if name == "__version__":
        value: Any = _version()
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'kvpo' has no {name!r}; it offers {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """The installed package's version; a source tree that was never installed does not know it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("kvpo")
    except PackageNotFoundError:
        return "unknown"
