"""What the public code starts from: its table of sigmas and its prompt files.

Kept only so that its published numbers can be reproduced; ours are `kvpo.generators.flow` and
`kvpo.method.prompts`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property

import torch

from kvpo.generators import flow
from kvpo.method.prompt_files import outer_brackets


@dataclass(frozen=True)
class SigmaTable:
    """The discrete schedule in which the public code looks times up; its smallest sigma is not
    0."""

    shift: float = 5.0
    steps: int = 1000

    @cached_property
    def sigmas(self) -> torch.Tensor:
        """Falling from 1; `flow.warp` in single precision throughout, or near ties would be
        looked up differently."""
        s = torch.linspace(1.0, 0.0, self.steps + 1)[:-1]
        return self.shift * s / (1.0 + (self.shift - 1.0) * s)

    @property
    def timesteps(self) -> torch.Tensor:
        return flow.TIME_SCALE * self.sigmas

    def warped(self, step: int) -> float:
        """Network time of entry ``step`` of an unwarped schedule such as 1000, 750, 500, 250."""
        return self.timesteps[int(flow.TIME_SCALE) - step].item() if step else 0.0

    def nearest(self, timestep: float | torch.Tensor) -> torch.Tensor:
        """Index of the nearest entry; of two equally near ones the first."""
        timestep = torch.as_tensor(timestep, dtype=torch.float32)
        return (self.timesteps - timestep[..., None]).abs().argmin(dim=-1)

    def sigma(self, timestep: float | torch.Tensor) -> torch.Tensor:
        return self.sigmas[self.nearest(timestep)]

    def score_sigma(self, timestep: float, floor: float) -> float:
        """Divisor of the x0 error: looked up at the integer part of the time, and at least
        ``floor``."""
        return max(self.sigma(int(timestep)).item(), floor)

    def add_noise(
        self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor
    ) -> torch.Tensor:
        return flow.add_noise(clean, noise, self.sigma(timestep))


def read_prompts(
    content: str,
    suffix: str,
    *,
    field: str = "prompts",
    min_segments: int | None = None,
    max_segments: int | None = None,
    index_start: int | None = None,
    index_end: int | None = None,
    max_n: int = -1,
) -> list[list[str]]:
    """Prompt lists of a file, leniently: what is malformed is passed over.

    ``index_start`` ... ``index_end`` (included) count the lists that are kept; ``max_n`` of those
    are returned, all if < 1.
    """
    lists_of = _jsonl_prompts if suffix.lower() == ".jsonl" else _bracketed_prompts
    kept = []
    for line in filter(None, map(str.strip, content.split("\n"))):
        prompts = [text for p in lists_of(line, field) if (text := str(p).strip())][:max_segments]
        if len(prompts) >= max(1, min_segments or 0):
            kept.append(prompts)
    chosen = kept[index_start or 0 : None if index_end is None else index_end + 1]
    return chosen[:max_n] if max_n > 0 else chosen


def _jsonl_prompts(line: str, field: str) -> list:
    value = json.loads(line).get(field)
    return value if isinstance(value, list) else []


def _bracketed_prompts(line: str, field: str) -> list[str]:
    """Outermost brackets of what follows the first comma, of the whole line if it has none."""
    _, comma, rest = line.partition(",")
    body = rest if comma else line
    return [body[start + 1 : stop] for start, stop in outer_brackets(body)[0]]
