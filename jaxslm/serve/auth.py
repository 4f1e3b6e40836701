"""Who may call what. Every path needs a key when the server has keys, but for health and the page's static files."""

import hashlib
import hmac
from collections.abc import Mapping

from jaxslm.serve.errors import ApiError
from jaxslm.serve.settings import Keys

OPEN_PATHS = frozenset({"/health/live", "/health/ready", "/"})
"""Compared with the whole path: no prefix, no trailing slash."""
OPEN_PREFIX = "/page/"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class Authenticator:
    """Checks keys in time that does not depend on how much of a key is right, nor on which one it is."""

    def __init__(self, keys: Keys) -> None:
        self._api = [_digest(key) for key in keys.api]
        self._admin = _digest(keys.admin) if keys.admin else None

    def check(self, path: str, headers: Mapping[str, str], *, admin: bool) -> None:
        """Returns if the caller may; the admin key opens everything.

        Args:
            headers: in lower case; the key is in `authorization: Bearer KEY` or in `x-api-key`.
            admin: whether the route changes the server.

        Raises:
            ApiError: 401 without a valid key, 403 with one that does not suffice.
        """
        if not admin and (not self._api or path in OPEN_PATHS or path.startswith(OPEN_PREFIX)):
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = _digest(token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", ""))
        is_admin = self._admin is not None and hmac.compare_digest(given, self._admin)
        matches = [hmac.compare_digest(given, key) for key in self._api]
        if is_admin or (not admin and any(matches)):
            return
        if not admin or (self._api and self._admin is None and not any(matches)):
            raise ApiError(401, "unauthorized", "a valid API key is needed: Authorization: Bearer KEY")
        if self._admin is None:
            raise ApiError(403, "forbidden", "this route needs an admin key, and the server has none")
        if any(matches):
            raise ApiError(403, "forbidden", "this route needs the admin key")
        raise ApiError(401, "unauthorized", "the admin key is needed: Authorization: Bearer KEY")
