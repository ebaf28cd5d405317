"""The server behind the page: who may reach it, and what it never does."""

from __future__ import annotations

import ipaddress
import logging
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from untwine.app.gate import Gate
from untwine.app.page import CSS, build, theme
from untwine.app.studio import Studio

logger = logging.getLogger(__name__)


class Server:
    """A running studio."""

    def __init__(self, studio: Studio, page: Any, url: str, share_url: str | None) -> None:
        self.studio, self.page, self.url, self.share_url = studio, page, url, share_url

    def close(self) -> None:
        """Stops it."""
        self.page.close(verbose=False)

    def wait(self) -> None:
        """Until Ctrl-C, which closes it."""
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
        self.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def check_reach(host: str, auth: tuple[str, str] | None, share: bool) -> None:
    """Raises ValueError where others could reach the page without a password, and warns where they can with one."""
    exposed = share or not _is_loopback(host)
    if auth is not None and not (len(auth) == 2 and all(auth)):
        raise ValueError("auth must be user:password, neither of them empty")
    if exposed and auth is None:
        what = "share" if share else f"host {host}"
        raise ValueError(
            f"{what} lets others reach this page, and everybody could use your machine; set auth "
            "(--auth user:password), or keep to 127.0.0.1"
        )
    if exposed:
        logger.warning("others can reach this page, with the password you set; anything they draw runs on this machine")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(
    studio: Studio,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    auth: tuple[str, str] | None = None,
    share: bool = False,
    block: bool = False,
) -> Server:
    """Opens the page of ``studio``; the arguments are those of :func:`untwine.app.launch`, which has checked them."""
    from starlette.middleware import Middleware

    outputs: Path = studio.outputs.folder
    page = build(studio)
    page.queue(max_size=int(studio.limits.max_queue), api_open=False)
    _, url, share_url = page.launch(
        server_name=host,
        server_port=port,
        auth=auth,
        share=share,
        quiet=True,
        show_error=False,
        prevent_thread_lock=True,
        allowed_paths=[str(outputs)],
        max_file_size=1,
        state_session_capacity=200,
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        footer_links=["api"],
        theme=theme(),
        css_paths=CSS,
        app_kwargs={"middleware": [Middleware(Gate, outputs=outputs, isolated=not share)]},
    )
    threading.Thread(target=studio.warm_up, name="untwine warm-up", daemon=True).start()
    server = Server(studio, page, url, share_url)
    if block:
        server.wait()
    return server
