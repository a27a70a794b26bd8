"""The way from a folder's choices to a generator aligned to them: fit, align, compare.

tastes/NAME/       preferences that were fitted
recipes/NAME.yaml  the settings of each run
blind/NAME/        blind comparisons of runs with their start, see `kvpo.studio.blind`

The work is done by processes (`kvpo.studio.children`); what is told of it is read from files.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from kvpo.common.files import in_words
from kvpo.common.rng import stream
from kvpo.policy.checkpoint import checkpoints
from kvpo.preference.records import UNNAMED
from kvpo.preference.saved import ABOUT, read
from kvpo.studio.aligning import align_to, studio_recipe, write_recipe
from kvpo.studio.blind import Blind, comparison
from kvpo.studio.children import KINDS, Child, Children
from kvpo.studio.library import check_name, read_preferences
from kvpo.studio.programs import Programs
from kvpo.studio.runs import Runs, is_run_folder


class Learning:
    """The preferences, runs and comparisons of a studio's folder, and the requests for more."""

    def __init__(
        self,
        folder: Path,
        runs: Runs,
        generator: str,
        recipe: str = "",
        programs: Programs = Programs(),
    ):
        """``generator``, ``recipe``: as the studio was started with; ``programs``: what is called."""
        self.folder, self.runs = folder.resolve(), runs
        self.generator, self.recipe, self.programs = generator, recipe, programs
        self.children = Children(self.folder)

    # --- Requests ---

    def fit(self) -> None:
        """Fit a preference to the answers that are there now."""
        name = new_name("taste")
        out = self.folder / "tastes" / name
        self.children.start("fit", name, self.programs.fit(self.folder, out))

    def align(self) -> None:
        """Begin a run that trains on the newest preference.  ValueError where there is none."""
        if (taste := self.taste()) is None:
            raise ValueError("no preference has been fitted yet; press “Fit a preference” first")
        config = studio_recipe(self.recipe, self.generator)
        config = align_to(config, self.folder / "tastes" / taste["name"])
        name = new_name("aligned")
        recipe = write_recipe(config, self.folder / "recipes" / f"{name}.yaml")
        about = {"taste": taste["name"], "raters": taste["raters"]}
        self.children.start("align", name, self.programs.align(recipe, self._run(name)), about)

    def resume(self) -> None:
        """Go on with the run that was stopped.  ValueError where none was."""
        child = self.children.latest("align")
        if child is None or self._state(child) != "stopped":
            raise ValueError("no run was stopped that could be gone on with; begin a new one")
        argv = self.programs.resume(self._run(child.name))
        self.children.start("align", child.name, argv, child.about)

    def stop(self, kind: str) -> None:
        """Ask the work of a kind to end; a run saves what it has done first."""
        if kind not in KINDS:
            raise ValueError(f"{str(kind)[:20]!r} is no work; name one of {', '.join(KINDS)}")
        self.children.stop(kind)

    def compare(self) -> None:
        """Make the videos of a blind comparison of the latest run; one that was stopped goes on."""
        child = self.children.latest("align")
        if child is None or self._state(child) not in ("done", "stopped"):
            raise ValueError(
                "there is no run with trained weights yet; let the alignment end, or begin one"
            )
        latest = self.children.latest("compare")
        of_run = latest if latest and latest.about.get("run") == child.name else None
        if of_run is not None and self._state(of_run) == "stopped":
            self.children.start("compare", of_run.name, of_run.argv, of_run.about)
            return
        name, taste = new_name("blind"), str(child.about.get("taste", ""))
        raters = [text for text in child.about.get("raters", ()) if isinstance(text, str)]
        blind = comparison(self.folder, name)
        argv = self.programs.compare(self._run(child.name), fresh_seed(name), blind.folder)
        self.children.start("compare", name, argv, {"run": child.name})
        blind.begin(child.name, taste, raters)

    def answer(self, name: str, place: int, answer: str, rater: str) -> None:
        """Record an answer to a pair of a comparison."""
        if not isinstance(rater, str):
            raise ValueError("a rater's label is text; reload the page")
        self.blind(name).answer(place, answer, rater.strip() or UNNAMED)

    # --- What is there ---

    def blind(self, name: str) -> Blind:
        blind = comparison(self.folder, name)
        if not blind.folder.is_dir():
            raise ValueError(f"there is no comparison {name}; reload the page")
        return blind

    def taste(self) -> dict[str, Any] | None:
        """Name, raters and held-out numbers of the newest preference; None where there is none."""
        names = sorted(path.parent.name for path in self.folder.glob(f"tastes/*/{ABOUT}"))
        if not names:
            return None
        about = read(self.folder / "tastes" / check_name(names[-1])).about
        facts = {"name": names[-1], "sets": about["sets"], "numbers": about["numbers"]}
        return facts | {"raters": about["provenance"].get("raters", [])}

    def state(self) -> dict[str, Any]:
        """Describe everything to the page; what can not be read is named among the faults."""
        working = self.children.running()
        facts: dict[str, Any] = {
            "recipe": Path(self.recipe or self.generator).name,
            "working": working.kind if working else "",
            "faults": [],
        }
        facts |= {kind: self._work(kind) for kind in KINDS}
        parts: dict[str, Callable[[], Any]] = {"answers": self._answers, "taste": self.taste}
        parts |= {"run": self._run_facts, "blind": self._blind_facts}
        for name, part in parts.items():
            try:
                facts[name] = part()
            except (ValueError, OSError) as error:
                facts[name] = None
                facts["faults"].append(in_words(error))
        return facts

    def _run_facts(self) -> dict[str, Any] | None:
        run = self.children.latest("align")
        if run is None or not is_run_folder(self._run(run.name)):
            return None
        return self.runs.curves(run.name)

    def _blind_facts(self) -> dict[str, Any] | None:
        run, compared = self.children.latest("align"), self.children.latest("compare")
        if run is None or compared is None or compared.about.get("run") != run.name:
            return None
        return self.blind(compared.name).state()

    def _answers(self) -> dict[str, Any]:
        """Count the answers, their stories, and those of each rater."""
        lines, _ = read_preferences(self.folder)
        told = [line for line in lines if isinstance(line, dict)]
        raters = Counter(str(line.get("rater") or UNNAMED)[:64] for line in told)
        stories = len({str(line.get("story")) for line in told})
        return {"answers": len(told), "stories": stories, "by_rater": dict(raters)}

    def _work(self, kind: str) -> dict[str, Any]:
        child = self.children.latest(kind)
        if child is None:
            return {"state": "none", "name": "", "said": "", "far": "", "begun": ""}
        state = self._state(child)
        refusal = self.children.refusal(kind) if state == "failed" else ""
        said = refusal or ("" if state == "done" else self.children.last_line(kind))
        far = self.children.how_far(kind) if state == "working" else ""
        return {"state": state, "name": child.name, "said": said, "far": far, "begun": child.begun}

    def _state(self, child: Child) -> str:
        """State of a piece of work: working, done, stopped (it can go on) or failed."""
        if self.children.is_alive(child):
            return "working"
        # a report of a run that was stopped may have been written by hand
        ended_early = self.children.last_line(child.kind).startswith("stopped by")
        if self._result(child).is_file() and not ended_early:
            return "done"
        if child.kind == "align":
            begun = bool(checkpoints(self._run(child.name) / "checkpoints"))
        else:
            begun = child.kind == "compare" and not self.children.refusal(child.kind)
        return "stopped" if begun else "failed"

    def _result(self, child: Child) -> Path:
        """File that is written last when a piece of work has done what it should."""
        return {
            "fit": self.folder / "tastes" / child.name / ABOUT,
            "align": self._run(child.name) / "report.html",
            "compare": self.folder / "blind" / child.name / "page" / "index.html",
        }[child.kind]

    def _run(self, name: str) -> Path:
        return self.runs.folder.resolve() / name


def new_name(kind: str) -> str:
    """Name of something new: what it is, when it began, and something random."""
    return f"{kind}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"


def fresh_seed(name: str) -> int:
    """Seed of a comparison's noise, drawn by its name, so no two comparisons share it."""
    return int(torch.randint(2**31, (), generator=stream(0, "studio", "fresh", name)))
