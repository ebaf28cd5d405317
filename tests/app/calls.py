"""The raw HTTP endpoint, as anybody could call it."""

from __future__ import annotations

import json
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlparse

import httpx

HTTP = httpx.Client(timeout=120, verify=False, limits=httpx.Limits(max_connections=None))
SETTINGS = [
    "label",
    "prompt",
    "negative",
    "count",
    "steps",
    "seed",
    "solver",
    "guidance",
    "low",
    "high",
    "height",
    "width",
]
QUICK = {"label": -1, "prompt": "", "negative": "", "count": 1, "steps": 2, "seed": 0, "solver": "euler"}
QUICK |= {"guidance": 1.5, "low": 0, "high": 0.7, "height": 0, "width": 0}


def create_data(checkpoint: Any = "ddt-digits", **changes: Any) -> list[Any]:
    """The values of ``/create`` in their order."""
    return [checkpoint, *({**QUICK, **changes}[name] for name in SETTINGS)]


def call(url: str, api_name: str, data: list[Any], *, session: str | None = None) -> tuple[str, Any]:
    """(``complete`` or ``error``, the result) of a queued endpoint; a refusal to queue is its status code."""
    body = {"data": data} | ({"session_hash": session} if session else {})
    joined = HTTP.post(f"{url}gradio_api/call/{api_name}", json=body)
    if joined.status_code != 200:
        return str(joined.status_code), joined.text
    events = HTTP.get(f"{url}gradio_api/call/{api_name}/{joined.json()['event_id']}").text
    kind = events.rsplit("event: ", 1)[1].split("\n")[0]
    return kind, json.loads(events.rsplit("data: ", 1)[1].split("\n")[0])


def run_function(server: Any, name: str, data: list[Any], nth: int = 0) -> httpx.Response:
    """A function of the page that is not queued, the nth of its name, called by its number, as the page itself does."""
    number = [k for k, fn in server.page.fns.items() if fn.name == name][nth]
    body = {"data": data, "fn_index": number, "session_hash": "somebody"}
    return HTTP.post(f"{server.url}gradio_api/run/predict", json=body)


def get_raw(url: str, target: str) -> tuple[int, bytes]:
    """A GET whose path is sent as it stands, which no client library would do."""
    address = urlparse(url)
    connection = HTTPConnection(address.hostname or "", address.port, timeout=30)
    try:
        connection.putrequest("GET", target, skip_accept_encoding=True)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()
