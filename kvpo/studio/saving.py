"""The request of a tab for a video: write the story up to here as an mp4."""

from __future__ import annotations

import copy
from collections.abc import Generator
from typing import Any

from kvpo.common.provenance import about_video, write_beside
from kvpo.common.video import Mp4Writer
from kvpo.common.wording import count_of
from kvpo.studio.made import Made
from kvpo.studio.stories import Stories
from kvpo.studio.tree import Tree
from kvpo.types import Script


class Saving(Stories):
    """The request to save a story."""

    async def do_save(self) -> None:
        """Write the story up to here as an mp4: it is told again, frame by frame the same."""
        live = self._told()
        tree, stop, self.playing = copy.deepcopy(live.tree), live.block, False
        if not stop:
            raise ValueError("the story has no block yet; play it first")
        way = self.studio.live(tree, budget=0).go(tree.at, stop)
        path, about = self.library.video(tree.name), about_story(tree, stop)
        with Mp4Writer(path, self.studio.pipeline.geometry.fps, about=about) as writer:
            same = await self._written(writer, way, stop)
        write_beside(path, about)
        if others := stop - sum(same):
            said = f"{count_of(others, 'block')} came out otherwise than shown"
            await self._tell({"is": "note", "message": said})
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


def about_story(tree: Tree, stop: int) -> dict[str, Any]:
    """Record of a story's first ``stop`` blocks, which is written into their video."""
    prompts = {block: text for block, text in tree.prompts(tree.at).items() if block < stop}
    script = Script("story", tuple(prompts.values()), tuple(prompts), stop)
    nodes = [tree.nodes[number] for number in tree.path(tree.at)]
    forks = [vars(node.fork) | {"chosen": node.chosen} for node in nodes if node.fork]
    return about_video(script, tree.seed, tree.generator, sampler=tree.sampler, forks=forks)
