"Find which removals a network bears, by halves."
import time
from collections.abc import Callable

from fasterai.deploy.why import NOT_TRIED


def bisect(
    sets: list,  # what could be removed, in parts
    fails: Callable,  # returns why a network without some of the sets is wrong, '' where it is right
    kinds: list,  # for each set what it is like: where one fails alone, those like it are tried together
    seconds: float,  # of the processor, after which nothing more is tried
    note: Callable = lambda settled, of: None,  # is told before each try how many of the sets are settled
) -> tuple:  # (numbers of the sets that can go, {number of a set: why not})
    "Find the sets that can be removed together, where those that fail are few or alike."
    return _Bisection(sets, fails, kinds, time.process_time() + seconds, note).run()


class _Bisection:
    def __init__(self, sets, fails, kinds, end, note):
        self.sets, self.fails, self.kinds, self.end, self.note = sets, fails, kinds, end, note
        self.good, self.bad = [], {}

    def run(self):
        self._try(list(range(len(self.sets))))
        return self.good, self.bad

    def _try(self, numbers):
        numbers = [n for n in numbers if n not in self.bad and n not in self.good]
        if not numbers: return
        if time.process_time() > self.end:
            self.bad |= dict.fromkeys(numbers, NOT_TRIED)
            return
        reason = self._reason([*self.good, *numbers])
        if not reason: self.good += numbers
        elif len(numbers) == 1: self._refuse(numbers[0], reason)
        else:
            half = len(numbers) // 2
            self._try(numbers[:half])
            self._try(numbers[half:])

    def _reason(self, numbers):
        self.note(len(self.good) + len(self.bad), len(self.sets))
        return self.fails([self.sets[n] for n in numbers])

    def _refuse(self, number, reason):
        "Refuse a set, and with it those of its kind, unless they can go together."
        self.bad[number] = reason
        alike = [n for n, kind in enumerate(self.kinds) if kind == self.kinds[number]]
        alike = [n for n in alike if n not in self.bad and n not in self.good]
        if not alike: return
        reason = self._reason([*self.good, *alike])
        if reason: self.bad |= dict.fromkeys(alike, reason)
        else: self.good += alike
