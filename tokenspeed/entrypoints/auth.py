"""Who may ask: API keys for every route but liveness, admin keys for the routes that act on others."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence

from aiohttp import web

from tokenspeed.entrypoints.errors import HttpError

OPEN_ROUTES = frozenset({"/health", "/ready"})
"""Liveness and readiness: what a supervisor asks without a key."""

ADMIN_ROUTES = frozenset({"/abort_request", "/flush_cache", "/reset_prefix_cache"})


class Keys:
    """Configured keys, kept only as SHA-256 digests. Without user keys every route but admin's is open."""

    def __init__(self, user_keys: Sequence[str], admin_keys: Sequence[str]) -> None:
        self._user = [_digest(key) for key in user_keys]
        self._admin = [_digest(key) for key in admin_keys]

    def admits(self, headers: Mapping[str, str]) -> bool:
        """Whether whoever sent these headers, found by `Authorization` and `x-api-key`, may use the model."""
        digest = _digest(_presented(headers) or "")
        return not self._user or _among(digest, self._user) or _among(digest, self._admin)

    def check(self, request: web.Request) -> str:
        """Let a request pass or raise 401 or 403. The result names the tenant, "" when there are no user keys."""
        path = request.path
        if path in OPEN_ROUTES:
            return ""
        admin_only = path in ADMIN_ROUTES
        if not self._user and not admin_only:
            return ""
        presented = _presented(request.headers)
        digest = _digest(presented or "")
        is_admin, is_user = _among(digest, self._admin), _among(digest, self._user)
        if presented is not None and (is_admin or (is_user and not admin_only)):
            return digest.hex()[:32]
        if admin_only and (is_user or not (self._admin or self._user)):
            raise HttpError(
                403,
                "This route needs an admin key; the server takes it with --admin-api-key",
                code="admin_key_required",
            )
        raise HttpError(
            401,
            "Missing API key: send it as Authorization: Bearer KEY" if presented is None else "Incorrect API key",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _presented(headers: Mapping[str, str]) -> str | None:
    header = headers.get("Authorization")
    if header is not None:
        scheme, _, key = header.partition(" ")
        return key.strip() if scheme.lower() == "bearer" else ""
    return headers.get("x-api-key")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _among(digest: bytes, known: Sequence[bytes]) -> bool:
    """Compare with every key, so that the time does not tell which one matched."""
    found = False
    for candidate in known:
        found |= hmac.compare_digest(digest, candidate)
    return found
