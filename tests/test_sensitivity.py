from copy import deepcopy

import pytest
import torch
from conftest import convnet
from torch import nn

from fasterai.callback import SparsifyCallback
from fasterai.repair import recalibrate
from fasterai.sensitivity import Sensitivity, sensitivity
from fasterai.sparsifier import Sparsifier

pytestmark = pytest.mark.filterwarnings('ignore:data. got None')  # of networks with BatchNorm, where another fact is tested


def kept(model):
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return [float((layer.weight != 0).float().mean()) for layer in layers]


def bits(model): return [t.detach().clone() for t in (*model.parameters(), *model.buffers())]


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_an_example_by_keywords():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, *, inputs): return self.head(self.body(inputs))
    found = sensitivity(Keywords(), lambda m: 1., 'filter', levels=(50,), example={'inputs': torch.randn(2, 8)})
    assert list(found.values) == ['body']


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


# What cannot be put back, and what is no number

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', ['expanded', 'float8', 'inference'])
def test_weights_that_cannot_be_zeroed_are_refused_before_anything_is(kind):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    weight = torch.randn(3, 4)
    if kind == 'expanded': weight = weight[:, :1].expand(3, 4)
    if kind == 'float8': weight = weight.to(torch.float8_e4m3fn)
    if kind == 'inference':
        with torch.inference_mode(): weight = weight.clone()
    net[1].weight = nn.Parameter(weight, requires_grad=False)
    before, calls = bits(net), []
    with pytest.raises(ValueError, match="layers: the weight of '1'"): sensitivity(net, lambda m: calls.append(0) or 1.)
    assert not calls and all(torch.equal(a.float(), b.float()) for a, b in zip(before, bits(net), strict=True))
    sensitivity(net, lambda m: 1., layers='0')
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(before, bits(net), strict=True))


def test_values_come_back_first(monkeypatch):
    net = convnet()
    before = bits(net)
    def fails(self, state): raise RuntimeError
    monkeypatch.setattr(Sparsifier, 'load_state_dict', fails)
    with pytest.raises(RuntimeError): sensitivity(net, lambda m: 1., 'filter')
    assert same(before, bits(net))


@pytest.mark.parametrize('metric, error, says', [
    (lambda: .5, TypeError, 'metric: got <lambda>, expected a function of the model'),
    (lambda a, b: .5, TypeError, 'metric: got <lambda>, expected a function of the model'),
    (7, TypeError, 'metric: got 7, expected a function of the model'),
    ('acc', TypeError, "metric: got 'acc', expected a function of the model"),
    (lambda m: None, TypeError, 'metric: got None from <lambda>, expected a number'),
    (lambda m: 'acc', TypeError, "metric: got 'acc' from <lambda>, expected a number"),
    (lambda m: torch.ones(2), TypeError, 'metric: got .* from <lambda>, expected a number'),
    (lambda m: 1j, TypeError, 'metric: got 1j from <lambda>, expected a number'),
    (lambda m: float('nan'), ValueError, 'metric: got nan from <lambda>, expected a number'),
    (lambda m: torch.tensor(float('inf')), ValueError, 'metric: got .*inf.* from <lambda>')])
def test_metrics_that_are_none(metric, error, says):
    net = convnet()
    before = bits(net)
    with pytest.raises(error, match=says): sensitivity(net, metric)
    assert same(before, bits(net))


def test_a_metric_that_is_lost_on_the_way():
    net = convnet()
    before, answers = bits(net), iter([1., 1., float('nan')])
    with pytest.raises(ValueError, match="metric: got nan from <lambda> with '0' at 90 %"):
        sensitivity(net, lambda m: next(answers), levels=(50, 90))
    assert same(before, bits(net))


@pytest.mark.parametrize('levels', [50, None, (True,), (None,), ('a',), 'all', (float('nan'),), (.5,), (101,), (0,), [[50]], {}])
def test_levels_that_are_none(levels):
    calls = []
    with pytest.raises((TypeError, ValueError), match='levels: got'): sensitivity(convnet(), lambda m: calls.append(0) or 1., levels=levels)
    assert not calls


