from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fasterai import criteria, selection
from fasterai.criteria import CRITERIA, elementwise, evidence_of, gradient, magnitude, read_criterion
from fasterai.evidence import EVIDENCE, Evidence, made
from fasterai.sparsifier import Sparsifier


def score(criterion, parameter, name):
    criterion, layer = read_criterion(criterion), SimpleNamespace(name=name, weight=parameter)
    parts, makes = Evidence(criterion.evidence, None).parts(layer)
    scores = criteria.score(criterion, made(makes, parts), name, parameter.shape)
    criteria.check_finite(scores, criterion, parts, name)
    return scores


def parameter(values, grad=None, dtype=torch.float32):
    p = nn.Parameter(torch.tensor(values, dtype=dtype))
    if grad is not None: p.grad = torch.tensor(grad, dtype=dtype)
    return p


def test_the_formulas_by_eye():
    p = parameter([1., -2., 0., 4.], [3., 1., 5., -.5])
    assert score(magnitude, p, 'a').tolist() == [1, 2, 0, 4]
    assert score(gradient, p, 'a').tolist() == [3, 2, 0, 2]
    assert score('taylor', p, 'a').tolist() == [9, 4, 0, 4]
    assert score('squared', p, 'a').tolist() == [1, 4, 0, 16]


AFTER_TWO_STEPS = {  # the weight is 1, -2, 0, 4, its gradients are 3, 1, 5, -.5 and 1, -3, 1, .5; then it is 2, -1, 3, 4
    'magnitude': [2, 1, 3, 4],
    'squared': [4, 1, 9, 16],
    'magnitude_increase': [1, -1, 3, 0],
    'gradient': [2, 4, 0, 2],  # 3 and 1; 2 and 6; 0 and 0; 2 and 2
    'taylor': [20, 5, 117, 4],  # 4 · 5, 1 · 5, 9 · 13, 16 · .25
    'movement': [-4, -4, 0, 0],  # -3 -1; 2 -6; 0; 2 -2
}


@pytest.mark.parametrize('name', AFTER_TWO_STEPS)
def test_what_was_gathered_by_eye(name):
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    weight = model[0].weight
    weight.data = torch.tensor([[1., -2, 0, 4]])
    sparsifier = Sparsifier(model, criteria=name, layers='0')
    for grad in ([3., 1, 5, -.5], [1., -3, 1, .5]):
        weight.grad = torch.tensor([grad])
        sparsifier.evidence.step()
    weight.data = torch.tensor([[2., -1, 3, 4]])
    criterion, evidence = sparsifier.rules.criterion, sparsifier.evidence.of(sparsifier.layers['0'])
    assert criteria.score(criterion, evidence, '0', weight.shape).flatten().tolist() == AFTER_TWO_STEPS[name]
    expected = sorted(range(4), key=lambda i: AFTER_TWO_STEPS[name][i])[:2]
    sparsifier.sparsify_model(50)
    assert (~sparsifier.masks['0']).flatten().nonzero().flatten().tolist() == sorted(expected)


def test_every_criterion_is_in_the_table_but_random(): assert {*AFTER_TWO_STEPS, 'random'} == {*CRITERIA}


@pytest.mark.parametrize('name', AFTER_TWO_STEPS)
def test_scores_are_of_their_own_memory(name):
    "So that who writes into them does not change what is gathered."
    sparsifier = Sparsifier(nn.Sequential(nn.Linear(4, 1, bias=False)), criteria=name, layers='0')
    layer = sparsifier.layers['0']
    layer.weight.grad = torch.ones(1, 4)
    sparsifier.evidence.step()
    before = {n: e.clone() for n, e in sparsifier.evidence.of(layer).items()}
    criteria.score(sparsifier.rules.criterion, sparsifier.evidence.of(layer), '0', layer.weight.shape).fill_(7)
    assert all(torch.equal(before[n], e) for n, e in sparsifier.evidence.of(layer).items())


def test_what_was_gathered_is_named_where_it_is_not_finite():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    sparsifier = Sparsifier(model, criteria='gradient', layers='0')
    model[0].weight.grad = torch.full((1, 4), torch.inf)
    sparsifier.evidence.step()
    model[0].weight.grad = None
    with pytest.raises(ValueError, match="the saliency of layer '0' has NaN or infinite"): sparsifier.sparsify_model(50)


