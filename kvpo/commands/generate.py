"""`kvpo generate`: videos written while they are generated, of any length in the same memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from kvpo.commands.options import Positional
from kvpo.common.environment import pick_device
from kvpo.common.files import say_replaced, try_folder, unused
from kvpo.common.progress import Progress
from kvpo.common.provenance import about_video, write_beside
from kvpo.common.wording import count_of
from kvpo.config import DataConfig, RunConfig
from kvpo.distributed.local_processes import check_count, hand_over
from kvpo.types import Script

if TYPE_CHECKING:
    from kvpo.distributed.ranks import Ranks
    from kvpo.generators.geometry import Geometry


@dataclass(frozen=True)
class Generate:
    """Generate videos from prompts; they are written block by block."""

    generator: Positional[str] = "mini"
    """Pipeline folder, mini, or a run (RUN, RUN:ema, RUN:online, RUN:start)."""
    prompt: tuple[str, ...] = ()
    """Prompts of one story, in order."""
    prompts: Annotated[Path | None, tyro.conf.arg(aliases=["--script"])] = None
    """A file of stories instead (lines, N,[a],[b] or JSONL, see kvpo.method.prompt_files)."""
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
    """LoRAs on top, merged in this order.
    They are files of diffusers, ComfyUI, kohya, PEFT's folders, released ones, or what `kvpo
    export` writes. Each acts at its own alpha / rank, which its header, adapter_config.json or
    alpha tensors say; where nothing says it, at 1."""
    lora_scale: float = 1.0
    """Strength that multiplies the LoRAs' own alpha / rank; 1 = as they were trained.
    It is what the weight of an adapter is in diffusers and ComfyUI."""
    dtype: Literal["", "float32", "bfloat16"] = ""
    """Precision; default: a run's own, bfloat16 on a GPU, float32 on a CPU."""
    processes: int = 1
    """Processes that share every stream, as torchrun --nproc-per-node would start them.
    Each has a part of the tokens, of the heads and of the cache, and all weights: for streams that
    are too slow on one card, or whose cache does not fit it."""
    out: Path = Path("runs/generate")
    device: str = "auto"

    def __call__(self) -> None:
        self.check_options()
        hand_over(self.processes)
        from kvpo.distributed.ranks import Ranks, leave

        try:
            self.generate(Ranks.join(pick_device(self.device), RunConfig.patience))
        finally:
            leave()

    def generate(self, ranks: Ranks) -> None:
        """Write the videos, whose streams ``ranks`` share; the first of them writes."""
        from kvpo.convert.lora import add_lora
        from kvpo.convert.weight_files import find_weights
        from kvpo.generators.generate import check_shared, follow_video, write_video
        from kvpo.generators.pipeline_folder import check_folder
        from kvpo.generators.readable import check_prompts
        from kvpo.generators.sampler import SAMPLERS
        from kvpo.generators.sequence_split import OverHeads
        from kvpo.runs.loading import load_generator, pipeline_folder, precision

        progress, device = Progress(), ranks.device
        folder = pipeline_folder(self.generator)
        geometry = check_folder(folder)
        check_shared(folder, geometry, ranks.world)
        scripts = self.scripts(geometry)
        check_prompts(folder, scripts, progress.warn)
        for path in self.lora:
            find_weights(path)
        with ranks.together():
            own = self.videos(scripts, progress) if ranks.first else []
        videos = ranks.gather(own)[0]
        dtype = precision(self.generator, device, self.dtype)
        blocks = sum(script.blocks for script, _, _ in videos)
        progress.log(
            f"kvpo generate {self.generator} on {device}: {count_of(len(videos), 'video')}, {count_of(blocks, 'block')} in all, into {videos[0][2].parent}"
        )
        with progress.timed("loading the generator"):
            pipeline, label = load_generator(self.generator, device, dtype or "float32", dtype)
        for path in self.lora:
            progress.say(f"{path}: {add_lora(pipeline, path, self.lora_scale)}")
        if ranks.world > 1:
            pipeline.generator.share(OverHeads(ranks))
        made_with = {
            "sampler": self.sampler,
            "dtype": dtype or "the generator's own",
            "lora": list(map(str, self.lora)),
            "lora_scale": self.lora_scale,
        }
        with progress.bar(f"generate with {label}", blocks) as bar:
            for script, seed, path in videos:
                if not ranks.first:
                    follow_video(pipeline, SAMPLERS[self.sampler], script, seed)
                    continue
                about = about_video(script, seed, label, **made_with)
                rate = write_video(pipeline, SAMPLERS[self.sampler], script, seed, path, bar, about)
                write_beside(path, about)
                progress.say(f"{path}  {rate:.1f} frames/s  {' | '.join(script.texts)}")

    def check_options(self) -> None:
        """Check that no option says nothing, contradicts another one, or would be passed over.

        Raises ValueError for one that does.
        """
        check_count(self.processes)
        if bool(self.prompt) == bool(self.prompts):
            raise ValueError(
                'one of --prompt and --prompts is needed; give either --prompt "..." ["..." ...], the prompts of one story, or --prompts FILE'
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"--seeds {' '.join(map(str, self.seeds))}: give at least one seed and each once, equal ones would make equal videos"
            )
        if self.seconds != 0.0 and not 0.0 < self.seconds < math.inf:
            raise ValueError(
                f"--seconds {self.seconds:g} is no length of a video; give more than 0, or leave it out"
            )
        if self.seconds and self.blocks != Generate.blocks:
            raise ValueError(
                f"--seconds {self.seconds:g} and --blocks {self.blocks} both say how long the video is; give one of them"
            )
        if self.blocks < 1:
            raise ValueError(
                f"--blocks {self.blocks}: a video has at least one block; give 1 or more"
            )
        if not math.isfinite(self.lora_scale):
            raise ValueError(
                f"--lora-scale {self.lora_scale:g} is no strength of a LoRA; give a finite number, 1 = as trained"
            )
        if self.lora_scale != Generate.lora_scale and not self.lora:
            raise ValueError(
                f"--lora-scale {self.lora_scale:g} scales the files of --lora, and there is none; give one, or leave the scale out"
            )
        if self.prompt and len(self.at) > len(self.prompt) - 1:
            raise ValueError(
                f"--at has {count_of(len(self.at), 'time')} for {count_of(len(self.prompt), 'prompt')}: the second, third, ... prompt takes over at each, "
                f"so {len(self.prompt) - 1} can be used; add prompts or drop times"
            )

    def scripts(self, geometry: Geometry) -> list[Script]:
        """Read the stories at their length.

        Raises ValueError where prompts do not fit into it, or a time of --at would change none of
        them.
        """
        from kvpo.generators.geometry import block_at, blocks_at
        from kvpo.method.prompt_files import readable
        from kvpo.method.prompts import even_starts, read_scripts, starts_at

        blocks = block_at(self.seconds, geometry, up=True) if self.seconds else self.blocks
        switches = blocks_at(self.at, geometry)
        if self.prompts:
            scripts = list(read_scripts(self.prompts, blocks, switches=switches or None))
            if unused := [
                second
                for second, block in zip(self.at, switches)
                if not any(block in script.starts for script in scripts)
            ]:
                raise ValueError(
                    f"--at {unused[0]:g} would be passed over: no story of {self.prompts} has so many prompts without starts of its own; drop it"
                )
            return scripts
        try:
            texts = tuple(map(readable, self.prompt))
        except ValueError as error:
            raise ValueError(f"--prompt: {error}") from None
        return [
            Script(
                "story",
                texts,
                starts_at(switches, len(texts)) if switches else even_starts(len(texts), blocks),
                blocks,
                "--prompt",
            )
        ]

    def videos(
        self, scripts: Sequence[Script], progress: Progress
    ) -> list[tuple[Script, int, Path]]:
        """(story, seed, file) of all that will be made.

        It says where, and which files are replaced. Raises OSError where nothing can be written.
        """
        out = unused(self.out) if self.out == Generate.out else self.out
        try_folder(out)
        many = len(self.seeds) > 1
        videos = [
            (script, seed, out / (f"{i:03d}-seed{seed}.mp4" if many else f"{i:03d}.mp4"))
            for i, script in enumerate(scripts)
            for seed in self.seeds
        ]
        say_replaced([path for _, _, path in videos], progress.say)
        return videos
