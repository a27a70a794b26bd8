"""The package as a library: what the commands do, as functions that return what they found.

    align       train a generator on rewards          kvpo align
    load        a generator by its name
    generate    a video of a story                    kvpo generate
    evaluate    measure a generator, or compare two   kvpo evaluate
    explore     the branches of one story             kvpo explore

Defaults, random streams and errors are the commands'.  Nothing here needs the main thread.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from kvpo.api.defaults import OUT, SCRIPTS
from kvpo.api.records import Evaluation, Exploration, Mean, Run, Video
from kvpo.api.settings import settle
from kvpo.api.shared import (
    check_scripts,
    geometry_of,
    loaded,
    measured,
    score_group,
    shown_explorer,
)
from kvpo.common.environment import pick_device
from kvpo.common.files import try_folder
from kvpo.common.progress import Progress
from kvpo.common.timing import Phases
from kvpo.common.wording import count_of
from kvpo.config import DataConfig, RunConfig
from kvpo.distributed.ranks import leave
from kvpo.distributed.signals import Stopped, in_main_thread
from kvpo.evaluation.evaluate import EvaluateConfig, compare, kinds_of, means
from kvpo.generators.generate import streamed
from kvpo.generators.geometry import Geometry, block_at, blocks_at
from kvpo.generators.pipeline import Pipeline
from kvpo.generators.sampler import SAMPLERS
from kvpo.method.forks import check_fork
from kvpo.method.prompt_files import readable
from kvpo.method.prompts import even_starts, starts_at
from kvpo.method.rollout import roll_out
from kvpo.method.score import pixel_diversity
from kvpo.planning.missing import refuse_missing
from kvpo.report.read_run import Row, read_evaluations
from kvpo.rewards.scorer import load_rewards
from kvpo.runs.build import evaluation_scripts, judges, trained_families
from kvpo.runs.loading import load_generator, precision
from kvpo.runs.state import check_place, restarted_here
from kvpo.train import Alignment
from kvpo.types import Script

Record = TypeVar("Record", Mean, Row)

_preparing = threading.Lock()
"""Lock that is held until a run has its rewards.

