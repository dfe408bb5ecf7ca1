"""The guard of `onecard serve`, for a browser: the key in a cookie, and no request of another site.

A browser sends no key by itself. The page's address with ?key=KEY sets a cookie that other sites' requests do not carry
(SameSite=Strict) and that scripts cannot read (HttpOnly). A page of another site that names 127.0.0.1 could send a
request without a preflight only if it is not application/json, which the guard refuses. Browsers also name the
request's site in Sec-Fetch-Site.
"""

from __future__ import annotations

from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

from onecard.infer.guard import Guard
from onecard.infer.protocol import ApiError

COOKIE = "onecard_key"
OWN_SITES = (b"same-origin", b"none")  # none: the user typed the address


class PageGuard(Guard):
    """ASGI middleware around the whole page."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and self.config.api_key is not None:
            scope = {**scope, "headers": with_key(scope, self.config.api_key)}
        await super().__call__(scope, receive, send)

    def check_headers(self, scope: Any) -> None:
        super().check_headers(scope)
        site = dict(scope["headers"]).get(b"sec-fetch-site")
        opens_page = scope["method"] == "GET" and scope["path"] == "/"  # a link from another page may lead here
        if site is not None and site not in OWN_SITES and not opens_page:
            raise ApiError(403, "the page takes no requests of other sites", code="cross_site")


def with_key(scope: Any, key: str) -> list[tuple[bytes, bytes]]:
    """Return the headers, with the key of the cookie, or of the page's address, as the header that the guard reads."""
    headers = list(scope["headers"])
    if any(name.lower() == b"authorization" for name, _ in headers):
        return headers
    sent = key_in_address(scope) or key_in_cookie(headers)
    return [*headers, (b"authorization", b"Bearer " + sent.encode())] if sent else headers


def key_in_address(scope: Any) -> str | None:
    """Return the key that the page's own address carries."""
    if scope["method"] != "GET" or scope["path"] != "/":
        return None
    return parse_qs(scope["query_string"].decode("latin-1")).get("key", [None])[0]


def key_in_cookie(headers: list[tuple[bytes, bytes]]) -> str | None:
    for name, value in headers:
        if name.lower() == b"cookie":
            try:
                found = SimpleCookie(value.decode("latin-1")).get(COOKIE)
            except CookieError:
                return None
            return found.value if found else None
    return None
