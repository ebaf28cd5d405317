"""For every test: no network beyond this machine, one thread."""

from __future__ import annotations

import os
import socket

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)

_LOCAL = ("127.", "::1", "localhost")
_connect, _connect_ex, _getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo


def _check(host: object) -> None:
    """Refuses every host but this one; None and '' mean this one. Paths of Unix sockets never come here."""
    name = host.decode() if isinstance(host, bytes) else host
    if isinstance(name, str) and name and not name.startswith(_LOCAL) and name != socket.gethostname():
        raise RuntimeError(f"a test tried to reach {name!r}: tests touch no network")


def _guarded(method):
    def call(self: socket.socket, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _check(address[0])
        return method(self, address)

    return call


def _guarded_getaddrinfo(host, *args, **kwargs):
    _check(host)
    return _getaddrinfo(host, *args, **kwargs)


socket.socket.connect = _guarded(_connect)  # type: ignore[method-assign]
socket.socket.connect_ex = _guarded(_connect_ex)  # type: ignore[method-assign]
socket.getaddrinfo = _guarded_getaddrinfo