@elementwise
def of_both(weight, saliency): return abs(weight) * saliency


@elementwise
def of_means(grad_mean, batch_squares): return abs(grad_mean) + batch_squares


@pytest.mark.parametrize('granularity', ['weight', 'vector', 'filter'])
@pytest.mark.parametrize('criterion', ['gradient', 'taylor', 'movement', of_both, of_means], ids='gradient taylor movement both means'.split())
@pytest.mark.parametrize('told', [True, False])
def test_in_chunks_and_whole_the_same_is_pruned(criterion, granularity, told, monkeypatch):
    if criterion == 'movement' and not told: return
    monkeypatch.setattr(selection, 'CHUNK', 64)
    found = []
    for in_chunks in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(8, 20, 3), nn.Conv2d(20, 8, 3))
        sparsifier = Sparsifier(model, granularity, 'local', criterion, layers=['0', '1'])
        monkeypatch.setattr(Evidence, 'weight_shaped', in_chunks)
        for _ in range(2):
            for p in model.parameters(): p.grad = torch.randn_like(p)
            if told: sparsifier.evidence.step()
        sparsifier.sparsify_model(40)
        found.append([sparsifier.masks[n] for n in '01'])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_the_evidence_is_not_touched():
    p = parameter([1., -2.], [3., -1.])
    for criterion in (magnitude, gradient): score(criterion, p, 'a').fill_(7)
    assert p.tolist() == [1, -2] and p.grad.tolist() == [3, -1]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_float32_or_as_wide_as_the_weights_and_small_products_survive(dtype):
    found = score(gradient, parameter([1e-4], [1e-4], dtype), 'a')
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.item() == pytest.approx(1e-8, rel=.02)


def test_what_is_asked_for():
    assert evidence_of(magnitude) == ('weight',)
    assert evidence_of(gradient) == ('saliency',)
    assert evidence_of(lambda weight, initial, grad_mean, saliency, batch_squares, movement: weight)[1:] == tuple([*EVIDENCE][3:])
    assert evidence_of(lambda weight, power=2: weight.abs() ** power) == ('weight',)
    assert read_criterion('gradient').score is gradient
    with pytest.raises(ValueError, match="criteria: .*lambda.* asks for 'nothing'"): read_criterion(lambda: 1)
    with pytest.raises(TypeError, match='whose arguments cannot be read; expected a function of weight and grad'): read_criterion(torch.abs)
    with pytest.raises(TypeError, match='criteria: got <class'): read_criterion(dict)
    with pytest.raises(ValueError, match="criteria: bad asks for 'hessian', expected arguments named weight, grad"):
        def bad(weight, hessian): pass
        read_criterion(bad)


@pytest.mark.parametrize('values, grad, says', [
    ([1., float('nan')], [1., 1.], "the weight of layer 'conv' has NaN or infinite"),
    ([1., 2.], [1., float('inf')], "the grad of layer 'conv' has NaN or infinite"),
    ([1., 2.], None, "layer 'conv' has no gradient: call after loss.backward")])
def test_bad_evidence_is_named(values, grad, says):
    with pytest.raises(ValueError, match=says): score(gradient, parameter(values, grad), 'conv')


def two_layers(): return nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20))


def zeros_of(model): return [int((layer.weight == 0).sum()) for layer in (model[0], model[2])]


def test_a_criterion_may_ask_for_the_name_of_the_layer(monkeypatch):
    monkeypatch.setattr(selection, 'CHUNK', 64)  # so that an elementwise one is called on chunks
    seen = set()
    def mine(weight, name):
        seen.add((name, weight.ndim))
        return abs(weight) + 9 * (name == '0')
    for criterion in (mine, elementwise(lambda weight, name: mine(weight, name))):
        model = two_layers()
        Sparsifier(model, criteria=criterion).sparsify_model(40)
        assert zeros_of(model) == [0, 320]
    assert seen == {('0', 2), ('2', 2), ('0', 1), ('2', 1)}
    info = read_criterion(mine)
    assert (info.evidence, info.asks_name) == (('weight',), True) and not read_criterion('magnitude').asks_name


