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
    import torch

    from kvpo.common.rng import Name
    from kvpo.config import RunConfig
    from kvpo.generators.pipeline import Pipeline
    from kvpo.method.explorers import Explorer, Geometry
    from kvpo.types import Rollout, Script, Window


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
    by: Literal["recipe", "kv_routing", "start_noise", "renoise", "sde", "prompt"] = "recipe"
    """Explorer, in the window of the recipe's.
    start_noise, renoise and sde can be shown, but not trained by an energy."""
    fork: int = -1
    """Fork block; -1 = the one of a few where the recipe's branches look most different.
    Only eligible blocks are tried. It is the same for every explorer but those that fork at prompt
    switches alone: of these blocks, the switches are tried."""
    tries: int = 4
    """Fork blocks that are tried where none is given."""
    out: Path = Path("runs/explore")
    """A folder within it holds the script's group by this explorer."""

    def __call__(self) -> None:
        explore_command(self)


def explore_command(args: Explore) -> None:
    """Look at one group as the options say; what may be wrong in them is found before loading."""
    from kvpo.common.extras import require_extra
    from kvpo.generators.pipeline_folder import check_folder
    from kvpo.generators.readable import check_prompts
    from kvpo.method.forks import check_fork
    from kvpo.runs.loading import pipeline_folder

    require_extra("a routing map", "report", ("matplotlib",))
    config, progress = args.settings, Progress()
    generator, device = args.generator or config.pipeline, pick_device(config.device)
    script, explorer = _asked(args)
    out = unused(args.out) if args.out == Explore.out else args.out
    try_folder(out)
    folder = pipeline_folder(generator)
    check_prompts(folder, [script], progress.warn)
    geometry = check_folder(folder)
    forks: Sequence[int] = ()
    if args.fork >= 0:
        check_fork(explorer, script, geometry, args.fork)
    else:
        forks = shared_forks(config.exploring, explorer, script, geometry)
    progress.log(
        f"kvpo explore {args.recipe} with {generator} on {device}: script {args.script}, {config.rollout.branches} branches, into {out}"
    )
    chosen = config.explorer if args.by == "recipe" else args.by
    folder = out / f"script-{args.script}-{chosen}"
    look = Look(config, script, ("explore", args.script), generator, device, progress)
    say_replaced([folder / "groups" / "step-000000"], progress.say)
    fork, said = (args.fork, "") if args.fork >= 0 else look.telling_fork(forks, args.tries)
    look.show(look.rolled(explorer, fork), explorer, folder, said)


def _asked(args: Explore) -> tuple[Script, Explorer]:
    """The story and the explorer that are asked for; ValueError where there is no such thing."""
    from kvpo.api.shared import shown_explorer
    from kvpo.runs.build import evaluation_scripts

    scripts = evaluation_scripts(args.settings)
    if not 0 <= args.script < len(scripts):
        raise ValueError(
            f"--script {args.script} does not exist: the recipe has evaluation scripts 0 to {len(scripts) - 1}; give one of them"
        )
    if args.fork < -1:
        raise ValueError(f"--fork {args.fork} is no block; give its number, or -1 for a drawn one")
    _refuse_tries(args.tries)
    if args.fork >= 0 and args.tries != Explore.tries:
        raise ValueError(
            f"--tries {args.tries} looks for a fork, and --fork {args.fork} gives one; leave one out"
        )
    return scripts[args.script], shown_explorer(args.settings, args.by)


