"""What orbax and tensorstore print of a save that fails is left out: the run says it, once."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path


def tell_failed_saves_once() -> None:
    """Leave out what threads of a failed save print, for the rest of the process.

    `Checkpoints.finish` raises the first failure. Each of orbax's threads logs its own besides, and
    tensorstore's, whose writes are still under way, find the loop closed that they report to.
    """
    logging.getLogger("absl").addFilter(_is_news)
    if getattr(sys.unraisablehook, "__module__", None) != __name__:
        sys.unraisablehook = _without_closed_loops(sys.unraisablehook)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.exc_info or "orbax" not in Path(record.pathname).parts


def _without_closed_loops(
    hook: Callable[["sys.UnraisableHookArgs"], object],
) -> Callable[["sys.UnraisableHookArgs"], object]:
    def filtered(met: "sys.UnraisableHookArgs") -> None:
        closed = met.exc_type is RuntimeError and str(met.exc_value) == "Event loop is closed"
        if not (closed and met.object is None):
            hook(met)

    return filtered
