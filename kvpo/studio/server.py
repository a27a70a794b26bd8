"""The studio's server: who may speak to it, the page, its files, and the sockets of the tabs."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import secrets
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from kvpo.studio.panes import Panes
from kvpo.studio.session import Session
from kvpo.studio.shared import Studio

PAGE = {
    "index.html": "text/html",
    "studio.css": "text/css",
    "main.js": "text/javascript",
    "link.js": "text/javascript",
    "player.js": "text/javascript",
    "strip.js": "text/javascript",
    "fork.js": "text/javascript",
    "panes.js": "text/javascript",
    "learn.js": "text/javascript",
    "blind.js": "text/javascript",
    "runs.js": "text/javascript",
    "curves.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
"""Files of the page, and their types; no other file of the package is served."""
MOST_TABS = 4
LARGEST_MESSAGE = 2**16
"""Bytes of a tab's message."""
LOCAL = ("127.0.0.1", "localhost", "::1")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Guard:
    """Lets a request or socket through to the studio, if it knows the token and comes from its page.

    The token is the first part of every path, so links of the page need not name it. The name in
    the Host header must be this machine's, which a foreign name that was pointed here is not; an
    Origin must be that host, and sockets and requests that ask for work must have one.
    """

    def __init__(self, app: ASGIApp, token: str, host: str):
        self.app, self.token, self.host = app, token, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif reason := self.refusal(scope):
            await _refuse(scope, receive, send, reason)
        else:
            path = scope["path"][1 + len(self.token) :]
            inner = {**scope, "path": path, "raw_path": path.encode()}
            await self.app(inner, receive, _with_headers(send))

    def refusal(self, scope: Scope) -> str:
        """Reason why a request is refused; "" if it is not."""
        named = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"]]
        headers = dict(named)
        if sum(name in ("host", "origin") for name, _ in named) != len(
            {"host", "origin"} & set(headers)
        ):
            return "a header stands twice"
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.knows(host):
            return "this host is not the studio's"
        if origin is None and scope["type"] == "websocket":
            return "a socket needs an origin"
        if origin is None and scope.get("method", "GET") not in ("GET", "HEAD"):
            return "a request for work needs an origin"
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return "this origin is not the studio's"
        given = scope["path"].split("/")[1:2]
        if not given or not hmac.compare_digest(given[0].encode(), self.token.encode()):
            return "the token is missing or wrong; open the address that `kvpo studio` has printed"
        return ""

    def knows(self, host: str) -> bool:
        """Whether a Host header names this machine; any port, since it may be forwarded."""
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if name in LOCAL or name == self.host:
            return True
        # A number can not be pointed elsewhere, so it is no trick of a foreign page.
        return self.host not in LOCAL and _is_number(name)


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _refuse(scope: Scope, receive: Receive, send: Send, reason: str) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008})
    else:
        await PlainTextResponse(f"403: {reason}\n", 403, HEADERS)(scope, receive, send)


def _with_headers(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = {name.lower() for name, _ in message["headers"]}
            added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            added = [header for header in added if header[0] not in own]
            message = {**message, "headers": [*message["headers"], *added]}
        await send(message)

    return sent


def new_token() -> str:
    return secrets.token_urlsafe(24)


def new_app(
    studio: Studio, token: str, host: str = "127.0.0.1", panes: Panes | None = None
) -> ASGIApp:
    """Make the studio's application, guarded; without ``panes`` it tells stories only."""
    folder = files("kvpo.studio") / "page"
    content = {name: (folder / name).read_bytes() for name in PAGE}

    async def page(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in PAGE:
            return PlainTextResponse("404: there is no such file\n", 404)
        return Response(content[name], media_type=PAGE[name])

    async def video(request: Request) -> Response:
        try:
            path = studio.library.video(request.path_params["name"])
        except ValueError as error:
            return PlainTextResponse(f"404: {error}\n", 404)
        if not path.is_file():
            return PlainTextResponse("404: this video is not there\n", 404)
        return FileResponse(path, media_type="video/mp4", filename=path.name)

    async def socket(tab: WebSocket) -> None:
        await serve_tab(studio, tab)

    routes = [
        Route("/", page),
        Route("/videos/{name}.mp4", video),
        WebSocketRoute("/socket", socket),
        *(panes.routes() if panes else ()),
        Route("/{name}", page),
    ]
    return Guard(Starlette(routes=routes), token, host)


async def serve_tab(studio: Studio, tab: WebSocket) -> None:
    """Serve one tab until it is gone."""
    await tab.accept()
    if studio.tabs >= MOST_TABS:
        said = f"{MOST_TABS} tabs are open, the most that the studio serves; close one and reload"
        await tab.send_json({"is": "error", "message": said})
        await tab.close(1013)
        return

    session: Session

    async def send(what: Mapping[str, Any] | bytes) -> None:
        try:
            # ASCII: half a surrogate pair that a tab sent would not go out as UTF-8 again.
            await (
                tab.send_bytes(what) if isinstance(what, bytes) else tab.send_text(json.dumps(what))
            )
        except (WebSocketDisconnect, RuntimeError, OSError):  # it has gone in the meantime
            session.leave()

    session = Session(studio, send, send)
    studio.tabs += 1
    driver = asyncio.create_task(session.drive())
    driver.add_done_callback(lambda _: studio.closed_tab())
    try:
        while True:
            await _take(session, tab)
    except WebSocketDisconnect:
        pass
    except ValueError as error:
        await send({"is": "error", "message": str(error)})
        await tab.close(1008)
    finally:
        session.leave()
        # A server may cancel this, but the block that is being made ends in any case, and only
        # then the turn is given on.
        await asyncio.shield(driver)


async def _take(session: Session, tab: WebSocket) -> None:
    received = await tab.receive()
    if received["type"] == "websocket.disconnect":
        raise WebSocketDisconnect
    if (text := received.get("text")) is None:
        raise ValueError("a message is text; reload the page")
    if len(text) > LARGEST_MESSAGE:
        raise ValueError(f"a message of {len(text)} characters is too long; reload the page")
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("a message is not JSON; reload the page") from None
    session.receive(message)
