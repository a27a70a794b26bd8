"""The commands: each is a dataclass of its options, whose call does the work."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from kvpo.ab import Ab
from kvpo.ab_answers import Unblind
from kvpo.align import Alignment
from kvpo.config import RunConfig, load_config, recipe_path
from kvpo.denoise import SAMPLERS
from kvpo.distributed import leave
from kvpo.doctor import examine
from kvpo.environment import command, pick_device
from kvpo.evaluate import compare, evaluate, kinds_of, table, write_comparison
from kvpo.exporting import Export
from kvpo.files import write_atomic
from kvpo.generating import Generate
from kvpo.importing import Import
from kvpo.loading import load_generator
from kvpo.mini.pretrain import pretrain
from kvpo.parts import evaluation_scripts, judges, trained_families, unseen
from kvpo.progress import Progress
from kvpo.plan import Plan
from kvpo.prompt_sets import Prompts
from kvpo.replay import CONTEXTS, Replay
from kvpo.report import write_report
from kvpo.resuming import restarted_here
from kvpo.reward_commands import Rewards
from kvpo.reward_env import RewardEnv
from kvpo.rewards.scorer import load_rewards
from kvpo.rollout import roll_out
from kvpo.score import pixel_diversity, score
from kvpo.showing import before_after, show_group
from kvpo.stopping import Stopped, ending_at_once
from kvpo.timing import Phases
from kvpo.update import GroupUpdate
from kvpo.vbench import Vbench

Positional = tyro.conf.Positional
Settings = Annotated[RunConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Align:
    """Align a generator to rewards by KVPO.  Every setting of the recipe can be given here, e.g. --optimizer.lr 1e-4."""

    recipe: Positional[str]
    """A shipped recipe (mini) or a YAML file."""
    settings: Settings
    out: Path = Path("runs/align")
    """Folder of the run; it must not hold another one."""
    resume: bool = False
    """Go on with the run in --out from its newest checkpoint."""
    override: bool = False
    """With --resume, take settings that differ from the run's: patience, branch_parallel, policy.shard, and those of what is shown, evaluated and kept.  steps needs no asking."""

    def __call__(self) -> None:
        progress, run = Progress(self.out / "logs"), None
        with ending_at_once():
            try:
                run = Alignment(self.settings, self.out, progress)
                again = run.ranks.gather(restarted_here(self.out))  # torchrun counts on every node by itself
                report = run.run(self.resume or any(again), self.override)
                progress.say(f"report: {report.resolve()}")
            except Stopped as stop:
                if run is not None and run.state.begun:
                    progress.say(f"stopped by {stop}; {run.done} steps are done and saved. Go on by the same command with --resume")
                else:
                    progress.say(f"stopped by {stop}; nothing was begun")
            finally:
                leave()


@dataclass(frozen=True)
class Explore:
    """Show what an explorer does to one story: branches and anchor side by side, what each of them reads, rewards, diversity."""

    recipe: Positional[str]
    settings: Settings
    generator: str = ""
    """Whose weights: pipeline folder, mini or a run; default: the recipe's pipeline."""
    script: int = 0
    """Number of the story among the recipe's evaluation scripts."""
    by: Literal["recipe", "kv_routing", "start_noise"] = "recipe"
    """Which explorer; start_noise can be shown, but not trained by an energy."""
    fork: int = -1
    """Fork block; -1 = drawn among the eligible ones."""
    out: Path = Path("runs/explore")

    def __call__(self) -> None:
        explore_command(self)


@dataclass(frozen=True)
class Evaluate:
    """Measure a generator on fixed scripts and seeds; with --against, paired differences with 95 % intervals."""

    generator: Positional[str] = "mini"
    """Pipeline folder, mini, or a run (RUN, RUN:ema, RUN:online, RUN:start)."""
    against: str = ""
    """The generator to compare with, on the same scripts and noise."""
    recipe: str = "mini"
    """Where rewards, evaluators, sampler and scripts are taken from."""
    prompts: str = ""
    """Prompt file to measure on; default: what the recipe evaluates on."""
    scripts: int = 128
    seeds: int = 1
    """Videos of every script, each with noise of its own; from 2 on their diversity is measured too."""
    seed: int = 1000
    """Names the scripts' and the noise's streams."""
    blocks: int = 0
    """Length of the videos, blocks; 0 = the recipe's."""
    out: Path = Path("runs/evaluate.json")
    device: str = "auto"

    def __call__(self) -> None:
        evaluate_command(self)


@dataclass(frozen=True)
class Report:
    """Write a run's report.html anew."""

    run: Positional[Path]
    strips: Path | None = None
    """Also write a still picture of the same stories before and after, PNG."""

    def __call__(self) -> None:
        if not (self.run / "config.resolved.yaml").exists():
            raise FileNotFoundError(f"{self.run} is no run folder: it has no config.resolved.yaml")
        print(f"report: {write_report(self.run).resolve()}")
        if self.strips is not None:
            print(f"strips: {write_atomic(self.strips, before_after(self.run)).resolve()}")


@dataclass(frozen=True)
class Doctor:
    """Check the method's invariants on a generator and a recipe, each with its measured number."""

    recipe: Positional[str]
    settings: Settings

    def __call__(self) -> None:
        if not examine(self.settings):
            raise ValueError("some invariants do not hold; see the lines marked FAILED above")


