from types import SimpleNamespace

from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback

from fasterai.epochs import Column, Trackers, saves_every_epoch


def metric(name, owner=None):
    found = SimpleNamespace(name=name)
    if owner is not None: found.owner = owner
    return found


def names(learn): return [m.name for m in learn.metrics]


def test_the_column_gets_a_name_that_is_free():
    learn = SimpleNamespace(metrics=[metric('accuracy'), metric('sparsity')], cbs=[])
    column = Column('me')
    column.add(learn)
    assert names(learn) == ['accuracy', 'sparsity', 'sparsity_2']
    column.remove(learn)
    assert names(learn) == ['accuracy', 'sparsity']


def test_columns_of_callbacks_that_are_gone_are_cleared_away():
    there, gone, me = 'there', 'gone', 'me'
    learn = SimpleNamespace(metrics=[metric('a', there), metric('b', gone), metric('c', me)], cbs=[there, me])
    Column(me).add(learn)
    assert names(learn) == ['a', 'sparsity']


def test_a_value_goes_to_its_place_in_the_log():
    recorder = SimpleNamespace(metric_names=['epoch', 'train_loss', 'sparsity', 'time'], log=[0])
    learn = SimpleNamespace(metrics=[], cbs=[], recorder=recorder)
    column = Column('me')
    column.add(learn)
    column.fill(learn, 50.)
    assert recorder.log == [0, None, 50.]
    column.fill(SimpleNamespace(), 50.)  # without a Recorder there is no table


def test_trackers_pause_and_go_on():
    every, best, stopped = SaveModelCallback(every_epoch=True), SaveModelCallback(), EarlyStoppingCallback()
    stopped.run = False
    learn, trackers = SimpleNamespace(cbs=[every, best, stopped, 'another callback']), Trackers()
    trackers.pause(learn, spare=saves_every_epoch)
    assert [every.run, best.run, stopped.run] == [True, False, False]
    trackers.resume()
    assert [every.run, best.run, stopped.run] == [True, True, False]  # one that was off stays off
