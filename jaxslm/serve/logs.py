"""Structured logs: one JSON object per line on stderr. Queries, items, vectors and keys are never logged."""

import json
import logging
import sys
import threading
import time
import traceback
from typing import Any

logger = logging.getLogger(__name__)


class JsonFormatter(logging.Formatter):
    """Formats a record as JSON; what a call passes as `extra={"fields": {...}}` stands beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns one line."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, default=str)


def log_to_stderr() -> None:
    """Sends every logger's lines, warnings and what ends a thread to stderr as JSON, in place of what was there."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    threading.excepthook = _log_end_of_thread
    # One line per request is the gate's; libraries speak up only when something is wrong.
    for name in ("uvicorn.access", "uvicorn.error", "jax", "orbax", "absl"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _log_end_of_thread(event: threading.ExceptHookArgs) -> None:
    error = event.exc_value
    if error is not None:
        fields = {"thread": event.thread.name if event.thread else None}
        logger.critical("a thread has died", exc_info=error, extra={"fields": fields})
