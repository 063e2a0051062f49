from copy import deepcopy

import pytest
import torch
from conftest import convnet
from torch import nn

from fasterai.callback import SparsifyCallback
from fasterai.sensitivity import Sensitivity, sensitivity


def kept(model):
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return [float((layer.weight != 0).float().mean()) for layer in layers]


def bits(model): return [t.detach().clone() for t in (*model.parameters(), *model.buffers())]


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.filterwarnings('ignore:sparsity')
@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_each_layer_alone_and_all_as_before(granularity):
    net, seen = convnet(), []
    net(torch.randn(8, 1, 8, 8))
    with torch.no_grad(): net[0].weight[0] = 0  # zeros from before are kept
    before = bits(net)
    example = torch.randn(2, 1, 8, 8)
    found = sensitivity(net, lambda m: seen.append(kept(m)) or 1., granularity, levels=(50, 90), example=example)
    assert same(before, bits(net))
    assert list(found.values) == (['0', '3', '8'] if granularity == 'weight' else ['0', '3'])
    dense, *rest = seen
    assert len(rest) == 2 * len(found.values)
    for i, shares in enumerate(rest):
        layer, level = divmod(i, 2)
        assert [s for j, s in enumerate(shares) if j != layer] == [s for j, s in enumerate(dense) if j != layer]
        if granularity == 'weight': assert shares[layer] == pytest.approx((.5, .1)[level], abs=.01)


def test_a_learner_is_validated(make_learner):
    learn = make_learner(convnet(), cbs=SparsifyCallback(50))
    before = bits(learn.model)
    found = sensitivity(learn, levels=[50])
    assert found.metric == 'accuracy' and found.higher_is_better and found.dense == learn.validate()[1]
    assert same(before, bits(learn.model))
    learn = make_learner(convnet(), metrics=[])
    found = sensitivity(learn, levels=[50])
    assert found.metric == 'valid_loss' and not found.higher_is_better
    assert found.dense == learn.validate()[0]


@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_analysis_leaves_the_weights_as_they_were(error):
    net, calls = convnet(), []
    before = bits(net)
    def metric(model):
        calls.append(0)
        if len(calls) == 4: raise error
        return 1.
    if error is KeyboardInterrupt:
        assert sensitivity(net, metric, levels=(50, 90)).values == {'0': {50: 1., 90: 1.}}
    else:
        with pytest.raises(RuntimeError): sensitivity(net, metric, levels=(50, 90))
    assert same(before, bits(net))


def measured():
    values = {'a': {50: .9, 90: .9}, 'b': {50: .8, 90: .1}}
    return Sensitivity(values, {'a': 100, 'b': 300}, .9, 'accuracy', True)


def test_damage_never_falls():
    found = Sensitivity({'a': {10: .8, 50: .85, 90: .7}}, {'a': 10}, .9, 'accuracy', True)
    assert list(found.damage('a').values()) == pytest.approx([.1, .1, .2])
    assert Sensitivity({'a': {10: 2., 50: .5}}, {'a': 10}, 1., 'loss', False).damage('a') == {10: 1., 50: 1.}


@pytest.mark.parametrize('sparsity', [0, 20, 22.5, 40, 60, 80, 90])
def test_suggestions_add_up(sparsity):
    given = measured().suggest(sparsity)
    assert (100 * given['a'] + 300 * given['b']) / 400 == pytest.approx(sparsity, abs=.1 if sparsity else 1)
    assert all(0 <= s <= 90 for s in given.values())
    assert given['a'] >= given['b']  # pruning it costs nothing up to 90 %
    if sparsity in (22.5,): assert given['a'] > 80


def test_suggestions_are_what_the_callback_takes(make_learner):
    learn = make_learner(convnet())
    given = sensitivity(learn, levels=(25, 50, 90)).suggest(60)
    callback = SparsifyCallback(given)
    learn.fit(1, cbs=callback)
    assert callback.sparsifier.report().sparsity == pytest.approx(60, abs=.5)


def test_how_it_shows():
    found = measured()
    assert 'accuracy, dense: 0.9' in str(found) and '0.1' in str(found) and '<table>' in found._repr_html_()
    assert found.to_frame().loc['b', 90] == .1 and list(found.to_frame().columns) == [50, 90]
    ax = found.plot()
    assert len(ax.lines) == 3 and ax.get_ylabel() == 'accuracy' and found.plot(ax) is ax
    assert found.heatmap().images[0].get_array().shape == (2, 2)


@pytest.mark.parametrize('arguments, error, says', [
    (dict(model=3), TypeError, 'model: got int, expected a torch.nn.Module or a fastai Learner'),
    (dict(model=nn.Linear(2, 2)), ValueError, 'metric: got None'),
    (dict(model=nn.Linear(2, 2), metric=len, levels=[0]), ValueError, 'levels: got'),
    (dict(model=nn.Linear(2, 2), metric=len, levels=[]), ValueError, 'levels: got')])
def test_bad_arguments(arguments, error, says):
    with pytest.raises(error, match=says): sensitivity(**arguments)
    with pytest.raises(ValueError, match='sparsity: got 95, expected 0 to 90'): measured().suggest(95)


def test_copies_stay_apart():
    net = convnet()
    twin = deepcopy(net)
    sensitivity(net, lambda m: 1., levels=[90])
    assert same(bits(net), bits(twin))
