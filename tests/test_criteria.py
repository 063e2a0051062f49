from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fasterai import criteria, selection
from fasterai.criteria import CRITERIA, elementwise, evidence_of, gradient, magnitude, read_criterion
from fasterai.evidence import Evidence, made
from fasterai.kinds import EVIDENCE
from fasterai.scoring import Scores
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


# Of evidence that data give

WEIGHT, NORM = [[1., -2], [0, 4]], [[3., 5], [3, 5]]
OF_DATA = {  # the evidence beside the weight, and the scores
    'obd': ({'grad_squares': [[2., 1], [8, .5]]}, [[1, 2], [0, 4]]),
    'obs': ({'inverse_diagonal': [[.5, 1], [1, 2]]}, [[1, 2], [0, 4]]),
    'synflow': ({'flow': [[2., 1], [8, .5]]}, [[2, 2], [0, 2]]),
    'wanda': ({'input_norm': NORM}, [[3, 10], [0, 20]]),
    'ria': ({'input_norm': [[1., 4], [1, 4]]}, [[1 / 3 + 1, 2 * (2 / 3 + 2 / 6)], [0, 2 * (1 + 4 / 6)]]),
    'sparsegpt': ({'gram': [[1., 0], [0, 4]]}, [[1.025 / 81, 4 * 4.025 / 81], [0, 16 * 4.025 / 81]]),  # damped by .01 · 2.5; 1 + 16 + 64 pass on
    'fpgm': ({}, [[37 ** .5] * 2] * 2),
}


@pytest.mark.parametrize('name', OF_DATA)
def test_what_data_give_by_eye(name):
    evidence, expected = OF_DATA[name]
    evidence = {'weight': WEIGHT} | evidence
    criterion, given = CRITERIA[name], {n: torch.tensor(value) for n, value in evidence.items()}
    scores = criteria.score(criterion, {n: given[n] for n in criterion.evidence}, 'a', (2, 2))
    assert torch.allclose(scores.double(), torch.tensor(expected).double())


def test_every_criterion_is_in_a_table_but_random_and_alps(): assert {*AFTER_TWO_STEPS, *OF_DATA, 'random', 'alps'} == {*CRITERIA}


def gram_of(n=200, size=12):
    x = torch.randn(n, size) @ (torch.eye(size) + .7 * torch.randn(size, size))
    return x.T @ x


def best_half(scores):
    "The mask that keeps the larger half of the scores of each output."
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    return keep.scatter(-1, scores.topk(scores.shape[-1] // 2, -1).indices, True)


def error(weight, gram, keep):
    "The squared error of the outputs when the weights that stay are solved by least squares, written out."
    found = 0
    for row, stay in zip(weight.double(), keep):
        change = -row.clone()
        inside, out = gram[stay][:, stay].double(), gram[stay][:, ~stay].double()
        change[stay] = torch.linalg.solve(inside, out @ row[~stay])
        found += float(change @ gram.double() @ change)
    return found


def test_masks_by_alternating_directions_leave_less_error():
    errors = {'magnitude': 0, 'wanda': 0, 'sparsegpt': 0, 'alps': 0}
    for _ in range(20):
        weight, gram = torch.randn(6, 12), gram_of()
        given = {'weight': weight, 'gram': gram, 'input_norm': gram.diagonal().sqrt().expand(6, 12)}
        for name in errors:
            scores = criteria.score(CRITERIA[name], {n: given[n] for n in CRITERIA[name].evidence}, 'a', (6, 12),
                                    support=best_half)
            errors[name] += error(weight, gram, best_half(scores))
    assert all(errors['alps'] < .85 * errors[name] for name in ('magnitude', 'wanda', 'sparsegpt'))


def test_where_inputs_do_not_correlate_the_support_is_about_that_of_wanda():  # which is the best there is
    weight, gram = torch.randn(20, 12), torch.diag(torch.rand(12) * 5)
    scores = criteria.score(CRITERIA['alps'], {'weight': weight, 'gram': gram}, 'a', (20, 12), support=best_half)
    best = error(weight, gram, best_half(weight.abs() * gram.diagonal().sqrt()))
    assert best <= error(weight, gram, best_half(scores)) < 1.05 * best


@pytest.mark.parametrize('name', ['sparsegpt', 'alps'])
def test_the_weights_of_a_dead_input_go_first(name):
    weight, gram = torch.rand(3, 6) + 1, torch.eye(6)
    gram[2, 2] = 0
    scores = criteria.score(CRITERIA[name], {'weight': weight, 'gram': gram}, 'a', (3, 6), support=best_half)
    assert not scores[:, 2].any() and scores[:, [0, 1, 3, 4, 5]].all()


@pytest.mark.parametrize('name', ['wanda', 'sparsegpt'])
@pytest.mark.parametrize('whole', [nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2)], ids=['conv', 'transposed'])
def test_the_groups_of_a_convolution_are_scored_by_themselves(name, whole):
    whole, x = deepcopy(whole), torch.randn(8, 4, 6, 6)
    parts = [type(whole)(2, 3, 3) for _ in range(2)]
    length = len(whole.weight) // 2
    for i, part in enumerate(parts): part.weight.data = whole.weight.data[i * length:(i + 1) * length]
    for i, part in enumerate(parts):
        found = scores_of(whole, name, x)[i * length:(i + 1) * length]
        expected = scores_of(part, name, x[:, i * 2:i * 2 + 2])
        assert torch.allclose(found / found.sum(), expected / expected.sum(), rtol=1e-3)  # the share is that of the layer


def scores_of(layer, name, x):
    "The scores of a layer on data."
    sparsifier = Sparsifier(nn.Sequential(layer), context='local', criteria=name, layers='0', data=[x])
    with sparsifier.evidence.gathered([*sparsifier.layers.values()]):
        scores = Scores(sparsifier.rules.criterion, sparsifier.evidence, [*sparsifier.layers.values()])
        return torch.as_tensor(scores(sparsifier.layers['0'], slice(None))).view(layer.weight.shape)


def test_inputs_compare_wherever_they_stand():
    weight, gram = torch.randn(200, 32), gram_of(500, 32)
    mirrored = {'weight': weight.flip(1), 'gram': gram.flip(0, 1)}
    scores = [criteria.score(CRITERIA['sparsegpt'], given, 'a', (200, 32)) for given in ({'weight': weight, 'gram': gram}, mirrored)]
    assert torch.allclose(scores[0], scores[1].flip(1), rtol=1e-4)


def test_like_filters_go_first_by_their_geometric_median():
    weight = torch.stack([torch.ones(4), torch.ones(4) + 1e-3, torch.tensor([5., 0, 0, 0]), torch.tensor([0., -6, 0, 0])])
    scores = criteria.score(CRITERIA['fpgm'], {'weight': weight}, 'a', (4, 4))
    assert {*scores[:, 0].argsort()[:2].tolist()} == {0, 1}


# SynFlow

def deep(widths=(16, 16, 16, 2, 16, 16)):
    layers = [nn.Linear(8, widths[0], bias=False)]
    for a, b in zip(widths, widths[1:]): layers += [nn.BatchNorm1d(a), nn.ReLU(), nn.Linear(a, b, bias=False)]
    return nn.Sequential(*layers)


def test_the_synaptic_flow_through_every_layer_is_the_same():  # a law of conservation, Tanaka et al. 2020
    model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.ReLU(), nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False))
    seen = {}
    def score_flow(weight, flow, name):
        seen[name] = float((abs(weight) * flow).sum())
        return abs(weight) * flow
    Sparsifier(model, criteria=score_flow, layers=nn.Linear, example=torch.randn(1, 8)).sparsify_model(50)
    assert len(seen) == 3 and max(seen.values()) == pytest.approx(min(seen.values()))


def test_synflow_empties_no_layer_where_magnitude_does():
    model = deep()
    with torch.no_grad(): model[9].weight.mul_(1e-2)
    copy, kwargs = deepcopy(model), dict(layers=nn.Linear, min_keep=0)
    Sparsifier(model, criteria='synflow', example=torch.randn(1, 8), **kwargs).sparsify_model(97)
    Sparsifier(copy, **kwargs).sparsify_model(97)
    assert all(m.weight.any() for m in model if isinstance(m, nn.Linear))
    assert not all(m.weight.any() for m in copy if isinstance(m, nn.Linear))


def test_synflow_needs_no_data_and_sees_no_values(net):
    x, copy = torch.randn(2, 1, 8, 8), deepcopy(net)
    Sparsifier(net, criteria='synflow', example=x).sparsify_model(90)
    Sparsifier(copy, criteria='synflow', data=[torch.full((3, 1, 8, 8), 7.)]).sparsify_model(90)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), copy.parameters()))


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
        monkeypatch.setattr(criteria.CriterionInfo, 'weight_shaped', in_chunks)
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
    assert evidence_of(lambda weight, initial, grad_mean, saliency, batch_squares, movement: weight)[1:] == tuple([*EVIDENCE][3:8])
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
    with pytest.raises(ValueError, match='expected arguments named weight, grad, noise, initial, .*, movement, .*, name, support'): read_criterion(lambda nam: 1)


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
