"""`kvpo explore`: the branches of one story side by side, and what each of them reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kvpo.commands.options import Positional
from kvpo.commands.settings import Settings
from kvpo.common.environment import pick_device
from kvpo.common.files import say_replaced, try_folder, unused
from kvpo.common.progress import Progress
from kvpo.common.provenance import about_video, write_beside

if TYPE_CHECKING:
    from kvpo.generators.pipeline import Pipeline
    from kvpo.method.explorers import Explorer
    from kvpo.types import Rollout, Window


@dataclass(frozen=True)
class Explore:
    """Show what an explorer does to one story: branches and anchor side by side.

    It shows what each of them reads, rewards, diversity.
    """

    recipe: Positional[str]
    settings: Settings
    generator: str = ""
    """Generator: pipeline folder, mini or a run; default: the recipe's pipeline."""
    script: int = 0
    """Number of the story among the recipe's evaluation scripts."""
    by: Literal["recipe", "kv_routing", "start_noise", "renoise"] = "recipe"
    """Explorer, in the window of the recipe's.
    start_noise and renoise can be shown, but not trained by an energy."""
    fork: int = -1
    """Fork block; -1 = the one of a few where the recipe's branches look most different.
    Only eligible blocks are tried. It is the same for every explorer."""
    tries: int = 4
    """Fork blocks that are tried where none is given."""
    out: Path = Path("runs/explore")
    """A folder within it holds the script's group by this explorer."""

    def __call__(self) -> None:
        explore_command(self)


def explore_command(args: Explore) -> None:
    import torch

    from kvpo.api.records import branch_table
    from kvpo.api.shared import score_group, shown_explorer
    from kvpo.common.extras import require_extra
    from kvpo.common.timing import Phases
    from kvpo.generators.readable import check_prompts
    from kvpo.generators.sampler import SAMPLERS
    from kvpo.method.rollout import roll_out
    from kvpo.method.score import pixel_diversity
    from kvpo.method.update import GroupUpdate
    from kvpo.report.samples import show_group
    from kvpo.runs.build import evaluation_scripts, judges
    from kvpo.runs.loading import load_generator, pipeline_folder

    require_extra("a routing map", "report", ("matplotlib",))
    config = args.settings
    device = pick_device(args.settings.device)
    progress = Progress()
    phases = Phases(progress.phase, progress.ended)
    scripts, generator = evaluation_scripts(config), args.generator or config.pipeline
    if not 0 <= args.script < len(scripts):
        raise ValueError(
            f"--script {args.script} does not exist: the recipe has evaluation scripts 0 to {len(scripts) - 1}; give one of them"
        )
    if args.fork < -1:
        raise ValueError(f"--fork {args.fork} is no block; give its number, or -1 for a drawn one")
    script, out = scripts[args.script], unused(args.out) if args.out == Explore.out else args.out
    try_folder(out)
    check_prompts(pipeline_folder(generator), [script], progress.warn)
    progress.log(
        f"kvpo explore {args.recipe} with {generator} on {device}: script {args.script}, {config.rollout.branches} branches, into {out}"
    )
    with progress.timed("loading the rewards"):
        rewards, advantages = judges(
            replace(config, rewards=tuple(config.rewards_of("train"))), device
        )
    with progress.timed("loading the generator"):
        pipeline, label = load_generator(generator, device, config.vae_dtype, config.dtype)
        embeddings = dict(zip(script.texts, pipeline.encode_text(script.texts)))
    chosen = config.explorer if args.by == "recipe" else args.by
    folder = out / f"script-{args.script}-{chosen}"
    say_replaced([folder / "groups" / "step-000000"], progress.say)
    explorer = shown_explorer(config, args.by)
    name, sampler = ("explore", args.script), SAMPLERS[config.sampler]

    def rolled(
        explorer: Explorer, fork: int, horizon: Callable[[Window], int] | None = None
    ) -> Rollout:
        return roll_out(
            pipeline,
            sampler,
            explorer,
            config.rollout,
            script,
            embeddings,
            config.seed,
            name,
            phases,
            fork,
            horizon,
        )

    fork, said = args.fork, ""
    if fork < 0:
        # By the recipe's explorer, whichever is shown: groups that are compared must leave the
        # story at one block.
        forks = config.exploring.eligible_forks(script.blocks, pipeline.geometry)
        fork, said = widest_fork(
            forks,
            args.tries,
            lambda f: window_diversity(pipeline, rolled(config.exploring, f, lambda w: w.stop)),
            progress,
        )
    rollout = rolled(explorer, fork)
    scores, pixels, advantage, energy = score_group(
        pipeline, rollout, embeddings, config, rewards, advantages, phases
    )
    pi = (
        torch.softmax(-energy / config.temperature.resolve(energy), dim=0)
        if not explorer.deterministic_replay
        else torch.full_like(energy, 1 / len(energy))
    )
    folder = show_group(
        folder,
        0,
        pipeline,
        rollout,
        pixels,
        scores,
        advantage,
        GroupUpdate(energy, pi, {}),
        explorer,
    )
    write_beside(
        folder / "explore.json",
        about_video(
            script, config.seed, label, explorer=type(explorer).__name__, fork=rollout.window.fork
        ),
    )
    progress.say(
        f"{label}, {type(explorer).__name__}, fork at block {rollout.window.fork} of {script.blocks}: "
        + " | ".join(script.texts)
    )
    if said:
        progress.say(said)
    progress.say(branch_table(rollout, scores, advantage.values, energy))
    progress.say(f"pixel diversity of the branches: {pixel_diversity(pixels[:-1]):.5f}")
    progress.say(
        f"written to {Path(folder).resolve()}: grid.mp4, routing.png, group.json, explore.json"
    )


def widest_fork(
    forks: Sequence[int], tries: int, diversity: Callable[[int], float], progress: Progress
) -> tuple[int, str]:
    """Choose the one of a few ``forks`` whose branches differ most, and say so in a line.

    The few are evenly spread.

    A window in which the story hides its objects shows nine equal pictures, whatever the branches
    remember. Only pixels are looked at, never a reward or what the story knows; training draws its
    forks blindly all the same.
    """
    if tries < 1:
        raise ValueError(f"--tries {tries} must be 1 or more")
    picked = [
        forks[i * len(forks) // min(tries, len(forks))] for i in range(min(tries, len(forks)))
    ]
    found = {}
    with progress.bar("forks tried", len(picked)) as bar:
        for fork in picked:
            found[fork] = diversity(fork)
            bar.advance(f"block {fork}: pixel diversity {found[fork]:.2g}")
    best = max(found, key=lambda fork: found[fork])
    tried = ", ".join(f"{fork}: {value:.2g}" for fork, value in found.items())
    return (
        best,
        f"fork chosen by the pixel diversity of the recipe's branches in their window, by block {tried}",
    )


def window_diversity(pipeline: Pipeline, rollout: Rollout) -> float:
    """Pixel diversity of a group's branches within their window."""
    from kvpo.generators.pipeline import pixel_span
    from kvpo.method.score import decode, pixel_diversity

    first, stop = pixel_span((rollout.window.fork, rollout.window.stop), pipeline.geometry)
    return pixel_diversity(decode(pipeline, rollout, stop - first)[:-1, : stop - first])
