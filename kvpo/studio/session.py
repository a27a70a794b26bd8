"""One tab of the studio: what it asks is done in order, and never faster than it looks.

The tab's messages go into an inbox; one task, `Session.drive`, takes them out and makes blocks
between them. A block is begun only when the tab has taken all but `AHEAD` of those before it, so a
slow reader makes nothing pile up, and a tab that is gone ends the work at the next block.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from kvpo.common.files import first_line, in_words
from kvpo.common.provenance import about_video, write_beside
from kvpo.common.video import Mp4Writer
from kvpo.common.wording import count_of
from kvpo.generators.pipeline import Pipeline
from kvpo.method.prompts import readable
from kvpo.studio.images import packed
from kvpo.studio.library import Library, check_name
from kvpo.studio.live import Live, Made, check_prompt, start, strange_words
from kvpo.studio.tree import EXPLORERS, MOST_BRANCHES, Fork, Tree, new_tree
from kvpo.studio.turns import Place, Turns
from kvpo.types import Script

AHEAD = 2
"""Blocks on their way to a tab that it has not yet begun to show."""
PATIENCE = 5.0
"""Seconds that a tab which takes no blocks keeps the generator from others."""
MOST_WAITING = 32
"""Messages of a tab that may wait; a tab that sends more is closed."""
STOPPING = ("pause", "leave")
"""Messages that end a replay, a fork or a saving at the next block."""


@dataclass
class Studio:
    """Everything that the tabs of one server share."""

    pipeline: Pipeline
    label: str
    library: Library
    worker: Executor
    """One thread, in which all generation happens."""
    blocks: int
    cache_frames: int
    budget: int
    sampler: str = "renoise"
    branches: int = 8
    turns: Turns = field(default_factory=Turns)
    tabs: int = 0

    def live(self, tree: Tree, budget: int | None = None) -> Live:
        kept = self.budget if budget is None else budget
        return Live(self.pipeline, tree, self.blocks, self.cache_frames, kept)

    def closed_tab(self) -> None:
        self.tabs -= 1

    def hello(self) -> dict[str, Any]:
        """Describe the generator and what may be asked of it."""
        g = self.pipeline.geometry
        return {
            "is": "hello",
            "generator": self.label,
            "fps": g.fps,
            "block": g.block,
            "blocks": self.blocks,
            "ahead": AHEAD,
            "explorers": {name: kind().window_blocks for name, kind in EXPLORERS.items()},
            "branches": self.branches,
            "most_branches": MOST_BRANCHES,
            "stories": self.library.stories(),
        }


class Session:
    """A tab, from its socket's opening to its end."""

    def __init__(
        self,
        studio: Studio,
        send_json: Callable[[Mapping[str, Any]], Awaitable[None]],
        send_bytes: Callable[[bytes], Awaitable[None]],
    ):
        self.studio, self.library = studio, studio.library
        self.send_json, self.send_bytes = send_json, send_bytes
        self.inbox: deque[dict[str, Any]] = deque()
        self.changed = asyncio.Event()
        self.place: Place | None = None
        self.live: Live | None = None
        self.playing = self.gone = False
        self.sent = self.seen = 0
        self.rater = "rater"
        self.before: tuple[int, int] = (0, 0)
        """Node and block that were left for a fork."""
        self.queued: tuple[int, int] | None = None
        """Places before and behind this one, not yet told."""

    # --- What comes in ---

    def receive(self, message: Any) -> None:
        """Take a message of the tab.  ValueError for one that no page of ours sends."""
        if not isinstance(message, dict) or not isinstance(message.get("do"), str):
            raise ValueError('a message is an object with a key "do"; reload the page')
        if message["do"] == "seen":
            if type(count := message.get("blocks")) is int and self.seen < count <= self.sent:
                self.seen = count
        elif len(self.inbox) >= MOST_WAITING:
            raise ValueError(f"more than {MOST_WAITING} messages are waiting; reload the page")
        else:
            self.inbox.append(message)
        self.changed.set()

    def leave(self) -> None:
        """End the work at the next block: the tab is gone."""
        self.gone = True
        self.changed.set()

    # --- What is done ---

    async def drive(self) -> None:
        """Do what the tab asks, until it is gone."""
        try:
            await self._serve()
        finally:
            self._give_turn()

    async def _serve(self) -> None:
        await self.send_json(self.studio.hello())
        while not self.gone:
            if self.inbox:
                message = self.inbox.popleft()
                await self._guarded(lambda: self._obey(message))  # noqa: B023, called at once
            elif self.playing:
                await self._guarded(self._play, stops=True)
            else:
                self._give_turn()
                await self._until(lambda: bool(self.inbox) or self.gone, lambda: False)
        self._give_turn()
        if self.live is not None:
            await self._guarded(self._keep)

    async def _guarded(self, call: Callable[[], Awaitable[None]], stops: bool = False) -> None:
        """Do something; what goes wrong is said in the page, and the story stays.

        ``stops``: a fault ends the playing.
        """
        try:
            await call()
        except (ValueError, OSError, FloatingPointError) as error:
            await self._fail(in_words(error), stops)
        except Exception as error:
            traceback.print_exc()
            await self._fail(
                f"the studio failed ({type(error).__name__}: {first_line(error)}); the story is kept, play goes on from its last whole block",
                True,
            )

    async def _fail(self, message: str, stops: bool) -> None:
        self.playing = self.playing and not stops
        await self._tell({"is": "error", "message": message})
        if self.live is not None:
            await self._tell(self._story())

    async def _tell(self, message: Mapping[str, Any]) -> None:
        if not self.gone:
            await self.send_json(message)

    async def _obey(self, message: dict[str, Any]) -> None:
        do = message.pop("do")
        method = getattr(self, f"do_{do}", None) if do.isidentifier() else None
        if method is None:
            raise ValueError(f"the studio does not know {do[:40]!r}; reload the page")
        try:
            inspect.signature(method).bind(**message)
        except TypeError as error:
            raise ValueError(f"{do}: {error}; reload the page") from None
        await method(**message)

    async def _work(self, call: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.studio.worker, call, *args)

    # --- Turns, and what the reader takes ---

    def _stopped(self) -> bool:
        return self.gone or any(message["do"] in STOPPING for message in self.inbox)

    def _interrupted(self) -> bool:
        return self.gone or bool(self.inbox)

    async def _until(
        self, true: Callable[[], bool], end: Callable[[], bool], seconds: float | None = None
    ) -> bool:
        """Wait until something is true; False when ``end`` is before it, or the time is over."""
        while True:
            self.changed.clear()  # first: what changes during the lines below must wake the wait
            await self._tell_place()
            if true():
                return True
            if end():
                return False
            try:
                await asyncio.wait_for(self.changed.wait(), seconds)
            except TimeoutError:
                return False

    async def _tell_place(self) -> None:
        if self.queued is not None:
            before, behind = self.queued
            self.queued = None
            await self._tell({"is": "queue", "before": before, "behind": behind})

    async def _ready(self, end: Callable[[], bool]) -> bool:
        """Wait until the tab may be sent a block, and has the generator; False when it ends."""
        while True:
            patience = PATIENCE if self.place else None
            if not await self._until(self._taken, end, patience):
                if end():
                    return False
                self._give_turn()
                continue
            if self.place is None:
                self.place = self.studio.turns.ask(self._moved)
            if not await self._until(self.place.first.is_set, end):
                return False
            await self._tell_place()
            return True

    def _taken(self) -> bool:
        return self.sent - self.seen < AHEAD

    def _moved(self, before: int, behind: int) -> None:
        self.queued = (before, behind)
        self.changed.set()

    def _give_turn(self) -> None:
        if self.place is not None:
            self.place.leave()
            self.place = None

    async def _send(self, made: Made, kind: str) -> None:
        if self.gone:
            return
        head = {"kind": kind, "node": made.node, "number": made.block}
        head |= {"seconds": round(made.seconds, 4), "same": made.same}
        message = await self._work(packed, head, made.pixels)
        self.sent += 1
        await self.send_bytes(message)

    async def _send_all(self, blocks: Generator[Made], kind: str = "replay") -> list[bool]:
        """Make and send all blocks of a way; returns which of them are the same as before."""
        same: list[bool] = []
        while await self._ready(self._stopped):
            made = await self._work(next, blocks, None)
            if made is None:
                return same
            same.append(made.same is not False)
            await self._send(made, kind)
        await self._work(blocks.close)
        raise ValueError("stopped on the way; press play to go on, or choose a place in the story")

    # --- Stories ---

    async def _play(self) -> None:
        if await self._ready(self._interrupted):
            await self._send(await self._work(self._told().advance), "live")

    def _told(self) -> Live:
        if self.live is None:
            raise ValueError("there is no story yet; give a prompt and press play")
        return self.live

    def _story(self) -> dict[str, Any]:
        live = self._told()
        nodes = [
            {
                "parent": node.parent,
                "first": node.first,
                "stop": node.stop,
                "fork": node.fork and {"by": node.fork.by, "branches": node.fork.branches},
                "chosen": node.chosen,
                "prompts": node.prompts,
            }
            for node in live.tree.nodes
        ]
        tree = live.tree
        facts = {"name": tree.name, "seed": tree.seed, "at": tree.at, "path": tree.path(tree.at)}
        held = {"prompts": tree.prompts(tree.at), "block": live.block, "playing": self.playing}
        return {"is": "story", **facts, **held, "nodes": nodes}

    async def _keep(self) -> None:
        await self._work(self.library.keep, self._told().tree)

    async def _keep_and_tell(self) -> None:
        await self._keep()
        await self._tell(self._story())

    async def do_begin(self, prompt: str, seed: int) -> None:
        """Begin a story, and play it."""
        prompt = await self._work(check_prompt, self.studio.pipeline, prompt)
        name = self.library.new_name()
        tree = new_tree(name, self.studio.label, self.studio.sampler, seed, prompt)
        if self.live is not None:
            await self._keep()
        self.live = await self._work(start, self.studio.live(tree))
        await self._warn_of(prompt)
        self.playing = True
        await self._keep_and_tell()
        await self.do_stories()

    async def do_say(self, prompt: str) -> None:
        """Switch to another prompt at the next block."""
        await self._work(self._told().say, prompt)
        await self._warn_of(prompt)
        await self._keep_and_tell()

    async def _warn_of(self, prompt: str) -> None:
        if strangers := await self._work(strange_words, self.studio.pipeline, prompt):
            words = ", ".join(map(repr, strangers[:12]))
            await self._tell(
                {
                    "is": "note",
                    "message": f"the generator does not know {words}, and reads it as nothing",
                }
            )

    async def do_play(self) -> None:
        if self._told().group is not None:
            raise ValueError("branches are shown; choose one or leave the fork first")
        self.playing = True
        await self._tell(self._story())

    async def do_pause(self) -> None:
        self.playing = False
        if self.live is not None:
            await self._keep_and_tell()

    async def do_status(self) -> None:
        facts = {"playing": self.playing, "sent": self.sent, "seen": self.seen}
        block = self.live.block if self.live else 0
        await self._tell({"is": "status", "block": block, **facts})

    async def do_restart(self) -> None:
        """Tell the story from its first block on, with the same noise."""
        await self.do_go(0, 0)
        self.playing = True
        await self._tell(self._story())

    async def do_go(self, node: int, block: int) -> None:
        """Stand at a block of a node."""
        if type(node) is not int or type(block) is not int:
            raise ValueError("a place in the story is two whole numbers; reload the page")
        self.playing = False
        await self._arrive(self._told().go(node, block))

    async def _arrive(self, way: Generator[Made]) -> list[bool]:
        same = await self._send_all(way)
        await self._keep_and_tell()
        return same

    async def do_undo(self) -> None:
        """Go back to before the latest choice or change."""
        self.playing = False
        await self._arrive(await self._work(self._told().undo))

    async def do_open(self, name: str) -> None:
        """Open a story of the folder, and replay it; says whether it is the same bit for bit."""
        tree = await self._work(Tree.read, self.library.story(name))
        if tree.generator != self.studio.label:
            raise ValueError(
                f"{name} was told by {tree.generator}, this studio has {self.studio.label}; start `kvpo studio` with the former"
            )
        tree.name = name
        self.playing = False
        live = self.studio.live(tree)
        if self.live is not None:
            await self._keep()
        self.live = live
        await self._tell(self._story())
        same = await self._arrive(live.go(tree.at, tree.nodes[tree.at].stop))
        await self._tell({"is": "opened", "blocks": len(same), "same": sum(same)})

    async def do_name(self, name: str) -> None:
        """Give the story another name."""
        tree, path = self._told().tree, self.library.story(name)
        if path.exists() and name != tree.name:
            raise ValueError(f"there is a story {name} already; give another name")
        old, tree.name = self.library.story(tree.name), check_name(name)
        await self._keep_and_tell()
        if old != path:
            old.unlink(missing_ok=True)
        await self._tell({"is": "stories", "stories": self.library.stories()})

    async def do_stories(self) -> None:
        await self._tell({"is": "stories", "stories": self.library.stories()})

    # --- Forks ---

    async def do_fork(self, block: int, by: str, branches: int, window: int, draw: int) -> None:
        """Show the branches of a block and the anchor in step."""
        live = self._told()
        if live.group is not None:
            raise ValueError("branches are shown already; choose one or leave the fork first")
        if type(block) is not int or type(window) is not int:
            raise ValueError("block and window are whole numbers; reload the page")
        fork = Fork(block, by, {"window_blocks": window}, branches, draw)
        self.playing = False
        live.check_fork(fork)
        self.before, there = (live.tree.at, live.block), live.place(block)
        try:
            await self._explore(live, fork, there)
        except Exception:
            await self._work(live.return_to, *self.before)
            await self._tell({"is": "left"})
            raise

    async def _explore(self, live: Live, fork: Fork, there: tuple[int, int]) -> None:
        if there != self.before:
            await self._send_all(live.go(*there))
        group = await self._work(live.fork, fork)
        facts = {"block": fork.block, "stop": fork.stop, "by": fork.by, "draw": fork.draw}
        plans = {"rows": len(group.plans), "reads": group.reads()}
        await self._tell({"is": "fork", **facts, **plans})
        while not group.complete:
            if not await self._ready(self._stopped):
                raise ValueError(
                    f"the fork at block {fork.block} was left before it was whole; choose a block to fork again"
                )
            await self._send(await self._work(group.advance), "branch")
        await self._tell({"is": "forked"})

    async def do_leave(self) -> None:
        """Leave the branches, and stand where the fork was asked for."""
        if self.live is None or self.live.group is None:
            return
        self.live.group = None
        await self._arrive(self.live.go(*self.before))
        await self._tell({"is": "left"})

    def _whole_group(self) -> tuple[Live, Any]:
        live = self._told()
        if live.group is None or not live.group.complete:
            raise ValueError("there are no branches to compare; fork a block first")
        return live, live.group

    async def do_choose(self, row: int) -> None:
        """Go on from a row of the group; the choice is recorded as a preference."""
        live, group = self._whole_group()
        if type(row) is not int or row not in range(len(group.plans)):
            raise ValueError(
                f"the group has no row {row!r}; choose one of 0 to {len(group.plans) - 1}"
            )
        fps = self.studio.pipeline.geometry.fps
        await self._work(self.library.picked, self.rater, live.tree, group, row, fps)
        await self._work(live.choose, row)
        self.playing = True
        await self._tell({"is": "chosen", "node": live.tree.at, "row": row})
        await self._keep_and_tell()

    async def do_pair(self, left: int, right: int, answer: str) -> None:
        """Record which of two rows is better."""
        live, group = self._whole_group()
        rows, fps = [left, right], self.studio.pipeline.geometry.fps
        await self._work(self.library.compared, self.rater, live.tree, group, rows, answer, fps)
        await self._tell({"is": "rated", "left": left, "right": right, "answer": answer})

    async def do_rater(self, label: str) -> None:
        """Say who chooses, for the record."""
        if len(label := readable(label)) > 64:
            raise ValueError("a rater's label has at most 64 characters; give a shorter one")
        self.rater = label

    # --- Saving ---

    async def do_save(self) -> None:
        """Write the story up to here as an mp4: it is told again, frame by frame the same."""
        live = self._told()
        tree, stop, self.playing = copy.deepcopy(live.tree), live.block, False
        if not stop:
            raise ValueError("the story has no block yet; play it first")
        way = self.studio.live(tree, budget=0).go(tree.at, stop)
        path, prompts = self.library.video(tree.name), tree.prompts(tree.at)
        shown = {block: text for block, text in prompts.items() if block < stop}
        script = Script("story", tuple(shown.values()), tuple(shown), stop)
        forks = [
            vars(n.fork) | {"chosen": n.chosen}
            for n in map(tree.nodes.__getitem__, tree.path(tree.at))
            if n.fork
        ]
        about = about_video(script, tree.seed, tree.generator, sampler=tree.sampler, forks=forks)
        with Mp4Writer(path, self.studio.pipeline.geometry.fps, about=about) as writer:
            same = await self._written(writer, way, stop)
        write_beside(path, about)
        others = stop - sum(same)
        if others:
            await self._tell(
                {
                    "is": "note",
                    "message": f"{count_of(others, 'block')} came out otherwise than shown",
                }
            )
        await self._tell({"is": "saved", "file": f"videos/{path.name}", "name": path.name})
        await self._tell(self._story())

    async def _written(self, writer: Mp4Writer, way: Generator[Made], stop: int) -> list[bool]:
        same: list[bool] = []
        while await self._ready(self._stopped):
            made = await self._work(next, way, None)
            if made is None:
                return same
            same.append(made.same is not False)
            await self._work(writer.write, made.pixels[0])
            await self._tell({"is": "saving", "block": len(same), "of": stop})
        raise ValueError("saving was stopped, and nothing was written; save again when you like")
