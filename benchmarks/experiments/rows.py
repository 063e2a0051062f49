"Hold what an experiment yields: rows of the table, and the goals with what was reached."
import statistics
import time
from collections.abc import Iterable
from contextlib import contextmanager
from typing import NamedTuple

COLUMNS = ('experiment', 'setting', 'ours', 'published', 'seeds', 'standard error', 'labels used', 'seconds')


class Row(NamedTuple):
    "Hold a line of the table. `seconds` is the time of pruning and repair, of one seed."
    experiment: str
    setting: str
    ours: str
    published: str = ''
    seeds: int = 1
    error: str = ''
    labels: bool = False
    seconds: float | None = None


class Goal(NamedTuple):
    "Hold a goal and what was measured."
    goal: str
    measured: str
    reached: bool


def averaged(
    experiment: str,
    setting: str,
    values: list,  # one a seed
    published: str = '',
    labels: bool = False,  # whether pruning or repair has used labels
    seconds: float | None = None,  # of one seed
    digits: int = 1,
) -> Row:
    "Return a row of the mean of several seeds, with its standard error."
    several = len(values) > 1
    error = f'{statistics.stdev(values) / len(values) ** .5:.{digits}f}' if several else ''
    ours = f'{statistics.mean(values):.{digits}f}'
    return Row(experiment, setting, ours, published, len(values), error, labels, seconds)


def as_table(
    lines: Iterable,  # of tuples of texts
    heading: tuple,
) -> str:
    "Write lines as a table in Markdown."
    return '\n'.join(f'| {" | ".join(line)} |' for line in [heading, ('---',) * len(heading), *lines])


def as_text(found: list) -> str:
    "Write what an experiment yields: its rows, then its goals."
    rows = [_cells(row) for row in found if isinstance(row, Row)]
    goals = [(g.goal, g.measured, _yes(g.reached)) for g in found if isinstance(g, Goal)]
    said = [text for text in found if isinstance(text, str)]
    tables = [as_table(rows, COLUMNS)] if rows else []
    if goals: tables.append(as_table(goals, ('goal', 'measured', 'reached')))
    return '\n\n'.join([*said, *tables])


def _cells(row):
    seconds = '' if row.seconds is None else f'{row.seconds:.2g}'
    if row.seconds is not None and row.seconds >= 10: seconds = f'{row.seconds:.0f}'
    return (row.experiment, row.setting, row.ours, row.published, str(row.seeds), row.error,
            _yes(row.labels), seconds)


def _yes(value): return 'yes' if value else 'no'


class Clock:
    "Hold the seconds that a block took."
    seconds = 0.


@contextmanager
def timed():
    "Measure the seconds of a block."
    clock, start = Clock(), time.perf_counter()
    yield clock
    clock.seconds = time.perf_counter() - start
