"""A run's settings, strict, with one default per knob at its definition.

Illegal pairs are refused when they are read.

Recipes are YAML files of the same shape. Precedence: defaults here and in the parts < recipe <
command line.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from kvpo.common.metrics import MOST_INNER
from kvpo.evaluation.settings import EvaluateConfig, SentinelConfig
from kvpo.method.advantages import Advantages, UnsafePolicy
from kvpo.method.best_of import BestOf
from kvpo.method.energies import DenoisedEnergy, Surrogate, Temperature, VelocityEnergy
from kvpo.method.explorers import Explorer, RenoiseExplorer, StartNoise
from kvpo.method.objectives.interface import Record
from kvpo.method.objectives.kinds import AnyObjective, objective_kind
from kvpo.method.objectives.tve_ppo import TvePpo
from kvpo.method.pairs import PairSampling
from kvpo.method.prompt_explorer import PromptExplorer
from kvpo.method.routing import KVRouting
from kvpo.method.sde_explorer import SdeExplorer
from kvpo.method.settings import AgreementConfig, OptimizerConfig, RolloutConfig, ScoreConfig
from kvpo.method.velocity_penalty import VelocityPenalty
from kvpo.policy.settings import CheckpointConfig, PolicyConfig
from kvpo.rewards.entry import RewardEntry

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class DataConfig:
    """Settings of the stories that are trained on."""

    prompts: str = "mini"
    """A prompt file (see `kvpo.method.prompt_files`), or `mini`: the miniature's stories without end."""
    blocks: int = 13
    """Length of a video, blocks (of 3 latent frames)."""
    segments: int | None = None
    """Prompts of every script, also of the evaluation's; None: all of a file's, or drawn.
    Of a prompt file's scripts the first so many are used (None: all); the miniature's stories have
    exactly so many (None: drawn, 1 to 4)."""
    switches: tuple[int, ...] = ()
    """Blocks at which the second, third, ... prompt takes over; empty: evenly spread.
    For scripts of a prompt file only."""
    memory: float = 0.0
    """Share of stories that only the past can resolve (`mini` only)."""
    open_forks: bool = False
    """Fork no story where its object is behind the pillar for the whole window (`mini` only).
    Branches of such a window look alike, so the group's local rewards say nothing. Which windows
    these are the story's truth says, before anything is generated; a story that shows its object
    in no window is forked anywhere."""

    def __post_init__(self):
        if self.open_forks and self.prompts != "mini":
            raise ValueError(
                f"data.open_forks asks a story where its object is hidden, and the prompts of {self.prompts} do not say it; leave it out"
            )


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run does."""

    pipeline: str = "mini"
    """Pipeline folder in diffusers layout, `mini` (the miniature that is shipped), or a run.
    RUN, RUN:ema, RUN:online, RUN:start, RUN:best: the weights of another run are the start and the
    reference. They are kept in the new run's folder, an adapter merged."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: a GPU if there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the generator's and text encoder's large matrices and of the KV cache.
    What is trained is float32 in any case."""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which videos are decoded.
    Trained and evaluated weights are always decoded alike."""
    attention: Literal["sdpa", "cudnn", "efficient", "math", "flash", "flash3"] = "sdpa"
    """Kernel of the generator's attention; `sdpa`: torch's choice.
    `flash` and `flash3` need a GPU and their packages. A run's numbers differ by rounding."""
    compile: bool = False
    """Compile the transformer's blocks (torch.compile).
    The first step then takes minutes longer, and so does the first call of every new shape. A run's
    numbers differ by rounding. Not with `policy.shard`."""
    seed: int = 0
    """Names all random streams of the run: scripts, forks, plans, noise, adapter."""
    steps: int = 60
    """Steps of the run.
    In each, groups are rolled out and scored, then ``inner_updates`` optimizer updates are made on
    them."""
    groups: int = 2
    """Groups (a script, a fork, its branches) of each step.
    The update takes the mean of their gradients."""
    inner_updates: int = 1
    """Optimizer updates on the groups of one step.
    The behaviour policy stays at the weights that rolled them out, so from the second on ratios
    leave 1 and the clip acts. Each costs a replay with gradient. More than one keeps every group of
    a rank, its past's cache and trajectories, until the last."""
    branch_parallel: int = 1
    """Processes that share one group, each with some of its branches.
    For a group that does not fit one card, or for fewer groups than cards."""
    sampler: Literal["renoise", "ode"] = "renoise"
    """Rule that leads from a denoise step to the next.
    `renoise`: fresh noise on the predicted clean latents; `ode`: Euler along the velocity."""
    explorer: Literal["kv_routing", "start_noise", "renoise", "sde", "best_of", "prompt"] = (
        "kv_routing"
    )
    """Source of branch diversity; the section of that name holds its settings."""
    surrogate: Literal["velocity_energy", "denoised_energy"] = "velocity_energy"
    """Energy that says how likely a branch is; the section of that name holds its settings."""
    context: Literal["branch", "anchor", "self"] = "branch"
    """Latents that later blocks of the window read in replay.
    `branch`: the branch's clean latents; `anchor`: the anchor's; `self`: the policy's own
    prediction."""
    rows_per_pass: int = 0
    """Most velocities replayed in one pass, 0 = all.
    Lower it where memory is short; the gradient stays exact."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    shuffle_advantages: bool = False
    """Shuffle advantages among the branches of each group.
    A control experiment: there is then nothing to learn."""
    zero_advantages: bool = False
    """Set all advantages to 0, so only the penalty, the KL and the averaging of weights act.
    Another control experiment."""
    patience: float = 1800.0
    """Seconds that processes wait for each other before they name who did not come and end.
    A group at full size takes minutes."""
    show_every: int = 20
    """Steps between recorded branch grids; 0 = none."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Trackers that get metrics, videos and settings; metrics.jsonl is written in any case.
    `tensorboard`: in the run's folder; `wandb` and `trackio`, which must be installed, in a project
    kvpo. A resumed run goes on in the same run of its tracker."""
    rewards: tuple[RewardEntry, ...] = (
        RewardEntry("world_vq"),
        RewardEntry("world_mq"),
        RewardEntry("world_ta"),
        RewardEntry("attributes", role="eval"),
        RewardEntry("identity", role="eval"),
        RewardEntry("flow_motion", role="eval"),
        RewardEntry("classic", role="eval"),
        RewardEntry("efficientnet", role="eval", params={"size": 64, "enough_motion": 0.01}),
        RewardEntry("world_facts", role="guard"),
    )
    """Rewards: those that are trained on, and those that only evaluations ask (role)."""
    calibration_clips: str = ""
    """Folder of good videos with clips.csv (file, prompt) to check the trained rewards on.
    They must prefer moving to frozen before anything is trained. Empty: the miniature's true clips
    where its stories are trained on, else no such check."""
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    kv_routing: KVRouting = KVRouting()
    start_noise: StartNoise = StartNoise()
    renoise: RenoiseExplorer = RenoiseExplorer()
    sde: SdeExplorer = SdeExplorer()
    best_of: BestOf = BestOf()
    prompt: PromptExplorer = PromptExplorer()
    score: ScoreConfig = ScoreConfig()
    advantages: Advantages = Advantages()
    unsafe: UnsafePolicy = UnsafePolicy()
    velocity_energy: VelocityEnergy = VelocityEnergy()
    denoised_energy: DenoisedEnergy = DenoisedEnergy()
    pairs: PairSampling = PairSampling()
    temperature: Temperature = Temperature()
    objective: Annotated[AnyObjective, Field(discriminator="kind")] = TvePpo()
    velocity_penalty: VelocityPenalty = VelocityPenalty()
    policy: PolicyConfig = PolicyConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    agreement: AgreementConfig = AgreementConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    sentinels: SentinelConfig = SentinelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __post_init__(self):
        self._refuse_numbers()
        self._refuse_pairs()
        self._refuse_methods()

    def _refuse_numbers(self) -> None:
        """Refuse numbers that no run can have.

        Raises ValueError.
        """
        for name, value, least in (
            ("steps", self.steps, 1),
            ("groups", self.groups, 1),
            ("rows_per_pass", self.rows_per_pass, 0),
            ("show_every", self.show_every, 0),
        ):
            if value < least:
                raise ValueError(f"{name} = {value} must be {least} or more")
        if self.groups % self.rollout.forks:
            raise ValueError(
                f"groups = {self.groups} is no multiple of rollout.forks = {self.rollout.forks}: so many groups fork one story; set a multiple"
            )
        if not 1 <= self.inner_updates <= MOST_INNER:
            raise ValueError(
                f"inner_updates = {self.inner_updates} must lie between 1 and {MOST_INNER}: what is rolled out says less with every update on it"
            )
        if not 1 <= self.branch_parallel <= self.rollout.branches:
            raise ValueError(
                f"branch_parallel = {self.branch_parallel} must lie between 1 and rollout.branches = {self.rollout.branches}: every process of a group needs a branch"
            )
        if not self.patience > 0.0:
            raise ValueError(f"patience = {self.patience} must be positive")

    def _refuse_pairs(self) -> None:
        """Refuse settings that contradict one another.

        Raises ValueError.
        """
        if self.compile and self.policy.shard:
            raise ValueError(
                "compile can not be paired with policy.shard: the two together have not been tried; set one of them"
            )
        if self.shuffle_advantages and self.zero_advantages:
            raise ValueError(
                "shuffle_advantages and zero_advantages are two controls, but a run can be one of them; set only one"
            )
        if self.advantages.weights:
            raise ValueError(
                "advantages.weights is set by the rewards' own weights; write them there"
            )
        if self.data.open_forks and self.rollout.alike_forks:
            raise ValueError(
                "data.open_forks forks each story where it shows its object, and rollout.alike_forks all of them at one block; set only one"
            )

    def _refuse_methods(self) -> None:
        """Refuse an objective, explorer, sampler and energy that do not go together.

        Raises ValueError.
        """
        self.refuse_without_noise(self.explorer)
        if reason := self.objective.refusal(self.exploring, self.sampler):
            raise ValueError(
                f"objective {self.objective.kind} can not be paired with explorer {self.explorer} and sampler {self.sampler}: {reason}; choose a pair of docs/methods.md"
            )
        drawn = self.data.segments is None and self.data.prompts == "mini"
        if self.explorer == "prompt" and (drawn or self.data.segments == 1):
            raise ValueError(
                f"explorer prompt forks where a second prompt takes over, but data.segments = {self.data.segments} gives stories of one prompt too; set 2 or more"
            )
        if self.pairs.count and not self.objective.uses_energy:
            raise ValueError(
                f"pairs.count = {self.pairs.count} draws the velocities of an energy, which objective {self.objective.kind} does not ask for; set 0"
            )
        if self.context == "self" and "inputs" not in self.objective.needs:
            raise ValueError(
                f"context = self predicts from a rollout's inputs, which objective {self.objective.kind} does not record; use branch or anchor"
            )
        if (
            self.energy == VelocityEnergy("kernel", self.velocity_energy.last_sigma)
            and self.sampler != "renoise"
        ):
            raise ValueError(
                f"velocity_energy.weights = kernel are the weights of the renoise sampler's Gaussian steps, which sampler = {self.sampler} does not take; use equal or a number a step"
            )

    def refuse_without_noise(self, explorer: str) -> None:
        """Refuse an explorer whose branches the sampler would leave alike.

        Raises ValueError.
        """
        chosen = getattr(self, explorer)
        own = "" if chosen.independent else chosen.own_noise
        if own == "sde" and self.sampler != "ode":
            raise ValueError(
                f"explorer {explorer} gives noise to the steps of sampler ode, but sampler = {self.sampler} draws noise behind its steps already; use sampler ode, or explorer renoise"
            )
        if own == "renoise" and self.sampler != "renoise":
            raise ValueError(
                f"explorer {explorer} draws the noise behind denoise steps, but sampler = {self.sampler} has none there and every branch would be the anchor; use sampler renoise"
            )

    @property
    def stories(self) -> int:
        """Stories of a step; its group i is of story i modulo this."""
        return self.groups // self.rollout.forks

    @property
    def keeps_groups(self) -> bool:
        """Whether all groups of a rank are in memory at once.

        They are where their rewards are asked for together, or they are learnt from again.
        """
        return self.inner_updates > 1 or self.advantages.std == "step"

    @property
    def recorded(self) -> frozenset[Record]:
        """Records of a rollout's window that the objective learns from."""
        return self.objective.needs

    @property
    def exploring(self) -> Explorer:
        return getattr(self, self.explorer).of(self.data.blocks)

    @property
    def energy(self) -> Surrogate:
        return getattr(self, self.surrogate)

    def rewards_of(self, role: str) -> list[RewardEntry]:
        return [r for r in self.rewards if r.role == role]


