"Budgets, with pretended timings: nothing here depends on the clock."
import os
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import convnet
from torch import nn
from torch.nn import functional as F

from fasterai.costs import Clock
from fasterai.damage import Trials
from fasterai.deploy import save_sparse
from fasterai.fit_to import _next_budget, fit_to
from fasterai.tradeoff import GRID, LEVELS, Table

BATCHES = [(torch.randn(16, 1, 8, 8), torch.randint(0, 10, (16,))) for _ in range(4)]
X = BATCHES[0][0][:1]
LAYERS = '0', '3', '8'


@pytest.fixture
def clock(monkeypatch):
    "Each weight that is not zero takes a microsecond; the rest of the network takes one millisecond, and more in truth."
    def latencies(model, example, masks, seconds):
        return {path: [several[0].numel() * 1e-6, *(int(keep.sum()) * 1e-6 for keep in several)] for path, several in masks.items()}

    class Pretended:
        factor = 1.

        def __init__(self, dense, example, seconds): self.ms = self(dense)

        def __call__(self, model): return 1 + self.factor * 1e-3 * kept(model)
    monkeypatch.setattr('fasterai.costs.layer_latencies', latencies)
    monkeypatch.setattr('fasterai.fit_to.Clock', Pretended)
    return Pretended


def kept(model): return sum(int((model.get_submodule(name).weight != 0).sum()) for name in LAYERS)
def as_it_was(model, before): return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
def copied(model): return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize('factor', [.3, 1., 1.3, 4.])  # of what the layers take within the network, and alone
def test_milliseconds_are_met_and_the_model_is_not_touched(clock, factor):
    model = convnet()
    before, weights = copied(model), kept(model)
    clock.factor = factor
    asked = 1 + factor * .3e-3 * weights
    found = fit_to(model, X, BATCHES, ms=asked)
    assert abs(found.reached - asked) <= .05 * asked and found.unit == 'ms' and found.asked == asked
    assert set(found.sparsities) == set(LAYERS) and as_it_was(model, before)
    for name, percent in found.sparsities.items():
        weight = found.model.get_submodule(name).weight
        assert int((weight == 0).sum()) == round(weight.numel() * percent / 100)
        assert percent == 0 or percent >= 1
    assert found.reached == 1 + factor * 1e-3 * kept(found.model) and found.dense == 1 + factor * 1e-3 * weights


def test_the_layer_that_does_the_least_harm_is_pruned_most(clock):
    model = convnet()
    model[3].weight.data[:, :3] *= 1e-4  # half of it does nothing
    found = fit_to(model, X, BATCHES, ms=1 + .65e-3 * kept(model))
    assert found.sparsities['3'] > 40 > found.sparsities['8']
    damages = {name: damage for name, *_, damage in found.rows}
    assert damages['3'] < .05


def test_damage_is_that_of_one_layer_alone_and_repair_lowers_it(clock):
    model = convnet()
    plain = fit_to(model, X, BATCHES, ms=1.2)
    repaired = fit_to(model, X, BATCHES, ms=1.2, repair=['refit', 'batchnorm'])
    for name in LAYERS:
        alone = deepcopy(model).eval()
        weight = alone.get_submodule(name).weight
        lowest = weight.detach().abs().flatten().argsort(stable=True)[:round(weight.numel() * .5)]
        weight.data.view(-1)[lowest] = 0
        with torch.no_grad(): out, wanted = alone(BATCHES[3][0]), deepcopy(model).eval()(BATCHES[3][0])
        expected = float((out - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())
        _, damage = Trials(model, BATCHES, None, 'magnitude', None, None, hold=False).damages()
        assert damage[name][1 + LEVELS.index(50)] == pytest.approx(max(damage[name][LEVELS.index(50)], expected), rel=1e-3)
    assert sum(row[-1] for row in repaired.rows) < sum(row[-1] for row in plain.rows)


def test_a_target_out_of_reach_is_refused_with_the_best(clock):
    model = convnet()
    with pytest.raises(ValueError, match=r'ms: got 0.9, expected at least 1.0\d+, the least that was reached'): fit_to(model, X, BATCHES, ms=.9)
    with pytest.raises(ValueError, match='bytes: got 100, expected at least'): fit_to(model, X, BATCHES, bytes=100)
    easy = fit_to(model, X, BATCHES, ms=99)
    assert not any(easy.sparsities.values()) and easy.reached == easy.dense


@pytest.mark.parametrize('share', [.3, .5, .8])
def test_bytes_are_never_more_and_near(share, tmp_path):
    model = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 10))
    save_sparse(model, tmp_path / 'dense')
    asked = share * os.path.getsize(tmp_path / 'dense')
    data = [torch.randn(8, 64) for _ in range(4)]
    found = fit_to(model, data[0], data, bytes=asked, repair='refit')
    save_sparse(found.model, tmp_path / 'small')
    assert .97 * asked <= os.path.getsize(tmp_path / 'small') == found.reached <= asked


