"""Requests of a tab about its story: begin, say, pause, go elsewhere, undo, open, name."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from kvpo.studio.library import check_name
from kvpo.studio.live import Live, start
from kvpo.studio.made import Made
from kvpo.studio.reading import check_prompt, strange_words
from kvpo.studio.tab import Tab
from kvpo.studio.tree import Tree, new_tree


class Stories(Tab):
    """Requests about the story that is told; each method ``do_NAME`` answers a message NAME."""

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
        self._tells(name)
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
        tree.name = await self._name_for_this_tab(name)
        self.playing = False
        live = self.studio.live(tree)
        if self.live is not None:
            await self._keep()
        self.live = live
        self._tells(tree.name)
        await self._tell(self._story())
        same = await self._arrive(live.go(tree.at, tree.nodes[tree.at].stop))
        await self._tell({"is": "opened", "blocks": len(same), "same": sum(same)})

    def _tells(self, name: str) -> None:
        if not self.gone:
            self.studio.tells(self, name)

    async def _name_for_this_tab(self, name: str) -> str:
        """``name``, or where another tab tells that story a new one, for a copy of it.

        Both would write the same file, and choices of the one that writes first were lost.
        """
        if not self.studio.is_told(self, name):
            return name
        copy = self.library.new_name()
        said = f"another tab tells {name}; this is a copy of it, {copy}"
        await self._tell({"is": "note", "message": said})
        return copy

    async def do_name(self, name: str) -> None:
        """Give the story another name."""
        tree, path = self._told().tree, self.library.story(name)
        if path.exists() and name != tree.name:
            raise ValueError(f"there is a story {name} already; give another name")
        before, tree.name = tree.name, check_name(name)
        try:
            await self._keep()
        except OSError:
            tree.name = before
            raise
        self._tells(name)
        await self._tell(self._story())
        if name != before:
            self.library.story(before).unlink(missing_ok=True)
        await self._tell({"is": "stories", "stories": self.library.stories()})

    async def do_stories(self) -> None:
        await self._tell({"is": "stories", "stories": self.library.stories()})
