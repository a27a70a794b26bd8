"""`kvpo generate`: videos written while they are generated, of any length in the same memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from kvpo.commands.options import Positional
from kvpo.common.environment import pick_device
from kvpo.common.progress import Progress
from kvpo.config import DataConfig, RunConfig
from kvpo.convert.lora import add_lora
from kvpo.generators.generate import write_video
from kvpo.generators.pipeline import Geometry, block_at
from kvpo.generators.sampler import SAMPLERS
from kvpo.method.prompts import even_starts, read_scripts, starts_at
from kvpo.runs.loading import is_run, load_generator
from kvpo.types import Script


@dataclass(frozen=True)
class Generate:
    """Generate videos from prompts; they are written block by block."""

    generator: Positional[str] = "mini"
    """Pipeline folder, mini, or a run (RUN, RUN:ema, RUN:online, RUN:start)."""
    prompt: tuple[str, ...] = ()
    """Prompts of one story, in order."""
    prompts: Annotated[Path | None, tyro.conf.arg(aliases=["--script"])] = None
    """A file of stories instead (lines, N,[a],[b] or JSONL, see kvpo.method.prompts)."""
    at: tuple[float, ...] = ()
    """Seconds at which the second, third, ... prompt takes over; default: evenly spread."""
    seconds: float = 0.0
    """Length; 0 = by --blocks."""
    blocks: int = DataConfig.blocks
    """Length, blocks."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(aliases=["--seed"])] = (0,)
    """A video of every story for each."""
    sampler: Literal["renoise", "ode"] = RunConfig.sampler
    lora: tuple[Path, ...] = ()
    """LoRAs on top, merged in this order: files of diffusers, ComfyUI, kohya, PEFT's folders, released ones, or what `kvpo export` writes.
    Each acts at its own alpha / rank, which its header, adapter_config.json or alpha tensors say; where nothing says it, at 1."""
    lora_scale: float = 1.0
    """Strength that multiplies their own alpha / rank, as the weight of an adapter does in diffusers and ComfyUI; 1 = as they were trained."""
    dtype: Literal["", "float32", "bfloat16"] = ""
    """Precision; default: a run's own, bfloat16 on a GPU, float32 on a CPU."""
    out: Path = Path("runs/generate")
    device: str = "auto"

    def __call__(self) -> None:
        if bool(self.prompt) == bool(self.prompts):
            raise ValueError('give either --prompt "..." ["..." ...], the prompts of one story, or --prompts FILE')
        device = pick_device(self.device)
        dtype = self.dtype or ("bfloat16" if device.type == "cuda" and not is_run(Path(self.generator.partition(":")[0])) else "")
        pipeline, label = load_generator(self.generator, device, dtype or "float32", dtype)
        progress = Progress()
        for path in self.lora:
            progress.say(f"{path}: {add_lora(pipeline, path, self.lora_scale)}")
        scripts = self.scripts(pipeline.geometry)
        with progress.bar(f"generate with {label}", sum(s.blocks for s in scripts) * len(self.seeds)) as bar:
            for i, script in enumerate(scripts):
                for seed in self.seeds:
                    path = self.out / (f"{i:03d}.mp4" if len(self.seeds) == 1 else f"{i:03d}-seed{seed}.mp4")
                    rate = write_video(pipeline, SAMPLERS[self.sampler], script, seed, path, bar)
                    progress.say(f"{path}  {rate:.1f} frames/s  {' | '.join(script.texts)}")

    def scripts(self, geometry: Geometry) -> list[Script]:
        """The stories at their length.  ValueError where prompts do not fit into it."""
        blocks = block_at(self.seconds, geometry, up=True) if self.seconds else self.blocks
        switches = [block_at(second, geometry) for second in self.at]
        if self.prompts:
            return list(read_scripts(self.prompts, blocks, switches=switches or None))
        return [Script("story", self.prompt, starts_at(switches, len(self.prompt)) if switches else even_starts(len(self.prompt), blocks), blocks)]
