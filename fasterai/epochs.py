"Which epochs may be the best, and the column of their sparsity in fastai's table."
from fastai.callback.tracker import TrackerCallback
from fastai.learner import ValueMetric, noop


class Column:
    """The sparsity in the table of the Recorder, which takes its names from the metrics in before_fit.

    The metric is there only until then, for later it would be in the way of other validations."""

    def __init__(self, owner):
        self.owner, self.name = owner, None  # whose column it is, a callback

    def add(self, learn):
        "Add the metric, under a name that is free."
        others = [m for m in learn.metrics if self._stays(m, learn)]
        taken = [m.name for m in others]
        names = ['sparsity', *(f'sparsity_{i}' for i in range(2, len(taken) + 3))]
        self.name = next(name for name in names if name not in taken)
        column = ValueMetric(noop, self.name)
        column.owner = self.owner
        learn.metrics = others + [column]

    def _stays(self, metric, learn):
        "Whether a metric is not one of ours, or of another callback of this Learner."
        owner = _owner(metric)
        return owner is not self.owner and (owner is None or any(owner is cb for cb in learn.cbs))

    def remove(self, learn):
        "Take the metric away; the column stays."
        learn.metrics = [m for m in learn.metrics if _owner(m) is not self.owner]

    def fill(self, learn, value):
        "Write an epoch's value."
        recorder = getattr(learn, 'recorder', None)
        if recorder is None: return
        for i, name in enumerate(recorder.metric_names):
            if name not in (self.name, f'train_{self.name}', f'valid_{self.name}'): continue
            recorder.log += [None] * (i - len(recorder.log))  # where an epoch was broken off
            recorder.log.insert(i, value)


class Trackers:
    "The callbacks that compare epochs, save them or stop by them: SaveModelCallback, EarlyStoppingCallback and their like."

    def __init__(self): self.paused = []

    def pause(self, learn, spare=lambda tracker: False):
        "Have them skip an epoch, but those that are spared."
        self.paused = [cb for cb in learn.cbs if isinstance(cb, TrackerCallback) and cb.run and not spare(cb)]
        for cb in self.paused: cb.run = False

    def resume(self):
        for cb in self.paused: cb.run = True
        self.paused = []


def saves_every_epoch(tracker): return getattr(tracker, 'every_epoch', False)
def saves_at_end(tracker): return getattr(tracker, 'at_end', False)
def _owner(metric): return getattr(metric, 'owner', None)
