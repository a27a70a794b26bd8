"""A run as its folder has it: begun there or gone on with, and saved there.

A folder that is another run's is refused.

start.safetensors                          where it starts from weights of another run (`kvpo.runs.start_weights`)
config.resolved.yaml, environment.json     before the first step
checkpoints/                               `kvpo.policy.checkpoint`, written beside the training by `kvpo.policy.saving`
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import yaml

from kvpo.common.environment import environment, packages
from kvpo.common.files import only_writer, write_atomic
from kvpo.config import RunConfig, differences, from_dict, to_dict
from kvpo.distributed.ranks import restarted
from kvpo.policy.checkpoint import (
    checkpoints,
    load_checkpoint,
    newest_whole,
    read_state,
    read_tensors,
)
from kvpo.policy.saving import Saver
from kvpo.runs.build import trained_families
from kvpo.runs.loading import folder_of
from kvpo.runs.parts import Parts
from kvpo.runs.start_weights import FILE, Origin, keep_start

MAY_CHANGE = (
    "steps: ",
    "show_every",
    "trackers",
    "patience",
    "evaluate.",
    "sentinels.",
    "agreement.",
    "checkpoint.",
    "branch_parallel",
    "policy.shard",
)
"""Settings that a resumed run may change, because training does not depend on them.