def test_loss_is_held_on_batches_that_nothing_was_chosen_by():
    torch.manual_seed(0)
    model = convnet().eval()
    loss = F.cross_entropy
    asked = .02
    found = fit_to(model, X, BATCHES, loss=asked, loss_func=loss)
    x, y = BATCHES[3]
    with torch.no_grad(): rise, dense = float(loss(found.model.eval()(x), y) - loss(model(x), y)), float(loss(model(x), y))
    assert found.reached == pytest.approx(rise) and rise <= asked and found.dense == pytest.approx(dense)
    assert found.sparsity > 5
    seen = []
    def judge(out, label):
        seen.append(label)
        return loss(out, label)
    fit_to(model, X, BATCHES, loss=asked, loss_func=judge)
    assert all(label is y for label in seen)


@pytest.mark.parametrize('given, error, says', [
    ({}, ValueError, 'ms, bytes, loss: got none of them, expected exactly one'),
    ({'ms': 1, 'bytes': 2}, ValueError, 'ms, bytes, loss: got ms=1, bytes=2, expected exactly one'),
    ({'ms': -1}, ValueError, 'ms: got -1, expected a number above 0'),
    ({'ms': '5'}, TypeError, "ms: got '5'"),
    ({'loss': .1}, ValueError, 'loss_func: got None, expected a function of output and label'),
    ({'bytes': 99, 'repair': 'refitt'}, ValueError, "repair: got 'refitt'.*did you mean 'refit'"),
])
def test_what_is_wrong_is_refused(given, error, says):
    with pytest.raises(error, match=says): fit_to(convnet(), X, BATCHES, **given)


@pytest.mark.parametrize('known, budget', [
    ([(10, 10), (5, 5)], 6), ([(10, 10), (6, 5)], 6.8), ([(10, 10), (6, 3)], 8 - 2 / 7),  # on the line to the dense network
    ([(10, 12), (5, 5), (8, 9)], 5.75), ([(10, 10), (4, 8)], -2),  # the nearest above; both above
    ([(10, 10), (4, 3), (7, 2)], 8.5),  # what was measured falls where it was predicted to rise
    ([(5, 5), (5, 5.5)], 5.5),  # all below
])
def test_the_next_budget_is_on_a_line(known, budget): assert _next_budget(6, known) == pytest.approx(budget)


def test_a_clock_takes_quotients_of_rounds(monkeypatch):
    "The machine is twice as slow by the second call: that is seen in the dense network, and does not count."
    from fasterai.deploy.timing import Latency
    slow = [1., 2.]

    def times(calls, seconds, device):
        now = slow.pop(0)
        return [Latency(now * ms / 1e3, 0, 0, (now * ms / 1e3,) * 3) for ms in (6., 2.)[:len(calls)]]
    monkeypatch.setattr('fasterai.costs.side_by_side', times)
    monkeypatch.setattr('fasterai.costs.speed_up', lambda model, *_, **__: model)
    clock = Clock(convnet(), X, 0)
    assert clock.ms == 6 and clock(convnet()) == 2


def test_data_are_needed():
    with pytest.raises(ValueError, match='data: got None, expected a few batches'): fit_to(convnet(), X, bytes=99)
    with pytest.raises(ValueError, match='data: got 1 batches, expected two or more'): fit_to(convnet(), X, BATCHES[:1], loss=1, loss_func=F.cross_entropy)


def test_ctrl_c_leaves_the_model_as_it_was(clock, monkeypatch):
    model = convnet()
    before, modes = copied(model), [m.training for m in model.modules()]

    def stop(*_): raise KeyboardInterrupt
    for name in ('fit_to.Clock', 'costs.layer_latencies', 'damage.divergence_from', 'damage.layer_refit'):
        with monkeypatch.context() as patch:
            patch.setattr(f'fasterai.{name}', stop)
            with pytest.raises(KeyboardInterrupt): fit_to(model, X, BATCHES, ms=1.2, repair='refit')
        assert as_it_was(model, before) and [m.training for m in model.modules()] == modes


def test_it_prints_and_plots(clock):
    found = fit_to(convnet(), X, BATCHES, ms=1.3)
    text = str(found)
    assert text.startswith('asked 1.3 ms, reached 1.') and text.count('\n') == 2 + len(LAYERS) and '%' in found._repr_html_()
    assert list(found.to_frame()['layer']) == list(LAYERS)
    ax = found.plot()
    assert [line.get_label() for line in ax.get_lines()] == ['least harmful', 'uniform', 'global', '_chosen']
    for (cost, damage), (least_cost, least) in zip(found.curves['uniform'], found.curves['least harmful']):
        assert least <= damage + 1e-12 and least_cost <= cost + 1e-9


