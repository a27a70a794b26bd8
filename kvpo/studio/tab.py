"""A tab: its inbox, its turn at the generator, and the pace at which it takes blocks.

A block is begun only when the tab has taken all but `AHEAD` of those before it, so a slow reader
makes nothing pile up, and a tab that is gone ends the work at the next block.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Mapping
from typing import Any

from kvpo.studio.images import packed
from kvpo.studio.live import Live
from kvpo.studio.made import Made
from kvpo.studio.shared import AHEAD, Studio
from kvpo.studio.turns import Place

PATIENCE = 5.0
"""Seconds that a tab which takes no blocks keeps the generator from others."""
MOST_WAITING = 32
"""Messages of a tab that may wait; a tab that sends more is closed."""
STOPPING = ("pause", "leave")
"""Messages that end a replay, a fork or a saving at the next block."""


class Tab:
    """A tab's messages, its turn at the generator, and what it has taken of what it was sent."""

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
        self.studio.told.pop(self, None)
        self.changed.set()

    async def _tell(self, message: Mapping[str, Any]) -> None:
        if not self.gone:
            await self.send_json(message)

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
