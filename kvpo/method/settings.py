"""Settings of the method's stages that are settings and nothing else.

They stand apart from the code that they steer, so that reading a recipe needs no torch.

Settings that are also a rule (`KVRouting`, `Advantages`, `ClippedObjective`, ...) stand with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LEAST_GROUPS = 4
"""Groups from which on their gradients' agreement says something."""


@dataclass(frozen=True)
class RolloutConfig:
    """Settings of a group's rollout."""

    branches: int = 8
    """G, besides the anchor."""
    cache_frames: int = 33
    """Latent frames the prefix keeps, sink and nearest frames included.
    They are the pool that routing draws from."""
    prefixes: int = 1
    """Stories of a process whose prefixes are generated and decoded side by side.
    More means fewer and larger calls, and a cache of ``cache_frames`` for each of them from then
    on."""
    forks: int = 1
    """Groups that fork one story, each at another block: early, middle, late.
    Their common prefix is generated once; ``groups`` is a multiple. Each costs a cache of its own.
    Groups of one story share its noise, so a step has fewer stories that speak independently."""
    alike_forks: bool = False
    """All stories of a step fork at the same blocks.
    An early fork costs several times a late one, because everything behind it is generated for
    every branch; where each story draws its own, processes wait for the one whose fork is early."""
    together: int = 0
    """Most branches, the anchor included, that are generated or replayed side by side; 0 = all.
    Each holds a past of its own in the cache: lower it where memory is short."""

    def __post_init__(self):
        if self.branches < 2:
            raise ValueError(
                f"rollout.branches = {self.branches}, but a group compares at least 2 branches; set 2 or more"
            )
        if self.cache_frames < 1:
            raise ValueError(f"rollout.cache_frames = {self.cache_frames} must be positive")
        if self.prefixes < 1:
            raise ValueError(f"rollout.prefixes = {self.prefixes} must be 1 or more")
        if self.forks < 1:
            raise ValueError(f"rollout.forks = {self.forks} must be 1 or more")
        if self.together < 0:
            raise ValueError(
                f"rollout.together = {self.together} must be 1 or more, or 0 for all branches"
            )


@dataclass(frozen=True)
class ScoreConfig:
    """Settings of the clips that are scored."""

    clip_frames: int = 36
    """Longest clip of the global signal, pixel frames.
    It lies in the middle of what its segment has from the fork on."""
    min_frames: int = 12
    """Shorter stretches are not scored: too little to judge motion by."""
    segments: int | None = None
    """Prompt segments that a group's global signal looks at, its fork's own the first.
    None: all of them; 0: the local signal is all. What comes after is neither generated nor
    decoded. Evaluations look at all."""

    together: int = 0
    """Most rows that are decoded side by side, 0 = all: lower it where memory is short."""
    lead: int | None = None
    """Latent frames before the fork that are decoded, so that the decoder knows what came before.
    None: its receptive field (38 for Wan's VAE, 28 for the miniature's, 8 for a preview decoder), the
    same pixels as from frame 0 on. Fewer are cheaper, and pixels differ the more the fewer they are."""
    preview: str = ""
    """File of a small decoder (TAEHV's layout, such as taew2_1.safetensors) for training's rewards.
    Empty: the VAE decodes them. Evaluations, `kvpo generate` and `kvpo explore` take the VAE in any
    case; the pictures of a run's groups are those that its rewards saw. `kvpo doctor` says how far
    the rewards rank a group's branches alike."""

    def __post_init__(self):
        if self.lead is not None and self.lead < 1:
            raise ValueError(
                f"score.lead = {self.lead} must be 1 or more latent frames, or left out for the decoder's receptive field"
            )
        if self.together < 0:
            raise ValueError(
                f"score.together = {self.together} must be 1 or more, or 0 for all rows"
            )
        if self.segments is not None and self.segments < 0:
            raise ValueError(
                f"score.segments = {self.segments} must be 0 or more, or left out for all segments"
            )
        if not 1 <= self.min_frames <= self.clip_frames:
            raise ValueError(
                f"score.min_frames = {self.min_frames} must lie between 1 and score.clip_frames = {self.clip_frames}"
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW on float32 master weights."""

    lr: float = 1e-5
    """Learning rate after the warm-up."""
    warmup: int = 5
    """Updates over which the rate rises linearly to ``lr``.
    The first one already moves, at lr / warmup."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, multiplied by the rate."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.999
    """Decay of the running mean of the gradient's square."""
    eps: float = 1e-8
    """Number added to the root mean square that a weight's step is divided by.
    Where most of a gradient is noise, AdamW moves every weight by about ``lr`` whichever way it
    falls; an ``eps`` of the gradients' own size lets weights of little gradient rest."""
    clip: float = 1.0
    """Largest gradient norm of one group, or of a step where ``clip_of`` says so.
    Groups differ a hundredfold (`auto` temperature divides by the spread of their energies):
    clipped together, one group would speak for all."""
    clip_of: Literal["group", "step"] = "group"
    """Gradient that ``clip`` bounds: that of each group, or the step's sum.
    By group, every group above the bound counts alike; by step, a group weighs what its gradient
    does, the velocity penalty's included. A step's sum is the mean over its groups. With
    `advantages.std: step` take `step`: a clip of each group undoes what that does."""

    def __post_init__(self):
        if not (self.lr > 0.0 and self.eps > 0.0 and self.clip > 0.0 and self.warmup >= 1):
            raise ValueError(
                f"optimizer.lr = {self.lr}, eps = {self.eps} and clip = {self.clip} must be positive, warmup = {self.warmup} at least 1"
            )
        if self.clip_of not in ("group", "step"):
            raise ValueError(
                f"optimizer.clip_of = {self.clip_of!r} is unknown; choose group or step"
            )


@dataclass(frozen=True)
class AgreementConfig:
    """Settings of the measurement on the groups' gradients; training does not depend on it."""

    window: int = 128
    """Latest groups over which the mean cosine runs; 0 = it is not measured.
    128 tell a cosine of 0.01 from 0; each keeps 16 kB."""

    def __post_init__(self):
        if self.window != 0 and self.window < LEAST_GROUPS:
            raise ValueError(
                f"agreement.window = {self.window} must be {LEAST_GROUPS} or more groups, or 0: of fewer there is no error to be told"
            )
