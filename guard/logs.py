"""One JSON object per log line, for machines to read."""

import json
import logging
import math
from datetime import UTC, datetime


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time, level, logger, message, then the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; whatever JSON cannot say becomes its text."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: _plain(value) for name, value in getattr(record, "fields", {}).items()},
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _plain(value: object) -> object:
    """JSON has no NaN and no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def configure(level: int = logging.INFO) -> None:
    """Every handler of the root, of BentoML and of the server writes JSON; guard's own lines are shown."""
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(logging.StreamHandler())
    handlers = [*root.handlers]
    for name in ("bentoml", "uvicorn.error", "circus"):
        handlers += logging.getLogger(name).handlers
    for handler in handlers:
        handler.setFormatter(JsonFormatter())
    logging.getLogger("guard").setLevel(level)
    # They warn of every malformed form and header entry: a client must not be able to fill the log.
    for name in ("python_multipart", "opentelemetry"):
        logging.getLogger(name).setLevel(logging.ERROR)