@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_a_criterion_may_ask_for_the_name_alone(granularity):
    model, kept = two_layers(), {name: torch.rand(20, 20) for name in ('0', '2')}
    for by_name in (lambda name: kept[name], lambda *, name: kept[name].requires_grad_(), elementwise(lambda name: kept[name].detach().double())):
        model = two_layers()
        sparsifier = Sparsifier(model, granularity, 'local', by_name, layers=['0', '2'])
        sparsifier.sparsify_model(50)
        scores = {name: of if granularity == 'weight' else of.mean(1, keepdim=True).expand(20, 20) for name, of in kept.items()}
        for name, of in scores.items(): assert of[sparsifier.masks[name]].min() >= of[~sparsifier.masks[name]].max()
    with pytest.raises(ValueError, match=r"gave a tensor of shape \(3,\) for layer '0', expected .* \(20, 20\)"):
        Sparsifier(two_layers(), criteria=lambda name: torch.ones(3)).sparsify_model(50)
    with pytest.raises(ValueError, match='expected arguments named weight, grad, noise, initial, .*, movement, name'): read_criterion(lambda nam: 1)


def test_bad_scores_are_named():
    p = parameter([1., 2.])
    with pytest.raises(ValueError, match='scores by .*lambda.* layer .conv. has NaN'): score(lambda weight: weight / 0, p, 'conv')
    with pytest.raises(ValueError, match=r'gave a tensor of shape \(\) for layer'): score(lambda weight: weight.sum(), p, 'conv')
    with pytest.raises(ValueError, match='gave None for layer'): score(lambda weight: None, p, 'conv')


def test_a_large_sum_is_no_infinity():
    assert score(magnitude, parameter([3e38, 3e38]), 'a').tolist() == pytest.approx([3e38, 3e38])


def test_only_marked_criteria_are_asked_in_chunks():
    assert magnitude.elementwise and gradient.elementwise and elementwise(lambda weight: weight).elementwise


def masks(model, **more):
    sparsifier = Sparsifier(model, criteria='random', **more)
    sparsifier.sparsify_model(50)
    return [sparsifier.masks[name] for name in sparsifier.layers]


def test_random_is_drawn_by_the_seed_and_once_an_event(monkeypatch):
    monkeypatch.setattr(selection, 'SAMPLE', 64)  # so that each layer is asked several times
    monkeypatch.setattr(selection, 'CHUNK', 512)
    found = []
    for seed in (0, 0, 1):
        model = nn.Sequential(nn.Linear(60, 60), nn.Linear(60, 60))
        torch.manual_seed(seed)
        found.append(masks(model))
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1]))
    assert not torch.equal(found[0][0], found[2][0])
    assert not torch.equal(found[0][0], found[0][1])
    sparsifier = Sparsifier(nn.Sequential(nn.Linear(60, 60), nn.Linear(60, 60)), criteria='random')
    sparsifier.sparsify_model(30)
    noise = {name: sparsifier.evidence.of(layer)['noise'] for name, layer in sparsifier.layers.items()}
    gone = torch.cat([noise[n][~sparsifier.masks[n]] for n in noise])
    stay = torch.cat([noise[n][sparsifier.masks[n]] for n in noise])
    assert len(gone) == 2160
    assert gone.max() <= stay.min()  # one draw decided about all
    sparsifier.sparsify_model(30)
    assert not torch.equal(sparsifier.evidence.of(sparsifier.layers['0'])['noise'], noise['0'])


@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_random_does_not_look_at_the_weights(granularity):
    model, other = (nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20)) for _ in range(2))
    more = dict(granularity=granularity, layers=['0', '1'])
    torch.manual_seed(0)
    first = masks(model, **more)
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(first, masks(other, **more)))


@pytest.mark.parametrize('bad', [lambda weight: weight + 1j, elementwise(lambda weight: weight + 1j), lambda weight: weight.to_sparse()])
def test_scores_that_have_no_order_are_refused(bad):
    p = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(ValueError, match='gave .*(complex|sparse).* for layer .conv.'): score(bad, p, 'conv')


def test_scores_without_values_are_refused():
    with pytest.raises(ValueError, match='gave a tensor .*meta'): score(lambda weight: weight.to('meta'), nn.Parameter(torch.ones(2, 3)), 'conv')