def test_levels_may_be_a_tensor():
    assert sensitivity(convnet(), lambda m: 1., levels=torch.tensor([90, 50]), layers='0').levels == [50, 90]


@pytest.mark.parametrize('sparsity', [None, 'x', '50', True, float('nan'), [50], -1, 1000])
def test_suggestions_for_no_sparsity(sparsity):
    with pytest.raises((TypeError, ValueError), match='sparsity: got'): measured().suggest(sparsity)


@pytest.mark.parametrize('wrong', [dict(higher_is_better='yes'), dict(higher_is_better=float('nan'))])
def test_flags(wrong):
    with pytest.raises(TypeError, match='higher_is_better: got .*expected True, False or None'): sensitivity(convnet(), lambda m: 1., **wrong)


def test_the_damage_of_no_layer():
    with pytest.raises(ValueError, match="layer: got 'c', expected one of a, b"): measured().damage('c')


def test_frozen_layers_are_measured_too(net):
    net[:6].requires_grad_(False)
    assert list(sensitivity(net, lambda model: 1., levels=(50,)).values) == list(sensitivity(net.requires_grad_(False), lambda model: 1., levels=(50,)).values) == ['0', '3', '8']


# Repairing

def trained():
    "A network of which the statistics of BatchNorm are those of its data; inputs; and how far outputs are from its own."
    torch.manual_seed(0)
    net, x = convnet(), torch.randn(96, 1, 8, 8) + .5
    for _ in range(30): net(x)
    wanted = net.eval()(x).detach()
    def error(model):
        with torch.no_grad(): return float((model(x) - wanted).square().mean())
    return net, x, error


@pytest.mark.parametrize('granularity', ['weight', 'filter'])
@pytest.mark.parametrize('repair', ['batchnorm', 'refit', ('refit', 'batchnorm')], ids=str)
def test_what_is_repaired_is_damaged_less(granularity, repair):
    net, x, error = trained()
    net[3].train()
    before, modes, rng = bits(net), [m.training for m in net.modules()], torch.get_rng_state()
    given = dict(metric=error, granularity=granularity, levels=(30, 60), higher_is_better=False, example=x[:2])
    repaired, cut = sensitivity(net, **given, data=x.split(16), repair=repair), sensitivity(net, **given, repair=None)
    damages = [(repaired.damage(layer)[level], cut.damage(layer)[level]) for layer in cut.values for level in cut.levels]
    assert all(a <= b for a, b in damages) and any(a < .9 * b for a, b in damages)
    assert same(before, bits(net)) and modes == [m.training for m in net.modules()] and torch.equal(rng, torch.get_rng_state())


def test_batchnorm_is_repaired_by_default_with_training_items_of_a_learner(make_learner):
    learn = make_learner(metrics=[])
    learn.fit(8, 1e-2)
    before, seen = bits(learn.model), []
    def watched(model, dense, data):
        seen.extend(len(args[0]) for args, in data)
        return recalibrate(model, dense, data)
    found = sensitivity(learn, levels=(60,))
    assert found.repaired == ('batchnorm',) and 'repaired with batchnorm, with one layer alone at' in str(found)
    assert found.plot().get_xlabel() == 'sparsity of one layer alone (%), repaired with batchnorm'
    again = sensitivity(learn, levels=(60,), repair=[watched])
    assert again.values == found.values and again.repaired == ('watched',) and seen == [8] * 4 * 3
    drawn = []
    for repair in ('batchnorm', None):  # `validate` draws random numbers, too
        torch.manual_seed(0)
        assert (sensitivity(learn, levels=(60,), repair=repair).values == found.values) == bool(repair)
        drawn.append(torch.rand(1))
    assert same(before, bits(learn.model)) and drawn[0] == drawn[1]


