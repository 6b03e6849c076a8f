"""Who a server on loopback answers: requests that name this machine, not those of a website.

A website can give its own name this machine's address after it was loaded (DNS rebinding), and its
scripts then reach a server on loopback as if it were their own. Their requests carry the website's
name as Host. So here Host must be "localhost" or an address.
"""

import ipaddress
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from opfa.serving.service import Refused

LOCALHOST = "localhost"
Messages = Callable[..., Awaitable[Any]]  # Any: ASGI's dictionaries
App = Callable[[Any, Messages, Messages], Awaitable[None]]


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches what listens there."""
    if host == LOCALHOST:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def for_this_machine(app: App) -> App:
    """The same application, which refuses requests that name another machine."""

    async def guarded(scope: Any, receive: Messages, send: Messages) -> None:
        if scope["type"] == "http":
            named = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            if named and not _is_here(named):
                what = "is not this machine; a proxy should send localhost (or see --host)"
                refusal = Refused(421, f"Host: {named!r} {what}").response()
                await refusal(scope, receive, send)
                return
        await app(scope, receive, send)

    return guarded


def _is_here(named: str) -> bool:
    """Whether a Host header is "localhost" or an address, with a port or without."""
    try:
        host = urlsplit(f"//{named}").hostname or ""
        return host == LOCALHOST or bool(ipaddress.ip_address(host))
    except ValueError:
        return False
