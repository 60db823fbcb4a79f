"""How every process of the service logs."""

from __future__ import annotations

import logging
import sys

import structlog

from .settings import Settings

_FIRST_AFTER_S = 10.0


class Seldom:
    """Lets news of one long wait through at widening intervals: after 10 s, 20 s, 40 s, ..."""

    def __init__(self) -> None:
        self._next_s = _FIRST_AFTER_S

    def is_due(self, waited_s: float) -> bool:
        """Whether to say something now; true once for each interval, however late it is asked."""
        if waited_s < self._next_s:
            return False
        while self._next_s <= waited_s:
            self._next_s *= 2
        return True


def configure_logging(settings: Settings) -> None:
    """Events with fields, on standard error."""
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(bool_as_flag=False),
        ],
    )
    logging.basicConfig(level=max(level, logging.WARNING), stream=sys.stderr)