class Look:
    """A generator, a story and the recipe's rewards: groups are rolled out and shown."""

    def __init__(
        self,
        config: RunConfig,
        script: Script,
        name: Name,
        generator: str,
        device: torch.device,
        progress: Progress,
    ):
        """Load all of it. ``name``: of the groups' random streams."""
        from kvpo.common.timing import Phases
        from kvpo.runs.build import judges
        from kvpo.runs.loading import load_generator

        self.config, self.script, self.name, self.progress = config, script, name, progress
        self.phases = Phases(progress.phase, progress.ended)
        with progress.timed("loading the rewards"):
            trained_only = replace(config, rewards=tuple(config.rewards_of("train")))
            self.rewards, self.advantages = judges(trained_only, device)
        with progress.timed("loading the generator"):
            self.pipeline, self.label = load_generator(
                generator, device, config.vae_dtype, config.dtype
            )
            texts = self.pipeline.encode_text(script.texts)
            self.embeddings = dict(zip(script.texts, texts))

    def rolled(
        self, explorer: Explorer, fork: int, horizon: Callable[[Window], int] | None = None
    ) -> Rollout:
        """A group of the story, forked at block ``fork``; ``horizon`` as in `roll_out`."""
        from kvpo.generators.sampler import SAMPLERS
        from kvpo.method.rollout import roll_out

        return roll_out(
            self.pipeline,
            SAMPLERS[self.config.sampler],
            explorer,
            self.config.rollout,
            self.script,
            self.embeddings,
            self.config.seed,
            self.name,
            self.phases,
            fork,
            horizon,
        )

    def telling_fork(self, forks: Sequence[int], tries: int) -> tuple[int, str]:
        """The one of a few ``forks`` whose branches differ most, as `widest_fork`.

        It is the recipe's explorer that forks, whichever is shown: groups that are compared must
        leave the story at one block.
        """
        explorer = self.config.exploring

        def diversity(fork: int) -> float:
            rollout = self.rolled(explorer, fork, lambda window: window.stop)
            return window_diversity(self.pipeline, rollout)

        return widest_fork(forks, tries, diversity, self.progress)

    def show(self, rollout: Rollout, explorer: Explorer, out: Path, said: str) -> None:
        """Judge a group, write what there is to see of it into ``out``, and say its numbers."""
        from kvpo.api.records import branch_table
        from kvpo.api.shared import score_group
        from kvpo.method.score import pixel_diversity
        from kvpo.method.update import GroupUpdate
        from kvpo.report.samples import show_group

        scores, pixels, advantage, energy = score_group(
            self.pipeline,
            rollout,
            self.embeddings,
            self.config,
            self.rewards,
            self.advantages,
            self.phases,
        )
        update = GroupUpdate(energy, self._pi(energy, explorer), {})
        judged = (pixels, scores, advantage, update, explorer)
        folder = show_group(out, 0, self.pipeline, rollout, *judged)
        kind, fork, script = type(explorer).__name__, rollout.window.fork, self.script
        facts = about_video(script, self.config.seed, self.label, explorer=kind, fork=fork)
        write_beside(folder / "explore.json", facts)
        head = f"{self.label}, {kind}, fork at block {fork} of {script.blocks}: "
        say = self.progress.say
        say(head + " | ".join(script.texts))
        if said:
            say(said)
        say(branch_table(rollout, scores, advantage.values, energy))
        say(f"pixel diversity of the branches: {pixel_diversity(pixels[:-1]):.5f}")
        say(f"written to {Path(folder).resolve()}: grid.mp4, routing.png, group.json, explore.json")

    def _pi(self, energy: torch.Tensor, explorer: Explorer) -> torch.Tensor:
        """pi of the branches; even where they have no energy, which is 0 or rounding then."""
        import torch

        if explorer.deterministic_replay:
            return torch.full_like(energy, 1 / len(energy))
        return torch.softmax(-energy / self.config.temperature.resolve(energy), dim=0)


def shared_forks(
    recipe: Explorer, shown: Explorer, script: Script, geometry: Geometry
) -> list[int]:
    """Blocks of a story at which both the recipe's explorer and the one that is shown may fork.

    ValueError where there is none.
    """
    from kvpo.method.explorers import forks_of

    of_recipe, of_shown = (forks_of(e, script, geometry) for e in (recipe, shown))
    both = [fork for fork in of_recipe if fork in of_shown]
    if not both:
        raise ValueError(
            f"the recipe's explorer forks script {script.id!r} at blocks {of_recipe[0]} to {of_recipe[-1]}, the one that is shown at {of_shown}: there is no block for both; give one by --fork"
        )
    return both


def _refuse_tries(tries: int) -> None:
    if tries < 1:
        raise ValueError(f"--tries {tries} must be 1 or more")


def widest_fork(
    forks: Sequence[int], tries: int, diversity: Callable[[int], float], progress: Progress
) -> tuple[int, str]:
    """Choose the one of a few ``forks`` whose branches differ most, and say so in a line.

    The few are evenly spread. A window in which the story hides its objects shows nine equal pictures, whatever the branches
    remember. Only pixels are looked at, never a reward or what the story knows; training draws its
    forks blindly all the same, or where `data.open_forks` lets it.
    """
    _refuse_tries(tries)
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
    from kvpo.generators.geometry import pixel_span
    from kvpo.method.score import decode, pixel_diversity

    first, stop = pixel_span((rollout.window.fork, rollout.window.stop), pipeline.geometry)
    return pixel_diversity(decode(pipeline, rollout, stop - first)[:-1, : stop - first])
