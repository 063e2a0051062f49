"Let only epochs at the final sparsity be the best, and show the sparsity of each epoch in fastai's table."
from fastai.callback.tracker import TrackerCallback
from fastai.learner import ValueMetric, noop


class Column:
    """Add a column with the sparsity to fastai's table.

    The Recorder reads the names of its columns from the metrics in before_fit. The metric that makes ours
    is taken away after that, for later validations would call it."""

    def __init__(self,
        owner,  # the callback that it belongs to
    ):
        self.owner, self.name = owner, None

    def add(self, learn):
        "Add the metric, under a name that no other has."
        others = [metric for metric in learn.metrics if self._stays(metric, learn)]
        taken = [metric.name for metric in others]
        names = ['sparsity', *(f'sparsity_{i}' for i in range(2, len(taken) + 3))]
        self.name = next(name for name in names if name not in taken)
        column = ValueMetric(noop, self.name)
        column.owner = self.owner
        learn.metrics = others + [column]

    def _stays(self, metric, learn):
        "Tell whether a metric is neither ours nor left over from a callback that was removed."
        owner = _owner(metric)
        if owner is None: return True
        return owner is not self.owner and any(owner is cb for cb in learn.cbs)

    def remove(self, learn):
        "Take the metric away. The column stays."
        learn.metrics = [metric for metric in learn.metrics if _owner(metric) is not self.owner]

    def fill(self, learn, value):
        "Write the value of an epoch."
        recorder = getattr(learn, 'recorder', None)
        if recorder is None: return
        for i, name in enumerate(recorder.metric_names):
            if name not in (self.name, f'train_{self.name}', f'valid_{self.name}'): continue
            recorder.log += [None] * (i - len(recorder.log))  # an epoch that was cancelled has no other values
            recorder.log.insert(i, value)


class Trackers:
    "Pause the callbacks that compare epochs: SaveModelCallback, EarlyStoppingCallback, ReduceLROnPlateau."

    def __init__(self): self.paused = []

    def pause(self,
        learn,
        spare=lambda tracker: False,  # tracker -> bool: it goes on
    ):
        "Switch them off until `resume`."
        trackers = [cb for cb in learn.cbs if isinstance(cb, TrackerCallback) and cb.run]
        self.paused = [tracker for tracker in trackers if not spare(tracker)]
        for tracker in self.paused: tracker.run = False

    def resume(self):
        "Switch on those that were paused."
        for tracker in self.paused: tracker.run = True
        self.paused = []


def saves_every_epoch(tracker): return getattr(tracker, 'every_epoch', False)
def saves_at_end(tracker): return getattr(tracker, 'at_end', False)
def drop_columns(learn, spare=()):
    """Take away the metrics of columns that a fit has left which broke off before its first epoch.

    `spare` are the callbacks that prune in this fit."""
    learn.metrics = [m for m in learn.metrics if _owner(m) is None or any(_owner(m) is cb for cb in spare)]


def _owner(metric): return getattr(metric, 'owner', None)
