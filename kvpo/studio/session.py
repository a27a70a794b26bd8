"""One tab of the studio, from its socket's opening to its end: what it asks is done in order.

The tab's messages go into an inbox; one task, `Session.drive`, takes them out and makes blocks
between them.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

from kvpo.common.files import first_line, in_words
from kvpo.studio.forking import Forking
from kvpo.studio.saving import Saving


class Session(Forking, Saving):
    """A tab's life: it plays while nothing is asked, and answers each message by ``do_NAME``."""

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

    async def _play(self) -> None:
        if await self._ready(self._interrupted):
            await self._send(await self._work(self._told().advance), "live")