def test_a_table_interpolates_and_chooses():
    rows = {'a': [0., *np.linspace(1, 12, len(LEVELS))], 'b': [0., *np.linspace(.1, 1.2, len(LEVELS))]}
    cost = {name: [100., *(100 - np.array(LEVELS))] for name in rows}
    table = Table(rows, cost, 250.)
    assert table.rest == 50 and table.of({'a': 0., 'b': 0.}) == (250, 0)
    assert table.of({'a': 10., 'b': 0.}) == pytest.approx((240, .5), rel=.02)
    found = table.choose(200.)
    assert found['b'] > found['a'] and 195 <= table.of(found)[0] <= 200
    assert table.choose(0.) == table.cheapest == {'a': LEVELS[-1], 'b': LEVELS[-1]}
    cost_there, damage = table.of(table.smallest(3.))
    assert 2.5 <= damage <= 3 and cost_there < 200
    assert all(g == 0 or g >= 1 for g in GRID) and (np.diff(GRID) > 0).all()


def test_a_cost_that_was_measured_too_high_counts_as_the_one_with_fewer_zeros():
    levels, disturbed = [0, *LEVELS], 6
    rows = {'a': np.linspace(0, 1, len(levels))}
    cost = [100. - level for level in levels]
    cost[disturbed] = 100.
    table = Table(rows, {'a': cost}, 100.)
    assert table.of({'a': levels[disturbed]})[0] == pytest.approx(cost[disturbed - 1], rel=.02)
    assert (np.diff(table.cost['a']) <= 0).all()
    assert table.of(table.choose(30.))[0] == pytest.approx(30, rel=.01)


def test_its_sparsities_are_those_that_a_fit_takes(clock, make_learner):
    from fasterai.callback import SparsifyCallback
    model = convnet()
    found = fit_to(model, X, BATCHES, ms=1.2)
    learn = make_learner(model)
    learn.fit(1, cbs=SparsifyCallback(found.sparsities, schedule='one_shot'))
    assert kept(learn.model) == kept(found.model)


def test_a_fit_chooses_before_its_first_event(clock, make_learner, monkeypatch, capsys):
    from fasterai.callback import SparsifyCallback
    learn = make_learner(convnet())
    learn.logger = print
    before, chosen_on = copied(learn.model), []
    real = fit_to

    def noted(model, *args, **kwargs):
        chosen_on.append(as_it_was(model, before))
        return real(model, *args, **kwargs)
    monkeypatch.setattr('fasterai.callback.fit_to', noted)
    callback = SparsifyCallback(ms=1.2, example=X)
    assert repr(callback).startswith('SparsifyCallback(ms=1.2, schedule=')
    learn.fit(2, cbs=callback)
    said = capsys.readouterr().out
    assert said.count('sparsity: asked 1.2 ms, reached 1.') == 1 and ' %, reached ' in said
    assert abs(1 + 1e-3 * kept(learn.model) - 1.2) <= .06 and callback.sparsity.keys() == set(LAYERS)
    learn.fit(1, cbs=callback)
    assert chosen_on == [True]  # once, on the network as it was


def test_a_fit_that_is_frozen_at_first_chooses_for_all_layers(clock, make_learner):
    from fastai.callback import schedule  # noqa: F401 (it gives a Learner fine_tune)

    from fasterai.callback import SparsifyCallback
    learn = make_learner(convnet(), splitter=lambda m: [list(m[:3].parameters()), list(m[3:].parameters())])
    learn.fine_tune(1, cbs=SparsifyCallback(ms=1.2, example=X))
    assert abs(1 + 1e-3 * kept(learn.model) - 1.2) <= .06


def test_a_fit_keeps_bytes(make_learner, tmp_path):
    from fasterai.callback import SparsifyCallback
    learn = make_learner(nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10)))
    save_sparse(learn.model, tmp_path / 'dense')
    asked = round(.4 * os.path.getsize(tmp_path / 'dense'))
    learn.fit(1, cbs=SparsifyCallback(bytes=asked))
    save_sparse(learn.model, tmp_path / 'small')
    assert .97 * asked <= os.path.getsize(tmp_path / 'small') <= asked


@pytest.mark.parametrize('given, says', [
    ({}, 'sparsity, ms, bytes: got none of them, expected exactly one'),
    ({'sparsity': 50, 'ms': 3}, 'sparsity, ms, bytes: got sparsity=50, ms=3, expected exactly one'),
    ({'ms': 3}, r'example: got None, expected one batch of inputs with ms=3'),
    ({'bytes': 3, 'granularity': 'filter'}, "granularity: got 'filter', expected 'weight' with bytes=3"),
    ({'bytes': 3, 'context': '2:4'}, "context: got '2:4' with bytes=3"),
])
def test_a_callback_refuses_what_it_cannot_keep(given, says):
    from fasterai.callback import SparsifyCallback
    with pytest.raises(ValueError, match=says): SparsifyCallback(**given)
