"""What stands between the network and Gradio: the few routes that the studio uses, and small bodies only.

Gradio's server offers uploads, a proxy and more, whether a page has a use for them or not. Here a route that is not
named does not exist, and files are served from the folders that requests have made and from nowhere else.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from untwine.app.outputs import is_made

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MAX_BODY = 256 * 2**10
_PAGE = ("/assets/", "/static/", "/svelte/", "/pwa_icon")
_EXACT = {
    *("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"),
    *("/login", "/logout", "/user", "/login_check"),
}
_API = "/gradio_api/"
_API_CALLS = ("queue/", "call/", "run/", "api/", "heartbeat/")
_API_EXACT = {
    *("info", "config", "startup-events", "theme.css", "app_id", "user", "login_check", "cancel", "reset"),
    "openapi.json",
}
_FILE = _API + "file="
_OWN_ONLY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; base-uri 'self'"
)


class Gate:
    """ASGI middleware.

    Args:
        outputs: the folder of what is made.
        isolated: tell the browser to load nothing from anywhere else.
    """

    def __init__(self, app: Any, outputs: Path, isolated: bool) -> None:
        self.app, self.outputs = app, outputs
        self.headers = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
        if isolated:
            self.headers.append((b"content-security-policy", _OWN_ONLY.encode()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http" or not self.admits(scope["path"]):
            return await _answer(send, 404, "not found")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MAX_BODY:
            return await _answer(send, 413, f"a request takes at most {MAX_BODY // 2**10} KiB")
        await self.app(scope, _counted(receive), self._with_headers(send))

    def admits(self, path: str) -> bool:
        """Whether there is such a route here."""
        path = path.rstrip("/") or "/"
        if path.startswith(_FILE):
            return is_made(path.removeprefix(_FILE), self.outputs)
        if path.startswith(_API):
            rest = path.removeprefix(_API)
            return rest in _API_EXACT or rest.startswith(_API_CALLS)
        return path in _EXACT or path.startswith(_PAGE)

    def _with_headers(self, send: Send) -> Send:
        async def sending(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *self.headers]
            await send(message)

        return sending


def _counted(receive: Receive) -> Receive:
    """A body without a length is cut off where it grows too long."""
    received = 0

    async def receiving() -> MutableMapping[str, Any]:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        return {"type": "http.disconnect"} if received > MAX_BODY else message

    return receiving


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
