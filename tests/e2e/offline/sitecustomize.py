"""Stands for a machine without a network: what leaves this one is refused, and written into the file that NETWORK_LOG names, for a library may try
in silence and do without. Python imports this first.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from typing import Any

LOG = os.environ.get("NETWORK_LOG")


def own_names() -> set[str]:
    """Of this machine, and its addresses."""
    name = socket.gethostname()
    try:
        return {name, *socket.gethostbyname_ex(name)[2]}
    except OSError:  # it need not know itself
        return {name}


OWN = {"localhost", "localhost.localdomain", "", "*", *own_names()}


def is_here(host: object) -> bool:
    text = host.decode() if isinstance(host, bytes) else str(host or "")
    try:
        return text in OWN or ipaddress.ip_address(text.partition("%")[0]).is_loopback
    except ValueError:
        return False


def is_number(host: object) -> bool:
    """Nobody is asked what an address is."""
    try:
        return bool(ipaddress.ip_address(str(host)))
    except ValueError:
        return False


def leaves(event: str, arguments: tuple[Any, ...]) -> object:
    """What an event of Python's asks for beyond this machine; None where it stays here."""
    if event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):  # a socket in the file system has a name alone
        return None if is_here(arguments[1][0]) else arguments[1]
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        return None if is_here(arguments[0]) or is_number(arguments[0]) else arguments[0]
    return None


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event.startswith("socket.") and (asked := leaves(event, arguments)) is not None:
        with open(LOG or os.devnull, "a") as log:
            log.write(f"{event} {asked} {sys.argv}\n")
        raise PermissionError(f"{event} {asked}: this machine has no network")


if LOG:
    sys.addaudithook(watch)
