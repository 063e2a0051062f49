"Show how far a long task is."
import sys
from collections.abc import Iterable


def progress(
    steps: list,
) -> Iterable:
    "Return an iterable of the steps that shows fastprogress's bar, in a notebook or a terminal."
    try:
        from fastprogress.fastprogress import IN_NOTEBOOK, progress_bar
    except ImportError: return steps
    return progress_bar(steps, leave=False) if IN_NOTEBOOK or sys.stdout.isatty() else steps
