from functools import partial

import pytest
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from torch import nn

from fasterai import tickets
from fasterai.keep import KeepSparse
from fasterai.schedule import steps
from fasterai.tickets import ANEW, SHUFFLED, TICKET, Ticket, find_ticket


class Watch(Callback):
    "Keeps weights before each batch that is trained, for each fit."
    order, all = 20, ()
    def before_fit(self): self.all = [*self.all, []]  # also before a validation

    @property
    def fits(self): return [fit for fit in self.all if fit]

    def before_batch(self):
        if not self.training: return
        momentum = self.opt.state[self.model[1].bias].get('grad_avg', torch.zeros(1))
        self.all[-1].append({name: value.clone() for name, value in [*self.model.state_dict().items(), ('momentum', momentum)]})


def fit(learn): learn.fit(2, .1)


def search(learn, **more): return find_ticket(learn, fit, **{'sparsity': 80, 'rounds': 2} | more)


def alike(one, other, names): return all(torch.equal(one[name], other[name]) for name in names)


@pytest.mark.parametrize('rewind_to, k', [(0, 0), (steps(3), 3), (.75, 6)])
def test_each_round_begins_where_the_first_was(make_learner, rewind_to, k):
    watch = Watch()
    fit = partial(Learner.fit, n_epoch=2, lr=.1, reset_opt=bool(k))
    found = find_ticket(make_learner(cbs=watch), fit, 80, 2, rewind_to, compare=False)
    dense, one, two = watch.fits
    assert [len(fit) for fit in watch.fits] == [8, 8 - k, 8 - k]
    for nth, fit in enumerate((one, two), 1):
        then = {name: value.clone() for name, value in dense[k].items()}
        for name, keep in found.masks_of(nth).items(): then[f'{name}.weight'] *= keep
        assert alike(fit[0], then, then) and not alike(fit[1], then, ['8.weight'])
    assert [sum(int((~keep).sum()) for keep in found.masks_of(nth).values()) for nth in range(3)] == [0, round(566 * (1 - .2 ** .5)), 453]
    assert found.sparsities == pytest.approx([0, 100 * 313 / 566, 100 * 453 / 566])


def test_others_beside_it(make_learner):
    watch = Watch()
    found = search(make_learner(cbs=watch))
    assert list(found.values) == [(TICKET, 0), (TICKET, 1), (TICKET, 2), (ANEW, 1), (SHUFFLED, 1), (ANEW, 2), (SHUFFLED, 2)]
    first, last, anew, shuffled = [fit[0] for fit in (watch.fits[0], watch.fits[2], *watch.fits[-2:])]
    for name, keep in found.masks.items():
        w = f'{name}.weight'
        assert torch.equal(anew[w] != 0, keep) and not torch.isin(anew[w][keep], first[w]).any()
        assert (shuffled[w] != 0).sum() == keep.sum() and torch.equal(shuffled[w], first[w] * (shuffled[w] != 0))
    assert not torch.equal(shuffled['3.weight'] != 0, last['3.weight'] != 0)
    assert '80.04 %' in str(found) and found.to_frame().shape == (3, 3) and '<table>' in found._repr_html_()
    assert len(found.plot().lines) == 4


@pytest.mark.parametrize('interrupted', range(7))
def test_ctrl_c_and_going_on(make_learner, monkeypatch, interrupted):
    learn, n = make_learner(), 0
    came = {name: value.clone() for name, value in learn.model.state_dict().items()}
    def fit(learn):
        nonlocal n
        n += 1
        torch.manual_seed(0)
        if n == interrupted + 1:
            learn.fit(1, .1)
            raise KeyboardInterrupt
        learn.fit(2, .1)
    part = find_ticket(learn, fit, 80, 2)
    assert len(part.values) == interrupted and alike(learn.model.state_dict(), came, came)
    assert f'{7 - interrupted} trainings are left' in str(part)
    whole = find_ticket(learn, fit, 80, 2, so_far=part)
    assert n == 8 and whole is part and 'left' not in str(whole)
    assert whole.values[TICKET, 2] == find_ticket(make_learner(), fit, 80, 2).values[TICKET, 2]
    assert alike(learn.model.state_dict(), came, came) and not learn.cbs.filter(lambda cb: isinstance(cb, KeepSparse))


def test_a_model_becomes_the_ticket(make_learner):
    learn, other = make_learner(), make_learner().model
    found = search(learn, compare=False)
    nn.init.zeros_(other[8].bias)
    sparsifier = found.put_into(other)
    assert torch.equal(other[8].bias, learn.model[8].bias)
    assert torch.equal(other[3].weight, learn.model[3].weight * found.masks['3'])
    assert sparsifier.report().zeros == 453


def test_filters(make_learner):
    watch = Watch()
    found = search(make_learner(cbs=watch), sparsity=50, rounds=1, granularity='filter', context='local')
    for fit in watch.fits[1:]:
        assert [int(fit[0][f'{i}.weight'].flatten(1).any(1).sum()) for i in (0, 3)] == [3, 4]
        assert (fit[0]['0.bias'] == 0).sum() == 3
    assert not found.jobs


def test_criteria(make_learner):
    for criteria in ('magnitude_increase', 'gradient', 'wanda'):
        more = {'context': 'local'} if criteria == 'wanda' else {}
        assert search(make_learner(), rounds=1, criteria=criteria, compare=False, **more).sparsities[-1] == pytest.approx(80, abs=.2)
    with pytest.raises(ValueError, match="criteria: got 'movement'"): search(make_learner(), criteria='movement')


def test_rounds():
    assert tickets._levels(90, None) == pytest.approx([100 * (1 - .1 ** (i / 11)) for i in range(12)])
    assert tickets._levels(20, None) == (0, 20) and len(tickets._levels(36, None)) == 3
    assert tickets._levels(90, 1) == (0, 90)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(64, 10))

    def forward(self, x): return x.flatten(1) @ self.w


def test_what_is_wrong_is_said_before_the_first_training(make_learner):
    learn, part = make_learner(), Ticket(None, (0, 50), 'accuracy', False)
    wrong = [(dict(sparsity=0), 'sparsity: got 0'), (dict(sparsity=100), 'sparsity: got 100'), (dict(rounds=0), 'rounds: got 0'),
             (dict(rewind_to=2), 'rewind_to: got 2, expected a share'), (dict(so_far=part), 'so_far: got one with 1 rounds up to 50 %'),
             (dict(so_far=3), 'so_far: got int'), (dict(compare=1), 'compare: got 1'), (dict(initialize=3), 'initialize: got 3')]
    for given, says in wrong:
        with pytest.raises((ValueError, TypeError), match=says): search(learn, **given)
    with pytest.raises(TypeError, match='fit: got'): find_ticket(learn, 3)
    with pytest.raises(TypeError, match='learn: got Own'): find_ticket(Own(), fit)
    with pytest.raises(ValueError, match="initialize: got None.*'0' has no reset_parameters"): search(make_learner(model=nn.Sequential(Own(), nn.Linear(10, 10))))
    with pytest.raises(ValueError, match='learn: got one with keep_sparse'): search(make_learner(cbs=KeepSparse()))
    with pytest.raises(ValueError, match='before the end of the training, step 8'): search(learn, rewind_to=1)
    with pytest.raises(ValueError, match='has trained no batch'): find_ticket(learn, lambda learn: None)
    assert search(make_learner(model=nn.Sequential(Own(), nn.Linear(10, 10))), rounds=1, initialize=lambda model: nn.init.normal_(model[0].w)).done == 2