Till then one that was given as an object is known by its name only, and another thread may give
another object of that name.
"""


def align(
    recipe: str | Path | RunConfig,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    override: bool = False,
    **settings: Any,
) -> Run:
    """Align a generator to rewards, as `kvpo align`: train, checkpoint, evaluate, write a report.

    ``recipe``: a shipped one by its name, a YAML file, or a `RunConfig`.  ``out``: the run's
    folder, runs/align by default.  ``settings``: any of the recipe's, by section
    (``optimizer={"lr": 1e-4}``) or dotted (``**{"optimizer.lr": 1e-4}``).  ``rewards`` is a list
    of names, `RewardEntry`s, mappings (``{"name": ..., "weight": 0.5}``), and in place of any name
    a Python object: a `Reward`, or a function of a `VideoBatch` that returns one number a clip.

    ``resume`` goes on from the newest checkpoint in ``out``; with ``override`` settings that
    training does not depend on may be others than the run's.

    In the main thread ctrl-C or SIGTERM ends the step at work, saves, and then reaches the program
    as it would have without a run (KeyboardInterrupt for ctrl-C).  In another thread signals are
    left alone.

    Raises:
        ValueError: an unknown setting (with the nearest known one), an illegal value, a folder
            that holds another run, a reward that fails.
        FileNotFoundError: a recipe, a generator or a run to resume that is not there.
        FloatingPointError: a loss or gradient that is not finite; the steps before are saved.

    >>> run = kvpo.align("mini", out="runs/a", steps=30)                          # doctest: +SKIP
    >>> run.evaluation["mean of trained"].diff                                    # doctest: +SKIP
    0.0021
    """
    folder = Path(OUT if out is None else out)
    if override and not resume:
        raise ValueError(
            "override lets a resumed run take other settings, and without resume a new run begins; give both, or leave it out"
        )
    progress, joined = Progress(folder / "logs"), dist.is_initialized()
    try:
        with _preparing:
            config = settle(recipe, settings)
            try_folder(folder, "give another place by out, or make this one writable")
            check_place(folder, resume)
            refuse_missing(config, folder)
            run = Alignment(config, folder, progress)
        stopped = _train(run, resume, override)
    finally:
        if not joined:  # a program's own process group stays
            leave()
    if stopped and in_main_thread():
        signal.raise_signal(signal.Signals[stopped])  # the program's own handlers are back
    return Run(folder, folder / "report.html", run.done, _last_evaluation(folder, run.done))


def _train(run: Alignment, resume: bool, override: bool) -> str:
    """Run to the end; the name of the signal that stopped it before, or ""."""
    again = run.parts.ranks.gather(restarted_here(run.out))  # torchrun starts anew what has crashed
    try:
        run.run(resume or any(again), override)
    except Stopped as stop:
        say = f"stopped by {stop}; {run.done} steps are done and saved. Go on with resume=True"
        run.progress.say(say)
        return str(stop)
    return ""


def _last_evaluation(run: Path, done: int) -> Evaluation | None:
    """The comparison of the averaged weights with the start weights after ``done`` steps."""
    for found in read_evaluations(run)[0]:
        if found.path.stem == f"ema-step-{done:06d}":
            labels, facts = (found.label_a, found.label_b), (found.videos, found.seed)
            return Evaluation(*labels, found.rows, found.scripts, *facts)
    return None


def load(generator: str | Path, *, device: str = "auto", dtype: str = "") -> Pipeline:
    """A generator by its name, as `kvpo generate` loads it.

    ``generator``: a pipeline folder in diffusers layout, "mini", or the weights of a run: "RUN",
    "RUN:ema", "RUN:online", "RUN:start", "RUN:best".  ``dtype``: "float32" or "bfloat16"; by
    default a run's own, else bfloat16 on a GPU and float32 on a CPU.

    Raises:
        FileNotFoundError, ValueError: what is missing or broken, in one line that names the file.

    >>> kvpo.load("mini").geometry.fps
    16
    """
    chosen, spec = pick_device(device), str(generator)
    if dtype not in ("", "float32", "bfloat16"):
        raise ValueError(f"dtype = {dtype!r} is unknown; use float32, bfloat16, or leave it out")
    dtype = precision(spec, chosen, dtype)
    pipeline, _ = load_generator(spec, chosen, dtype or "float32", dtype)
    pipeline.spec = spec
    return pipeline


def generate(
    generator: str | Path | Pipeline,
    prompts: str | Sequence[str] | Script,
    seconds: float | None = None,
    *,
    at: Sequence[float] | None = None,
    seed: int = RunConfig.seed,
    sampler: str | None = None,
    device: str = "auto",
) -> Video:
    """The video of one story, pixel for pixel that of `kvpo generate` with the same seed.

    ``prompts``: the story's prompts in order; one alone may be a string; a `Script` also says where
    they change.  ``seconds``: the least length (videos are whole blocks), else the command's.
    ``at``: the seconds at which the second, third, ... prompt takes over; by default evenly spread.
    ``sampler``: "renoise" or "ode".  ``device`` is where a generator that is named is loaded.

    Returns frames, uint8 RGB [T, 3, H, W], with their rate; ``save(path)`` writes an MP4.

    Raises:
        ValueError: prompts that do not fit into the video or its text encoder, an unknown sampler.
        FileNotFoundError: a generator that is not there.

    >>> video = kvpo.generate("mini", "a small red circle moves right slowly", seconds=1)
    >>> video.frames.shape, video.frames.dtype, video.fps
    (torch.Size([21, 3, 64, 64]), torch.uint8, 16)
    """
    chosen = RunConfig.sampler if sampler is None else sampler
    if chosen not in SAMPLERS:
        raise ValueError(f"sampler = {chosen!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    if type(seed) is not int:
        raise ValueError(f"seed = {seed!r} must be a whole number")
    script = _story(prompts, seconds, at, geometry_of(generator))
    check_scripts(generator, [script], Progress().warn)
    pipeline = generator if isinstance(generator, Pipeline) else load(generator, device=device)
    name = ("generate", script.id)
    frames = torch.cat(list(streamed(pipeline, SAMPLERS[chosen], [script], seed, [name])), dim=1)[0]
    made_by = pipeline.spec or pipeline.folder
    return Video(frames, pipeline.geometry.fps, script, seed, made_by, chosen)


def _story(
    prompts: str | Sequence[str] | Script,
    seconds: float | None,
    at: Sequence[float] | None,
    geometry: Geometry,
) -> Script:
    """The prompts as a script of the length asked for; ValueError where they make none."""
    if isinstance(prompts, Script):
        if seconds is not None or at:
            raise ValueError("a Script has its length and its switches; leave out seconds and at")
        for text in prompts.texts:
            readable(text)
        return prompts
    if not isinstance(prompts, (str, Sequence)) or isinstance(prompts, bytes):
        raise ValueError(f"prompts = {prompts!r} must be a text, a list of texts, or a Script")
    texts = tuple(map(readable, [prompts] if isinstance(prompts, str) else prompts))
    if not texts:
        raise ValueError("prompts are empty; give at least one prompt")
    times = _seconds("at", () if at is None else at)
    if len(times) >= len(texts):
        raise ValueError(
            f"at = {times} is too long: {count_of(len(texts), 'prompt')} can use {count_of(len(texts) - 1, 'time')}; drop times or add prompts"
        )
    blocks = DataConfig.blocks
    if seconds is not None:
        (length,) = _seconds("seconds", [seconds])
        blocks = block_at(length, geometry, up=True)
    switches = blocks_at(times, geometry)
    starts = starts_at(switches, len(texts)) if switches else even_starts(len(texts), blocks)
    return Script("story", texts, starts, blocks)


def _seconds(name: str, values: Sequence[float]) -> tuple[float, ...]:
    """Times of a video; ValueError for what is no list of numbers."""
    if not isinstance(values, Sequence) or not all(isinstance(v, (int, float)) for v in values):
        raise ValueError(f"{name} = {values!r} must be in seconds: numbers, several in a list")
    return tuple(values)


def evaluate(
    generator: str | Path | Pipeline,
    against: str | Path | Pipeline | None = None,
    *,
    recipe: str | Path | RunConfig = "mini",
    prompts: str | Path = "",
    scripts: int = SCRIPTS,
    seeds: int = EvaluateConfig.seeds,
    seed: int = EvaluateConfig.seed,
    blocks: int | None = None,
    device: str = "auto",
) -> Evaluation:
    """Measure a generator on fixed scripts and noise, as `kvpo evaluate`; prints as a table.

    ``against``: another generator on the same scripts and noise; rows then hold paired
    differences.  ``recipe``: where rewards, evaluators, sampler and scripts are taken from.
    ``prompts``: a prompt file to measure on, else what the recipe evaluates on.  ``seeds``: videos
    of every script, each with noise of its own.  ``seed`` names the scripts' and the noise's
    streams.  ``blocks``: length of the videos, else the recipe's.

    Returns a row a component, each with a 95 % bootstrap interval over scripts.  Only rows of kind
    "heldout" are second opinions: the weights of a `Pipeline` that `load` did not make have a past
    that is not known here.

    Raises:
        ValueError: fewer than 2 scripts, a reward that can not be made, an illegal setting.
        FileNotFoundError: a generator, a recipe or a prompt file that is not there.

    >>> found = kvpo.evaluate("mini", scripts=2, blocks=4)
    >>> 0 < found["VQ"].low <= found["VQ"].mean <= found["VQ"].high < 1
    True
    """
    changes: dict[str, int | str] = {"scripts": scripts, "seeds": seeds, "seed": seed, "videos": 0}
    changes |= {"prompts": str(prompts)} if prompts else {}
    length = {} if blocks is None else {"data.blocks": blocks}
    config, where = settle(recipe, {"evaluate": changes, **length}), pick_device(device)
    stories, progress = evaluation_scripts(config), Progress()
    generators = [generator] if against is None else [generator, against]
    for one in generators:
        check_scripts(one, stories, progress.warn)
    rewards = load_rewards(config.rewards, where)
    families = {f for one in generators for f in trained_families(_spec(one))}
    kinds = kinds_of(rewards, seeds, families)
    asked = (config, stories, rewards, where, progress)
    facts = (len(stories), seeds, seed)
    (own, label), *others = [measured(one, *asked) for one in generators]
    if not others:
        alone = tuple(_record(Mean, row) for row in means(own, kinds))
        return Evaluation(label, "", alone, *facts)
    ((other, other_label),) = others
    rows = tuple(_record(Row, row) for row in compare(own, other, kinds))
    return Evaluation(label, other_label, rows, *facts)


def _record(kind: type[Record], row: dict[str, Any]) -> Record:
    """Turn a table's row into a record.

    A value that could not be measured is None in the one and NaN in the other.
    """
    known = {field.name for field in fields(kind)}
    values: dict[str, Any] = {k: math.nan if v is None else v for k, v in row.items() if k in known}
    return kind(**values)


def explore(
    recipe: str | Path | RunConfig,
    generator: str | Path | Pipeline | None = None,
    *,
    script: int | Script = 0,
    by: Literal["recipe", "kv_routing", "start_noise", "renoise", "sde", "prompt"] = "recipe",
    fork: int | None = None,
    **settings: Any,
) -> Exploration:
    """The branches of one story and what the rewards say of them, as `kvpo explore`.

    ``generator``: whose weights, else the recipe's pipeline.  ``script``: a story, or the number
    of one among the recipe's evaluation scripts.  ``by``: which explorer, in the recipe's window.
    ``fork``: the block at which branches part, else drawn (the command tries a few blocks).
    ``settings``: as in `align`.

    Returns pixels from the fork on (uint8 RGB [B, T, 3, H, W], G branches and then the anchor),
    their rewards, advantages and energies, and the past frames that each branch reads; prints as a
    table.

    Raises:
        ValueError: an unknown setting, a fork or script that does not exist, too few rewards.
        FileNotFoundError: a generator or a recipe that is not there.

    >>> found = kvpo.explore("mini", fork=4, data={"blocks": 6}, rollout={"branches": 2})
    >>> found.pixels.shape, [len(plan.frames) for plan in found.plans]
    (torch.Size([3, 24, 3, 64, 64]), [4, 4, 0])
    """
    if by not in ("recipe", "kv_routing", "start_noise", "renoise", "sde", "prompt"):
        raise ValueError(
            f"by = {by!r} is no explorer; use recipe, kv_routing, start_noise, renoise, sde or prompt"
        )
    with _preparing:
        config = settle(recipe, settings)
        device, phases = pick_device(config.device), Phases()
        (story, name), explorer = _chosen(script, config), shown_explorer(config, by)
        shown = config.pipeline if generator is None else generator
        check_scripts(shown, [story], Progress().warn)
        check_fork(explorer, story, geometry_of(shown), fork)
        trained_only = replace(config, rewards=tuple(config.rewards_of("train")))
        rewards, rule = judges(trained_only, device)
    pipeline, label = loaded(shown, device, config)
    texts = dict(zip(story.texts, pipeline.encode_text(story.texts)))
    streams = (config.seed, ("explore", name), phases, fork)
    rollout = roll_out(
        pipeline, SAMPLERS[config.sampler], explorer, config.rollout, story, texts, *streams
    )
    table, pixels, advantage, energies = score_group(
        pipeline, rollout, texts, config, rewards, rule, phases
    )
    diversity = pixel_diversity(pixels[:-1])
    found = (table, advantage.values, energies, rollout.plans, diversity, rollout)
    return Exploration(label, pixels, pipeline.geometry.fps, *found)


def _chosen(script: int | Script, config: RunConfig) -> tuple[Script, int | str]:
    """The story, and what names its streams."""
    if isinstance(script, Script):
        return script, script.id
    scripts = evaluation_scripts(config)
    if not 0 <= script < len(scripts):
        last = len(scripts) - 1
        raise ValueError(
            f"script = {script} does not exist: the recipe's are 0 to {last}; give one of them"
        )
    return scripts[script], script


def _spec(generator: str | Path | Pipeline) -> str:
    """The name that a generator was asked for by; "" where that is not known."""
    return generator.spec if isinstance(generator, Pipeline) else str(generator)
