"""`kvpo import`: a released checkpoint turned into a pipeline folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from kvpo.commands.options import Positional
from kvpo.common.progress import Progress
from kvpo.convert.import_released import FORMATS, import_checkpoint
from kvpo.generators.pipeline import Geometry


@dataclass(frozen=True)
class Import:
    """Turn a released checkpoint into a pipeline folder that every other command reads."""

    paths: Positional[tuple[Path, ...]]
    """The checkpoint's files, one with the generator and any number of LoRA files, which are merged in this order; then the folder to write."""
    format: Literal["self-forcing", "causal-forcing", "longlive", "memflow", "kvpo"]
    """Whose checkpoint: decides how the generator streams, and which of the weights in the file are taken.  kvpo: the paper's own on LongLive; its MemFlow ones are memflow."""
    base: str
    """Wan2.1 itself, for text encoder, VAE and sizes: a folder in diffusers or original layout, or a hub id."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the transformer's large matrices in the folder."""
    which: str = ""
    """Key of the generator in its file (generator, generator_ema, ...); default: what the format's own inference takes."""
    lora_scale: float = 1.0
    """alpha / rank of the LoRA files, which do not say it; the released ones have 1."""
    sink: int | None = None
    """Oldest latent frames that are always read; default: the format's."""
    window: int | None = None
    """Latent frames a block reads in all; default: the format's."""
    latent_height: int | None = None
    """Default 60: 480 pixels."""
    latent_width: int | None = None
    """Default 104: 832 pixels."""

    def __call__(self) -> None:
        if len(self.paths) < 2:
            raise ValueError(f"give the checkpoint's files and then the folder to write, not {[str(p) for p in self.paths]}")
        *files, out = self.paths
        say = Progress().say
        import_checkpoint(files, out, self.format, self.geometry, self.base, self.dtype, self.which, self.lora_scale, say)
        say(f"written to {out.resolve()}; try: kvpo generate {out} --prompt ...")

    @property
    def geometry(self) -> Geometry:
        changes = {name: value for name in ("sink", "window", "latent_height", "latent_width") if (value := getattr(self, name)) is not None}
        return replace(FORMATS[self.format].geometry, **changes)
