import pytest
from fastai.callback.schedule import SchedCos  # noqa: F401 (gives a Learner fit_one_cycle)

from fasterai.callback import SparsifyCallback
from fasterai.distil import distillation
from fasterai.recipes import RECIPES
from fasterai.schedule import gradual, linear, one_cycle, one_shot, rigl


def test_a_recipe_chooses_what_was_left_open():
    callback = SparsifyCallback(95, recipe='accurate')
    assert callback.schedule == one_cycle(0, .5) and callback.distilling.teacher.choice == distillation(.9)
    callback = SparsifyCallback(95, recipe='accurate', schedule=linear(0, 1), distil=0)
    assert callback.schedule == linear(0, 1) and callback.distilling.teacher.choice is None
    assert SparsifyCallback(95).schedule == gradual(.1, .75)


@pytest.mark.parametrize('name', RECIPES)
def test_what_is_printed_can_be_typed(name):
    callback = SparsifyCallback(95, recipe=name)
    assert repr(eval(repr(callback))) == repr(callback)


def test_what_is_no_recipe():
    with pytest.raises(ValueError, match="recipe: got 'accuracy', expected one of accurate, or None; did you mean 'accurate'?"): SparsifyCallback(95, recipe='accuracy')
    with pytest.raises(TypeError, match='recipe: got 3, expected one of accurate, or None'): SparsifyCallback(95, recipe=3)


# The learning rate at the target

@pytest.mark.parametrize('how, schedule, says', [
    ('fit_one_cycle', linear(0, 1), True), ('fit_one_cycle', one_shot(at=.95), True), ('fit_one_cycle', 'gradual', False),
    ('fit_one_cycle', rigl(every=.1), False),  # the first steps are slow too
    ('fit', linear(0, 1), False)])
def test_a_learning_rate_that_is_too_low(make_learner, capsys, how, schedule, says):
    learn = make_learner(batches=10)
    learn.logger = print
    getattr(learn, how)(2, 1e-3, cbs=SparsifyCallback(80, schedule=schedule))
    assert ('% of its peak when the sparsity was reached' in capsys.readouterr().out) == says


def test_a_learner_without_a_recorder(make_learner):
    learn = make_learner(batches=10, metrics=[])
    learn.remove_cb(learn.recorder)
    learn.fit(1, cbs=SparsifyCallback(80, schedule=linear(0, 1)))