How far it goes (``steps``) may change freely, the others by ``--override``.
"""


def restarted_here(out: Path) -> bool:
    """True where torchrun restarts these processes after a failure of the very run in ``out``."""
    if not restarted() or not (out / "config.resolved.yaml").exists():
        return False
    begun = json.loads((out / "environment.json").read_text())
    return os.environ.get("TORCHELASTIC_RUN_ID") in (
        facts.get("torchrun") for facts in (begun, *begun.get("resumed", []))
    )


def check_place(out: Path, resume: bool) -> None:
    """Check that a run can begin in its folder, or go on there, before anything is loaded.

    Raises FileNotFoundError or ValueError where it can not.  The first process alone looks: others
    may see a shared folder late.
    """
    if os.environ.get("RANK", "0") != "0" or restarted():
        return
    if (there := (out / "config.resolved.yaml").exists()) and not resume:
        raise _holds_a_run(out)
    if resume and not there:
        raise _no_run(out)


def _no_run(out: Path) -> FileNotFoundError:
    return FileNotFoundError(f"{out} holds no run to resume; start one without --resume")


def _holds_a_run(out: Path) -> ValueError:
    return ValueError(
        f"{out} already holds a run; go on with it by --resume, or choose another folder by --out"
    )


class RunState:
    """Progress of a run, in memory and in its folder.

    A context manager: inside, and once the run is begun, no other process writes to the folder.
    """

    def __init__(self, parts: Parts, out: Path):
        self.config, self.progress, self.ranks = parts.config, parts.progress, parts.ranks
        self.start = parts.start
        self.pipeline, self.policy, self.source = parts.pipeline, parts.policy, parts.source
        self.optimizer, self.agreement = parts.updater.optimizer, parts.agreement
        self.out = out
        keep = self.config.checkpoint.keep
        self.saver = Saver(
            out / "checkpoints",
            keep,
            self.policy,
            self.config.patience,
            # no folder elsewhere has what an adapter would have to be put on
            elsewhere=not (self.start.of_run and self.config.policy.train == "lora"),
        )
        self._held = ExitStack()
        """The folder's lock."""
        self.moved: tuple[str, ...] = ()
        """Settings that name a file which lies elsewhere now and is the same."""
        self.begun = False
        """True once the folder is the run's: begun there, or gone on with."""
        self.done = self.saved = 0
        """Steps in all, and in the last checkpoint."""
        self.midway = False
        """True while the weights are between two updates of one step.

        As they are then they belong to no step, and are not saved.
        """

    def begin(self, resume: bool, override: bool) -> int:
        """Make the folder, or read its newest checkpoint; the steps that are done. All ranks enter.

        ``override``: all settings in `MAY_CHANGE` may be others than the run's, not ``steps``
        alone. ValueError where the folder is another run's.
        """
        self.done = self.saved = self._resumed(override) if resume else 0
        if not resume:
            self.ranks.only_first(self._write_beginning)
        self.begun = True
        return self.done

    def __enter__(self) -> RunState:
        return self

    def __exit__(self, *error) -> bool | None:
        return self._held.__exit__(*error)

    def save(self, best: int) -> None:
        """Begin a checkpoint, unless the last one is of now, or the weights are broken.

        ``best``: step of an earlier checkpoint that stays.
        """
        if self.done > self.saved and not self.policy.broken:
            self.saver.begin(
                self.done, self.optimizer, self._identity, best, self.agreement.state()
            )
            self.saved = self.done

    def save_what_is_left(self, best: int) -> None:
        """Save any unsaved steps and wait for the write.

        Nothing is saved between a step's inner updates, where the weights are no step's: the run
        goes on from the checkpoint before.
        """
        if self.midway:
            self.progress.say(
                f"step {self.done} ended between its inner updates, and its weights are not saved: what is there is the checkpoint after step {self.saved}"
            )
        else:
            self.save(best)
        self.saver.wait()

    def _resumed(self, override: bool) -> int:
        if not self.ranks.gather((self.out / "config.resolved.yaml").exists())[0]:
            raise _no_run(self.out)
        self.ranks.only_first(self._lock)
        self.moved = self.ranks.gather(self._moved() if self.ranks.first else ())[0]
        self._override(
            self._changed(
                yaml.safe_load((self.out / "config.resolved.yaml").read_text()),
                to_dict(self.config),
            ),
            override,
        )
        step = self._load()
        self.ranks.only_first(lambda: self._write_start(step))
        return step

    def _load(self) -> int:
        """Step of the newest checkpoint that can be read, whose weights are put back."""
        if not (
            found := self.ranks.gather(checkpoints(self.out / "checkpoints"))[0]
        ):  # as the first rank sees them: shared folders lag
            self.progress.say(f"{self.out} has no checkpoint yet: starting again from step 0")
            return 0
        newest = None
        with self.ranks.together():
            if self.ranks.first:
                newest = newest_whole(found, self.progress.say)
        newest = self.ranks.gather(newest)[0]
        assert newest is not None, "newest_whole raises where there is none"
        state = read_state(newest)
        self._refuse_renamed(state["config"])
        self._changed(state["config"], self._identity)
        if state["step"] > self.config.steps:
            raise ValueError(
                f"{newest} is beyond steps = {self.config.steps}; set steps to {state['step']} or more, or start a new run by --out"
            )
        step = load_checkpoint(newest, self.policy, self.optimizer)
        others = differences(state.get("packages", packages()), packages())
        self.agreement.restore(read_tensors(newest, "agreement."))
        self.progress.say(
            f"resumed from {newest}"
            + (
                f", which was written with other versions, {'; '.join(others)}: numbers may round otherwise"
                if others
                else ""
            )
        )
        return step

    def _refuse_renamed(self, stored: dict[str, Any]) -> None:
        """Raise ValueError for a prompt file with another name, where ids are made of the name."""
        old, new = Path(stored["data"]["prompts"]).name, self.config.data.prompts
        if (
            "data.prompts" in self.moved
            and old != Path(new).name
            and stored.get("prompts") != self._identity.get("prompts")
        ):
            raise ValueError(
                f"{new} is the prompt file of {self.out} by another name, and prompts without an id are called by the file's, which names their random streams; call it {old} again"
            )

    def _moved(self) -> tuple[str, ...]:
        """Settings that name a prompt file, under whatever name, with the content the run knows.

        That is its content when the run was begun, or last gone on with.
        """
        path = self.out / "environment.json"
        begun = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        written = [facts.get("prompt_files") for facts in (begun, *begun.get("resumed", []))]
        stored = next((files for files in reversed(written) if files), None)
        return (
            tuple(
                name
                for name, digest in _prompt_files(self.config).items()
                if digest == stored.get(name)
            )
            if stored
            else self._moved_of_old_run()
        )

    def _moved_of_old_run(self) -> tuple[str, ...]:
        """The settings of `_moved` for a run that is older than the digests of prompt files.

        Checkpoints of such a run have a digest of the scripts, which is compared instead.
        """
        if self.source.scripts is None or not (found := checkpoints(self.out / "checkpoints")):
            return ()
        digest = read_state(found[-1])["config"].get("prompts")
        return ("data.prompts",) if digest == _digest_of_text(repr(self.source.scripts)) else ()

    def _write_beginning(self) -> None:
        if (self.out / "config.resolved.yaml").exists():
            raise _holds_a_run(self.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self._lock()
        self._keep_start()
        self._write_start(0)

    def _keep_start(self) -> None:
        """Keep the weights of another run, if the run starts from such: they may change there."""
        path, weights = self.out / FILE, self.start.weights
        path.unlink(missing_ok=True)  # of a beginning that was broken off
        if weights is not None:
            spec, folder = self.config.pipeline, self.start.folder
            below = "mini" if folder == folder_of("mini") else str(folder)
            families = tuple(sorted(trained_families(spec)))
            origin = Origin(spec, weights.checkpoint.name, below, families)
            keep_start(path, self.pipeline, origin)

    def _write_start(self, step: int) -> None:
        """Write the settings, and the environment in which the run goes on from ``step``.

        Its code and versions may not be those it was begun with.
        """
        path, facts = self.out / "environment.json", environment(self.pipeline.generator.device)
        facts["prompt_files"] = _prompt_files(self.config)
        if step and path.exists():
            begun = json.loads(path.read_text())
            facts = begun | {"resumed": [*begun.get("resumed", []), {"step": step, **facts}]}
        write_atomic(path, json.dumps(facts, indent=1) + "\n")
        write_atomic(
            self.out / "config.resolved.yaml", yaml.safe_dump(to_dict(self.config), sort_keys=False)
        )

    def _lock(self) -> None:
        self._held.enter_context(only_writer(self.out))

    def _override(self, changed: list[str], override: bool) -> None:
        asked = [d for d in changed if not d.startswith("steps: ")]
        if asked and not override:
            raise ValueError(
                f"{self.out} was run with other settings, {'; '.join(asked)}; resume with its own, or let them change from here on by --override"
            )
        if changed:
            self.progress.say(f"from here on {'; '.join(changed)}")

    def _changed(self, stored: dict[str, Any], new: dict[str, Any]) -> list[str]:
        """Names of the settings that differ and may; ValueError where one differs that may not."""
        settings, others = (
            {k: v for k, v in stored.items() if (k in self.config.__dataclass_fields__) == wanted}
            for wanted in (True, False)
        )
        # a setting that is newer than the run has its default: what the run did
        old = to_dict(from_dict(settings)) | others
        changed = differences(old, {name: value for name, value in new.items() if name in old})
        changed = [
            d for d in changed if not d.startswith(tuple(f"{setting}: " for setting in self.moved))
        ]
        if fixed := [d for d in changed if not d.startswith(MAY_CHANGE)]:
            raise ValueError(
                f"{self.out} was run with other settings, {'; '.join(fixed)}; resume with its own, or start a new run by --out"
            )
        return changed

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        """Everything that a checkpoint belongs to; all ranks enter.

        The settings, the world its scripts come from, the weights it started from (an adapter's
        own say nothing of the backbone below it), and the decoders that make pixels of latents.
        """
        prompts = (
            {"prompts": _digest_of_text(repr(self.source.scripts))}
            if self.source.scripts is not None
            else {}
        )
        trained = (w.float() for w in self.policy.layout.whole(self.policy.reference))
        frozen = (p.detach() for p in self.pipeline.generator.parameters() if not p.requires_grad)
        weights = {
            "start_weights": _digest(chain(trained, frozen)),
            "decoder": _digest(p.detach() for p in self.pipeline.vae.parameters()),
        }
        if self.pipeline.preview is not None:
            parameters = self.pipeline.preview.parameters()
            weights["preview"] = _digest(p.detach() for p in parameters)
        return (
            to_dict(self.config)
            | prompts
            | weights
            | {"first_script": _digest_of_text(repr(self.source.script(0, 0)))}
        )


def _prompt_files(config: RunConfig) -> dict[str, str]:
    """Setting -> digest of the file that it names."""
    named = {"data.prompts": config.data.prompts, "evaluate.prompts": config.evaluate.prompts}
    return {
        name: hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()
        for name, path in named.items()
        if Path(path).is_file()
    }


def _digest(weights: Iterable[torch.Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for w in weights:
        digest.update(w.flatten().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _digest_of_text(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
