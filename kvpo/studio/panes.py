"""Requests of the panes *Learn* and *Runs*: JSON in and out, videos of a comparison, reports.

They are plain requests beside the socket of a tab, so they are answered while a tab makes blocks,
and need no turn at the generator.
"""

from __future__ import annotations

import base64
import hashlib
import inspect
import json
from collections.abc import Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from kvpo.common.files import in_words
from kvpo.pages.render import source
from kvpo.studio.learning import Learning
from kvpo.studio.runs import Runs

LARGEST_BODY = 2**12
"""Bytes of a request's JSON."""
ASKED = ("fit", "align", "resume", "stop", "compare", "answer")
"""Requests of the pane *Learn*, methods of `Learning`."""


def report_policy() -> str:
    """Content policy of a report: its own script alone, known by its hash, and nothing from elsewhere.

    ``sandbox`` gives it an origin of its own, which the studio lets nothing ask.
    """
    script = "\n" + source("report.js")
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"sandbox allow-scripts; default-src 'none'; script-src 'sha256-{known}'; "
        "style-src 'unsafe-inline'; img-src data:; media-src data:; base-uri 'none'; form-action 'none'"
    )


class Panes:
    """The routes of both panes."""

    def __init__(self, learning: Learning, runs: Runs):
        self.learning, self.runs = learning, runs

    def routes(self) -> list[Route]:
        return [
            Route("/learn", self.state),
            Route("/learn/{do}", self.ask, methods=["POST"]),
            Route("/blind/{name}/{place:int}/{side}.mp4", self.blind),
            Route("/runs", self.listed),
            Route("/runs/{name}/curves", self.curves),
            Route("/runs/{name}/report.html", self.report),
        ]

    # --- Learn ---

    async def state(self, request: Request) -> Response:
        return await answered(self.learning.state)

    async def ask(self, request: Request) -> Response:
        """Do what the page asks, and tell how things stand then."""
        do = request.path_params["do"]
        if do not in ASKED:
            return refused(f"the studio does not know {do[:40]!r}; reload the page", 404)
        try:
            what = await body(request)
            method = getattr(self.learning, do)
            try:
                inspect.signature(method).bind(**what)
            except TypeError as error:
                raise ValueError(f"{do}: {error}; reload the page") from None
        except ValueError as error:
            return refused(str(error))

        def done() -> dict[str, Any]:
            method(**what)
            return self.learning.state()

        return await answered(done)

    async def blind(self, request: Request) -> Response:
        asked = request.path_params
        return await served(
            lambda: self.learning.blind(asked["name"]).video(asked["place"], asked["side"]),
            "video/mp4",
        )

    # --- Runs ---

    async def listed(self, request: Request) -> Response:
        return await answered(self.runs.listed)

    async def curves(self, request: Request) -> Response:
        return await answered(lambda: self.runs.curves(request.path_params["name"]), 404)

    async def report(self, request: Request) -> Response:
        name = request.path_params["name"]
        answer = await served(lambda: self.runs.report(name), "text/html")
        answer.headers["content-security-policy"] = report_policy()
        return answer


async def body(request: Request) -> dict[str, Any]:
    """Read a request's JSON object.  ValueError for anything else, and for one that is too long."""
    read = b""
    async for part in request.stream():
        read += part
        if len(read) > LARGEST_BODY:
            raise ValueError(f"a request has more than {LARGEST_BODY} bytes; reload the page")
    try:
        found = json.loads(read or b"{}")
    except (ValueError, RecursionError):
        raise ValueError("a request is not JSON; reload the page") from None
    if not isinstance(found, dict):
        raise ValueError("a request is an object; reload the page")
    return found


async def answered(call: Callable[[], Any], status: int = 400) -> Response:
    """Answer with what a call gives; an error of the user's is said with ``status``."""
    try:
        return JSONResponse(await run_in_threadpool(call))
    except (ValueError, OSError) as error:
        return refused(in_words(error), status)


async def served(call: Callable[[], Any], kind: str) -> Response:
    """Serve the file that a call names; 404 where it names none, or it is not there."""
    try:
        path = await run_in_threadpool(call)
    except (ValueError, OSError) as error:
        return PlainTextResponse(f"404: {in_words(error)}\n", 404)
    if not path.is_file():
        return PlainTextResponse("404: this file is not there\n", 404)
    return FileResponse(path, media_type=kind)


def refused(message: str, status: int = 400) -> Response:
    return JSONResponse({"message": message}, status)
