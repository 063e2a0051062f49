"""Know which positions of which axes can only go together, and which must stay.

Each position of an axis has a label. A row of labels stands for one position of an axis that was merged
from several: it goes where one of its labels goes. Label 0 never goes."""
from typing import NamedTuple

import numpy as np

from fasterai.connected import lowest_connected
from fasterai.deploy.why import IS_INPUT, LAST_ONE, MEETS_NONZERO, NOT_ALL, UNEVEN, UNREAD

FIXED = 0


class Even(NamedTuple):
    "Describe an axis that is split into parts, each of which must lose the same number of positions."
    rows: np.ndarray  # (positions, k) labels
    parts: int
    may_vanish: np.ndarray | None = None  # rows of another axis, whose parts vanish with those of this one


class Grouped(NamedTuple):
    "Describe a grouped convolution, whose weight has other inputs for each group."
    weight: object  # the parameter
    ins: np.ndarray  # rows of the input's channels
    outs: np.ndarray  # rows of the output's
    groups: int
    by_inputs: bool = True  # False: the weight has no axis of inputs of a group to cut, as of transposed depthwise ones


class Labels:
    "Collect what a run says of labels: which are bound to each other, read, or cannot go."

    def __init__(self):
        self.size = 1  # number of labels so far
        self.bound = []  # (rows, rows)
        self.stuck = [(np.array([FIXED]), IS_INPUT)]  # (labels, reason)
        self.read_at_all = []  # labels that a layer reads
        self.lost = []  # (labels, reason): zero before an operation, and not behind it
        self.even = []  # of `Even`
        self.grouped = []  # of `Grouped`
        self.axes = []  # (first label, length) of the axes of parameters: one position of each stays

    def new(self,
        length: int,
        owned: bool = False,  # True for an axis of a parameter or buffer
    ) -> np.ndarray:  # (length, 1)
        "Return labels for a new axis."
        rows = np.arange(self.size, self.size + length)[:, None]
        if owned and length: self.axes.append((self.size, length))
        self.size += length
        return rows

    def bind(self, a, b):
        "Note that the n-th positions of two axes go together; return the simpler rows."
        if a is b: return a
        if a.shape != b.shape or not np.array_equal(a, b): self.bound.append((a, b))
        return a if a.shape[1] <= b.shape[1] and a.any() else b

    def block(self, rows, reason):
        "Note that positions must stay."
        labels = np.unique(rows)
        labels = labels[labels != FIXED]
        if len(labels): self.stuck.append((labels, reason))

    def read(self, rows, zero):
        "Note that a layer reads positions: those that are not zero must stay."
        if not rows.any(): return
        self.read_at_all.append(np.unique(rows))
        self.block(rows[~zero], MEETS_NONZERO)

    def level(self, rows, parts):
        "Note that an axis is split into parts of one length, each of which must lose as much."
        if rows.any(): self.even.append(Even(rows, parts))

    def group(self, grouped):
        "Note a grouped convolution: whole groups go, or as many channels in each."
        self.grouped.append(grouped)
        if len(grouped.ins) == grouped.groups: return  # a group is one channel
        self.even += [Even(grouped.ins, grouped.groups, grouped.outs),
                      Even(grouped.outs, grouped.groups, grouped.ins)]

    def lose(self, rows, positions, reason):
        "Note that positions that were zero are zero no more."
        if positions.any() and rows.any(): self.lost.append((np.unique(rows[positions]), reason))


class Solved(NamedTuple):
    "Say which labels go, and for the others why not."
    gone: np.ndarray  # bool (labels,)
    why: np.ndarray  # int (labels,), of `reasons`
    reasons: list
    root: np.ndarray  # (labels,) which labels are one


def solve(
    labels: Labels,
    keep: list = (),  # (labels, reason) that must stay besides
) -> Solved:
    "Find the most labels that can go."
    return _Search(labels, keep).run()