def recipe_path(name: str) -> Path:
    """A shipped recipe by its name, a file, or a run's folder, whose settings are one.
    FileNotFoundError lists the shipped ones."""
    for path in (Path(name), Path(name) / "config.resolved.yaml", RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"there is no recipe {name!r}; shipped are {', '.join(sorted(p.stem for p in RECIPES.glob('*.yaml')))}, or give a YAML file or a run's folder"
    )


def load_config(path: Path) -> RunConfig:
    """Read a recipe.

    Raises ValueError, one line with the file and the key, for anything that is not a setting or
    does not fit it.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not YAML: {' '.join(str(error).split())}; correct that line"
        ) from None
    try:
        return from_dict(content or {})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def from_dict(content: Mapping[str, Any]) -> RunConfig:
    _refuse_unknown(RunConfig, content)
    try:
        return TypeAdapter(RunConfig).validate_python(_with_kind(content))
    except ValidationError as error:
        first = error.errors()[0]
        place = list(first["loc"])
        if place[:1] == ["objective"]:
            del place[1:2]  # which of the objectives it is, stands in its kind
        key = ".".join(str(part) for part in place)
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "missing":
            raise ValueError(f"{key} is missing; add it") from None
        raise ValueError(
            f"{key} = {first['input']!r}: {reason}"
            if key and not isinstance(first["input"], dict)
            else reason
        ) from None


def to_dict(config: RunConfig) -> dict[str, Any]:
    return TypeAdapter(RunConfig).dump_python(config, mode="json")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``key: old -> new`` of every setting that differs."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} -> {b}")
    return found


def _with_kind(content: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe whose objective has a kind: older ones knew one objective, and had none."""
    if "objective" not in content:
        return dict(content)
    return {**content, "objective": {"kind": TvePpo.kind, **content["objective"]}}


def _refuse_unknown(kind: type, content: Any, prefix: str = "") -> None:
    """Refuse keys that are no settings.

    Raises ValueError with the nearest known key.
    """
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{prefix.rstrip('.') or 'a recipe'} must hold keys and values, not {content!r}"
        )
    hints = get_type_hints(kind)
    for key, value in content.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            raise ValueError(
                f"unknown key {prefix}{key}"
                + (
                    f"; did you mean {prefix}{near[0]}?"
                    if near
                    else f"; known here: {', '.join(hints)}"
                )
            )
        if not prefix and key == "objective":
            named = isinstance(value, Mapping) and "kind" in value
            _refuse_unknown(objective_kind(value["kind"]) if named else TvePpo, value, "objective.")
        elif dataclasses.is_dataclass(hints[key]):
            _refuse_unknown(hints[key], value, f"{prefix}{key}.")
        elif key == "rewards" and isinstance(value, list):
            for i, entry in enumerate(value):
                _refuse_unknown(RewardEntry, entry, f"rewards.{i}.")
