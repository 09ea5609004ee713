"""No test may reach the network: whatever asks for another machine is refused, and remembered.

An audit hook sees every use of Python's sockets, also deep in libraries that swallow the error.
Processes that a test starts anew have no such hook; `without_network.py` is for them.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys

refused: list[str] = []  # what was asked for, since the list was last cleared
_asked = {  # audit event -> where its arguments hold the host
    "socket.connect": lambda own, address: address,
    "socket.sendto": lambda own, address: address,
    "socket.sendmsg": lambda own, address: address,
    "socket.getaddrinfo": lambda host, *_: (host,),
    "socket.gethostbyname": lambda host: (host,),
}
_on = [False]


def install() -> None:
    """From now on, for this process and those forked from it."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]  # a proxy on this machine would be a way out
    if not _on[0]:
        sys.addaudithook(_refuse)
    _on[0] = True


def lift() -> None:
    """Let this process ask: one that is in a network namespace, where nobody answers."""
    _on[0] = False


def _refuse(event: str, arguments: tuple) -> None:
    if event not in _asked or not _on[0]:
        return
    address = _asked[event](*arguments)
    if not isinstance(address, tuple):  # a Unix socket, or one that is connected
        return
    if not is_local(address[0]):
        refused.append(f"{event} {address[0]!r}")
        raise ConnectionRefusedError(f"tests have no network: {event} {address[0]!r}")


def is_local(host: str | bytes | None) -> bool:
    """Whether this is a name or address of this machine alone."""
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "", "localhost", "localhost.localdomain", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(host.split("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified
