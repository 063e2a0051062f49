"Show how far a long task is."
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from contextvars import ContextVar

SHOWN = ContextVar('shown', default=True)


def progress(
    steps: list,
) -> Iterable:
    "Return an iterable of the steps that shows a bar, in a notebook or terminal, and no bar inside another."
    try:
        from fastprogress.fastprogress import IN_NOTEBOOK, progress_bar
    except ImportError:
        return steps
    is_seen = SHOWN.get() and (IN_NOTEBOOK or sys.stdout.isatty())
    return _alone(progress_bar(steps, leave=False)) if is_seen else steps


def _alone(steps):
    "Yield the steps of a bar, inside of which no other bar is shown."
    with hidden(): yield from steps


@contextmanager
def hidden():
    "Show no bar inside a `with` block: something else shows one."
    token = SHOWN.set(False)
    try: yield
    finally: SHOWN.reset(token)