@dataclass(frozen=True)
class Pretrain:
    """Make the miniature's start weights, from nothing; resumable."""

    out: Positional[Path]
    """The pipeline folder to write."""
    work: Path = Path("runs/pretrain")
    """Checkpoints and log; a second call goes on from there."""
    seed: int = 0
    device: str = "auto"

    def __call__(self) -> None:
        pretrain(self.out, self.work, seed=self.seed, device=str(pick_device(self.device)))


def evaluate_command(args: Evaluate) -> None:
    recipe = load_config(recipe_path(args.recipe))
    config = replace(recipe, evaluate=replace(recipe.evaluate, scripts=args.scripts, seeds=args.seeds, seed=args.seed, videos=0, prompts=args.prompts or recipe.evaluate.prompts))
    if args.blocks:
        config = replace(config, data=replace(config.data, blocks=args.blocks))
    device, scripts, progress = pick_device(args.device), evaluation_scripts(config), Progress()
    rewards = load_rewards(config.rewards, device)
    kinds = kinds_of(rewards, args.seeds, trained_families(args.generator) | trained_families(args.against))
    scored, labels = [], []
    for spec in (args.generator, args.against or args.generator)[: 2 if args.against else 1]:
        pipeline, label = load_generator(spec, device, config.vae_dtype, config.dtype)
        with progress.bar(f"evaluate {label}", len(scripts)) as bar:
            scored.append(evaluate(pipeline, SAMPLERS[config.sampler], scripts, rewards, config.score, config.evaluate, bar.move_to))
        labels.append(label)
    if args.against:
        rows = compare(*scored, kinds)
        progress.say(table(rows, "A", "B"))
        progress.say(f"A = {labels[0]}, B = {labels[1]}, {len(scripts)} scripts, {args.seeds} video{'s' * (args.seeds > 1)} of each, seed {args.seed}")
        write_comparison(args.out, rows, *labels, scripts, config.evaluate, command(), unseen(config))
    else:
        for name, kind, r_N in zip(scored[0].components, kinds, scored[0].r_KN):
            progress.say(f"{name:<20} {kind:<9} mean {r_N.nanmean():.4f}  scripts {int(r_N.isfinite().sum())}")
        means = {name: float(r_N.nanmean()) if r_N.isfinite().any() else None for name, r_N in zip(scored[0].components, scored[0].r_KN)}
        record = {"label": labels[0], "means": means, "scripts": len(scripts), "videos": args.seeds, "seed": args.seed, "command": command()}
        write_atomic(args.out, json.dumps(record, indent=1, allow_nan=False) + "\n")
    progress.say(f"written to {args.out}")


def explore_command(args: Explore) -> None:
    config, device, progress, phases = args.settings, pick_device(args.settings.device), Progress(), Phases()
    pipeline, label = load_generator(args.generator or config.pipeline, device, config.vae_dtype, config.dtype)
    scripts = evaluation_scripts(config)
    if not 0 <= args.script < len(scripts):
        raise ValueError(f"--script {args.script} does not exist: the recipe has evaluation scripts 0 to {len(scripts) - 1}")
    script = scripts[args.script]
    embeddings = dict(zip(script.texts, pipeline.encode_text(script.texts)))
    rewards, advantages = judges(replace(config, rewards=tuple(config.rewards_of("train"))), device)
    fork, explorer = None if args.fork < 0 else args.fork, config.exploring if args.by == "recipe" else getattr(config, args.by)
    rollout = roll_out(pipeline, SAMPLERS[config.sampler], explorer, config.rollout, script, embeddings, config.seed, ("explore", args.script), phases, fork)
    scores, pixels = score(pipeline, rollout, rewards, config.score, phases)
    advantage = advantages(scores)
    energy = Replay(pipeline, rollout, embeddings, CONTEXTS[config.context], config.energy, range(len(advantage.values))).energies()
    pi = torch.softmax(-energy / config.temperature.resolve(energy), dim=0) if not explorer.deterministic_replay else torch.full_like(energy, 1 / len(energy))
    folder = show_group(args.out, 0, pipeline, rollout, pixels, scores, advantage, GroupUpdate(energy, pi, {}), explorer)
    progress.say(f"{label}, {type(explorer).__name__}, fork at block {rollout.window.fork} of {script.blocks}: " + " | ".join(script.texts))
    progress.say(_branch_table(scores, advantage, energy, rollout))
    progress.say(f"pixel diversity of the branches: {pixel_diversity(pixels[:-1]):.5f}")
    progress.say(f"written to {Path(folder).resolve()}: grid.mp4, routing.png, group.json")


def _branch_table(scores, advantage, energy, rollout) -> str:
    lines = ["row       " + "".join(f"{name:>12}" for name in scores.components) + f"{'A':>9}{'energy':>11}  reads"]
    for row, plan in enumerate(rollout.plans):
        anchor = row == rollout.num_branches
        numbers = "".join(f"{float(r):>12.3f}" for r in scores.local[:, row])
        judged = f"{float(advantage.values[row]):>+9.2f}{float(energy[row]):>11.2e}" if row < len(energy) else f"{'':>20}"
        reads = " ".join(map(str, plan.frames)) or ("rolling window" if anchor else "rolling window, other noise")
        lines.append(f"{'anchor' if anchor else f'branch {row}':<10}{numbers}{judged}  {reads}")
    return "\n".join(lines)
