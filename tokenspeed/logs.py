"""One log format for every process: text for people, JSON lines for machines."""

from __future__ import annotations

import json
import logging


class _Json(logging.Formatter):
    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "role": self._role,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


class _Text(logging.Formatter):
    def __init__(self, role: str) -> None:
        super().__init__(f"%(asctime)s {role} %(levelname)s %(message)s", "%H:%M:%S")


def configure_logging(level: str, style: str, *, role: str) -> None:
    """Send this process's log to stderr. `level` is a name of `logging`, `style` text or json."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Json(role) if style == "json" else _Text(role))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
