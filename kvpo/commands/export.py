"""`kvpo export`: a run's weights in another format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvpo.commands.options import Positional


@dataclass(frozen=True)
class Export:
    """Write a run's weights in another format."""

    run: Positional[str]
    """RUN or RUN:ema (the averaged weights), RUN:online (the last ones), RUN:start."""
    format: Literal[
        "pipeline",
        "diffusers-lora",
        "peft",
        "original-lora",
        "original-merged",
        "comfyui-lora",
        "comfyui-merged",
    ]
    """A whole model (pipeline, original-merged, comfyui-merged) or the adapter alone.
    Only a run with policy.train lora has an adapter."""
    out: Path | None = None
    """Folder to write; default: RUN/export/WEIGHTS-FORMAT."""
    dtype: Literal["run", "bfloat16", "float32"] = "run"
    """Precision of what is written; run = as the run has it.
    That is the run's own for a whole model, and float32, in which it is trained, for an adapter."""

    def __call__(self) -> None:
        from kvpo.convert.export_formats import export

        print(f"written to {export(self.run, self.format, self.out, self.dtype).resolve()}")
