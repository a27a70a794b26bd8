"""`kvpo import`: a released checkpoint turned into a pipeline folder."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from kvpo.commands.options import Positional
from kvpo.common.progress import Progress

if TYPE_CHECKING:
    from kvpo.convert.import_released import Format
    from kvpo.generators.geometry import Geometry


@dataclass(frozen=True)
class Import:
    """Turn a released checkpoint into a pipeline folder that every other command reads."""

    paths: Positional[tuple[Path, ...]]
    """The checkpoint's files, then the folder to write.
    The files are one with the generator and any number of LoRAs, which are merged in this order. A
    generator may be a .pt or .safetensors file, an index of shards or its folder, a transformer's
    or pipeline's folder; a LoRA any form that `kvpo generate --lora` reads."""
    format: Literal[
        "self-forcing",
        "causal-forcing",
        "causal-forcing-framewise",
        "causal-forcing-2step",
        "causal-forcing-1step",
        "longlive",
        "memflow",
        "kvpo",
        "krea",
        "longlive-2",
    ]
    """Family of the checkpoint.
    It decides how the generator streams, and which of the weights in the file are taken.
    causal-forcing is its chunk-wise model, unless the file's name says framewise, 2step or 1step.
    kvpo: the paper's own on LongLive; its MemFlow ones are memflow. What is assumed is printed."""
    base: str
    """Wan2.1 itself, for text encoder, VAE and sizes; for longlive-2 Wan2.2-TI2V-5B.
    A folder in diffusers or original layout (of Wan2.2 in diffusers layout), or a hub id."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the transformer's large matrices in the folder."""
    which: Annotated[str, tyro.conf.arg(aliases=["--weights"])] = ""
    """Key of the generator in its file (generator, generator_ema, ...).
    Default: what the format's own inference takes."""
    lora_scale: float = 1.0
    """Strength that multiplies the LoRAs' own alpha / rank.
    Their header, adapter_config.json or alpha tensors say it; where nothing says it, that is 1."""
    block: int | None = None
    """Latent frames generated together; default: the format's.
    They are 3 of a chunk-wise model, 1 of a frame-wise one."""
    steps: int | None = None
    """Denoise steps of a block; default: the format's.
    All blocks have as many, unless --first-steps says otherwise."""
    first_steps: int | None = None
    """Denoise steps of a video's first block, 0 = as all.
    Default: the format's, 0 where --steps is given."""
    sink: int | None = None
    """Oldest latent frames that are always read; default: the format's."""
    window: int | None = None
    """Latent frames a block reads in all; default: the format's."""
    latent_height: int | None = None
    """Default: the format's, 60 (480 pixels) for Wan2.1."""
    latent_width: int | None = None
    """Default: the format's, 104 (832 pixels) for Wan2.1."""

    def __call__(self) -> None:
        if len(self.paths) < 2:
            raise ValueError(
                f"{[str(p) for p in self.paths]} are not files and a folder; give the checkpoint's files and then the folder to write"
            )
        from kvpo.convert.import_released import import_checkpoint

        *files, out = self.paths
        say = Progress().say
        import_checkpoint(
            files,
            out,
            self.kind,
            self.geometry,
            self.base,
            self.dtype,
            self.which,
            self.lora_scale,
            say,
        )
        say(f"written to {out.resolve()}; try: kvpo generate {out} --prompt ...")

    @property
    def kind(self) -> Format:
        """The format, or the member of its family that a file's name means."""
        from kvpo.convert.import_released import FORMATS

        for path in self.paths[:-1]:
            name = "/".join(path.absolute().parts[-2:]).lower()
            for other in reversed([*FORMATS.values()]):
                if (
                    other.named
                    and other.name.startswith(self.format)
                    and re.search(other.named, name)
                ):
                    return other
        return FORMATS[self.format]

    @property
    def geometry(self) -> Geometry:
        names = ("block", "steps", "first_steps", "sink", "window", "latent_height", "latent_width")
        changes = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(
            self.kind.geometry, **({"first_steps": 0} if "steps" in changes else {}) | changes
        )
