"""Requests of a tab about a fork: make its branches, leave it, choose one, compare two."""

from __future__ import annotations

from kvpo.method.prompt_files import readable
from kvpo.studio.group import Group
from kvpo.studio.judging import Judging
from kvpo.studio.live import Live
from kvpo.studio.stories import Stories
from kvpo.studio.tree import Fork


class Forking(Stories):
    """Requests about branches, and about who compares them."""

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
        if self.studio.judging is not None:
            await self._judge(self.studio.judging, group)

    async def _judge(self, judging: Judging, group: Group) -> None:
        """Tell what the recipe's rewards say of the branches; the fork stays where they fail."""
        try:
            await self._tell({"is": "scored", **await self._work(judging.scores, group)})
        except ValueError as error:
            await self._tell({"is": "note", "message": f"the branches have no rewards: {error}"})

    async def do_leave(self) -> None:
        """Leave the branches, and stand where the fork was asked for."""
        if self.live is None or self.live.group is None:
            return
        self.live.group = None
        await self._arrive(self.live.go(*self.before))
        await self._tell({"is": "left"})

    def _whole_group(self) -> tuple[Live, Group]:
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