class _Search:
    "Begin with all labels, and take back those that must stay, until nothing changes."

    def __init__(self, labels, keep):
        self.labels = labels
        single = [(a[:, 0], b[:, 0]) for a, b in labels.bound if a.shape[1] == b.shape[1] == 1]
        first = np.concatenate([np.zeros(0, int), *(a for a, _ in single)])
        second = np.concatenate([np.zeros(0, int), *(b for _, b in single)])
        self.root = lowest_connected(labels.size, first, second)
        self.gone = np.ones(labels.size, bool)
        self.why = np.zeros(labels.size, int)
        self.reasons = [UNREAD]
        self.compound = _stacked([(self.root[a], self.root[b]) for a, b in labels.bound
                                  if not a.shape[1] == b.shape[1] == 1])
        lost = {}
        for some, reason in labels.lost:
            for i in self.root[some].tolist(): lost.setdefault(i, reason)
        owned = np.zeros(labels.size, bool)
        for first, length in labels.axes: owned[self.root[first:first + length]] = True
        linked = self._linked()
        read = np.zeros(labels.size, bool)
        for some in labels.read_at_all: read[linked[some]] = True
        read = read[linked]
        for some, reason in [*labels.stuck, *keep]: self._stay_or_lost(self.root[some], reason, lost)
        self._stay(np.flatnonzero(owned & ~read), UNREAD)

    def _linked(self):
        "Return, for each label, the first of those that it is bound to in any way."
        first, second = [np.arange(self.labels.size)], [self.root]
        for a, b in self.compound:
            rows = np.concatenate([a, b], 1)
            at = np.broadcast_to(rows.max(1, keepdims=True), rows.shape)
            first.append(rows[rows != FIXED])
            second.append(at[rows != FIXED])
        return lowest_connected(self.labels.size, np.concatenate(first), np.concatenate(second))

    def run(self):
        while self._follow() or self._level() or self._leave_one(): pass
        return Solved(self.gone[self.root], self.why[self.root], self.reasons, self.root)

    def _stay_or_lost(self, roots, reason, lost):
        if reason != MEETS_NONZERO: return self._stay(roots, reason)
        for i in np.unique(roots).tolist(): self._stay(np.array([i]), lost.get(i, reason))

    def _number(self, reason):
        if reason not in self.reasons: self.reasons.append(reason)
        return self.reasons.index(reason)

    def _stay(self, roots, reason):
        "Take labels back; return whether any were gone."
        roots = roots[self.gone[roots]]
        self.gone[roots] = False
        self.why[roots] = self._number(reason) if isinstance(reason, str) else reason[:len(roots)]
        return bool(len(roots))

    def _follow(self):
        "Take back what is bound to what stays."
        changed = False
        while True:
            before = self.gone.sum()
            for a, b in self.compound:
                self._follow_one(a, b)
                self._follow_one(b, a)
            if self.gone.sum() == before: return changed
            changed = True

    def _follow_one(self, a, b):
        bad = self.gone[a].any(1) & ~self.gone[b].any(1)
        if not bad.any(): return
        other = self.why[b[bad]].max(1)  # of a label that stays with it
        fallback = self._number(NOT_ALL)
        for column in a[bad].T:
            alive = self.gone[column]
            self.why[column[alive]] = np.where(other[alive] > 0, other[alive], fallback)
        self.gone[a[bad]] = False

    def _level(self):
        "Take back what one part of an axis loses more than another."
        changed = False
        for even in self.labels.even:
            rows = self.root[even.rows].reshape(even.parts, -1, even.rows.shape[1])
            gone = self.gone[rows].any(2)
            counts = gone.sum(1)
            whole = counts == gone.shape[1]
            if even.may_vanish is None: whole[:] = False
            else: whole = self._whole(whole, gone, rows, even)
            if whole.all(): continue
            least = counts[~whole].min()
            for part in np.flatnonzero(~whole & (counts > least)):
                surplus = rows[part][gone[part]][least:]
                changed |= self._stay(np.unique(surplus), UNEVEN)
        return changed

    def _whole(self, whole, gone, rows, even):
        "Return the parts that vanish on both sides; one that would vanish on this side alone does not."
        other = self.root[even.may_vanish].reshape(even.parts, -1, even.may_vanish.shape[1])
        return whole & self.gone[other].any(2).all(1)

    def _leave_one(self):
        "Take back one position of each axis of a parameter that would lose all."
        for first, length in self.labels.axes:
            roots = self.root[first:first + length]
            if self.gone[roots].all() and self._stay(roots[:1], LAST_ONE): return True
        return False


def _stacked(pairs):
    "Return pairs of rows, stacked where they have as many labels."
    by_width = {}
    for a, b in pairs: by_width.setdefault((a.shape[1], b.shape[1]), []).append((a, b))
    return [tuple(np.concatenate(side) for side in zip(*some)) for some in by_width.values()]