@pytest.mark.parametrize('criterion', ['wanda', 'obd', 'obs', 'alps', 'synflow'])
def test_criteria_of_data_read_those_of_a_learner_or_given_ones(make_learner, criterion):
    learn = make_learner(metrics=[])
    before = bits(learn.model)
    found = sensitivity(learn, levels=(60,), criteria=criterion, repair=None)
    assert found.repaired == (('refit',) if criterion == 'alps' else ()) and found.values
    data = ((torch.randn(8, 1, 8, 8), torch.zeros(8).long()) for _ in range(3))
    sensitivity(learn.model, lambda m: 1., levels=(60,), criteria=criterion, data=data, loss_func=nn.CrossEntropyLoss())
    assert same(before, bits(learn.model))


def test_without_batchnorm_no_data_are_read(make_learner, recwarn):
    def unread():
        raise AssertionError
        yield
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10, track_running_stats=False))
    found = sensitivity(net, lambda m: 1., levels=(50,), data=unread())
    learn = make_learner(net)
    learn.dls.train.create_batches = lambda samples: unread()
    assert found.repaired == sensitivity(learn, levels=(50,)).repaired == ()
    assert not [w for w in recwarn if 'data: got' in str(w.message)]


@pytest.mark.filterwarnings('always:data. got None')
def test_without_data_it_says_what_is_not_repaired(make_learner):
    with pytest.warns(UserWarning, match='data: got None, so BatchNorm is not recalibrated.*expected a few batches, or repair=None') as told:
        assert sensitivity(convnet(), lambda m: 1., levels=(50,)).repaired == ()
    assert len(told) == 1 and told[0].filename == __file__
    with pytest.raises(ValueError, match="data: got None, expected batches with repair='refit'"): sensitivity(convnet(), lambda m: 1., repair='refit')
    with pytest.raises(ValueError, match="repair: got 'refitt'.*did you mean 'refit'"): sensitivity(convnet(), lambda m: 1., repair='refitt')
    learn = make_learner()
    empty = torch.utils.data.TensorDataset(*(t[:0] for t in learn.dls.train.dataset.tensors))
    learn.dls.loaders[0] = learn.dls.train.new(empty)  # as in a Learner that was loaded
    with pytest.warns(UserWarning, match='data: got None'): sensitivity(learn, lambda m: 1., levels=(50,))


@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_a_repair_that_breaks_leaves_all_as_it_was(error):
    net, x, _ = trained()
    before, calls = bits(net), []
    def broken(model, dense, data):
        calls.append(0)
        for tensor in (*model.parameters(), *model.buffers()): tensor.data.add_(1)
        if len(calls) == 3: raise error
    given = dict(metric=lambda m: 1., levels=(50, 90), data=x, repair=['refit', broken])
    if error is KeyboardInterrupt: assert sensitivity(net, **given).values == {'0': {50: 1., 90: 1.}}
    else:
        with pytest.raises(RuntimeError): sensitivity(net, **given)
    assert same(before, bits(net)) and len(calls) == 3


class Stores(nn.Module):
    "Keeps its last output, with the graph, as the U-Net and the AWD-LSTM of fastai do, and draws random numbers."
    def __init__(self):
        super().__init__()
        self.net = convnet()

    def forward(self, x):
        self.out = nn.functional.dropout(self.net(x), .1)  # in eval mode, too
        return self.out


def test_a_network_that_keeps_what_it_has_computed():
    net, x = Stores(), torch.randn(8, 1, 8, 8)
    net(x)
    rng = torch.get_rng_state()
    assert sensitivity(net, lambda m: 1., levels=(50,), data=x).repaired == ('batchnorm',)
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize('data', ['tensor', 'loader', 'dls', 'generator'])
def test_forms_of_data_are_read_once(make_learner, data):
    net, x, error = trained()
    dls = make_learner().dls
    given = {'tensor': x, 'loader': torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x), 16, shuffle=True), 'dls': dls,
             'generator': (part for part in x.split(16))}[data]
    rng = torch.get_rng_state()
    assert len(sensitivity(net, error, levels=(50,), data=given).values) == 3
    assert torch.equal(rng, torch.get_rng_state())
