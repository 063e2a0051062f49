"What comes back where the sparsity falls: by a score of what is gone, never by position."
import pytest
import torch
from conftest import same, tensors_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fasterai.callback import SparsifyCallback
from fasterai.context import CONTEXTS
from fasterai.granularity import block
from fasterai.regrowth import LIVING, REGROWTHS, below_living
from fasterai.schedule import multi_step
from fasterai.sparsifier import Sparsifier


def four(bias=False):
    "Four equal layers."
    return nn.Sequential(*[nn.Linear(50, 50, bias=bias) for _ in range(4)])


def gone(sparsifier): return [int((~sparsifier.masks[name]).sum()) for name in sparsifier.layers]


def with_gradients(model):
    for p in model.parameters(): p.grad = torch.randn_like(p)
    return model


# Scores of what is gone

def test_scores_of_what_is_gone_keep_their_order_below_all_others():
    scores = torch.tensor([-torch.inf, -3.4e38, -1., -1e-45, -0., 0., 1e-45, 1e-20, 1., 3.4e38, torch.inf])
    found = below_living(scores, torch.zeros(len(scores)))
    assert found.tolist() == sorted(found.tolist()) and found.unique().numel() == 10  # -0 is 0
    assert (found < LIVING).all() and found.isfinite().all()


def test_equal_scores_are_in_the_order_of_their_ties_and_no_tie_outweighs_a_score():
    near = torch.tensor([1.]).nextafter(torch.tensor([2.]))
    found = below_living(torch.cat([torch.ones(3), near]), torch.tensor([.5, .25, .999, 0.]))
    assert found.argsort().tolist() == [1, 0, 2, 3]


# Fair, and by score

@pytest.mark.parametrize('context', ['global', 'local'])
def test_equal_layers_get_equal_parts_back(context):
    sparsifier = Sparsifier(four(), context=context)
    sparsifier.sparsify_model(50)
    sparsifier.sparsify_model(25, regrow=True)
    assert sum(gone(sparsifier)) == 2500 and all(abs(n - 625) < 70 for n in gone(sparsifier))
    for name in sparsifier.layers:
        halves = (~sparsifier.masks[name]).float().view(2, -1).mean(1)
        assert (halves - .25).abs().max() < .06  # rows at the end are no better than those at the begin


def test_a_criterion_is_heard_that_scores_what_is_gone():
    model = four()
    wish = {name: torch.randn(50, 50) for name in '0123'}
    sparsifier = Sparsifier(model, criteria=lambda weight, name: torch.where(weight == 0, wish[name], weight.abs()))
    first = sparsifier.sparsify_model(50)
    born = sparsifier.sparsify_model(25, regrow=True).born
    dead = torch.cat([wish[n][~first.masks[n]] for n in '0123'])
    lowest = dead.sort().values[-2500]
    for n in '0123': assert torch.equal(born[n], ~first.masks[n] & (wish[n] >= lowest))


@pytest.mark.parametrize('context', ['global', 'local', 'erk', 'normalized', 'lamp'])
@pytest.mark.parametrize('regrow', [None, 'gradient', lambda grad: abs(grad)], ids=['default', 'gradient', 'own'])
def test_the_largest_gradients_come_back(context, regrow):
    model = with_gradients(four())
    sparsifier = Sparsifier(model, context=context, regrow=regrow)
    before = sparsifier.sparsify_model(80).masks
    born = sparsifier.sparsify_model(40, regrow=True).born
    jobs = [list(born)] if context in ('global', 'lamp', 'normalized') else [[name] for name in born]
    for names in jobs:
        came, dead = torch.cat([born[n].flatten() for n in names]), torch.cat([~before[n].flatten() for n in names])
        size = torch.cat([model[int(n)].weight.grad.abs().flatten() for n in names])
        assert came.sum() and size[came].min() > size[dead & ~came].max()
    assert sum(gone(sparsifier)) == 4000


def test_what_is_gone_competes_by_its_own_scores_where_those_of_the_living_are_rescaled():
    model = with_gradients(four())
    with torch.no_grad(): model[0].weight *= 100
    sparsifier = Sparsifier(model, context='normalized')
    sparsifier.sparsify_model(80)
    sparsifier.sparsify_model(40, regrow=True)
    assert all(abs(n - 1000) < 80 for n in gone(sparsifier))  # the gradients of all layers are alike


def test_layers_that_would_be_emptied_by_position_are_not_in_a_fit(make_learner):
    learn = make_learner(nn.Sequential(nn.Flatten(), *[nn.Linear(64, 64) for _ in range(4)]))
    callback = SparsifyCallback(80, schedule=multi_step((.25, .5), (1, .5)))
    learn.fit(2, cbs=callback)
    assert callback.sparsifier.report().zeros == round(.4 * 4 * 64 * 64)
    assert all(.1 < n / 64 ** 2 < .7 for n in gone(callback.sparsifier))


def test_ties_differ_by_seed_and_agree_for_the_same():
    def masks(seed):
        torch.manual_seed(0)
        sparsifier = Sparsifier(four())
        sparsifier.sparsify_model(80)
        torch.manual_seed(seed)
        return sparsifier.sparsify_model(40, regrow=True).masks
    assert same(masks(1).values(), masks(1).values()) and not same(masks(1).values(), masks(2).values())


def test_regrowth_at_random_differs_by_seed_though_there_are_gradients():
    def masks(seed):
        torch.manual_seed(0)
        sparsifier = Sparsifier(with_gradients(four()), regrow='random')
        sparsifier.sparsify_model(80)
        torch.manual_seed(seed)
        return sparsifier.sparsify_model(40, regrow=True).masks
    assert not same(masks(1).values(), masks(2).values())


def test_filters_of_coupled_layers_come_back_by_the_mean_over_both():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.few, self.many, self.out = nn.Linear(2, 4, bias=False), nn.Linear(6, 4, bias=False), nn.Linear(4, 1)

        def forward(self, x, y): return self.out(self.few(x) + self.many(y))
    model = Sum()
    few, many = torch.tensor([9., 1, 1, 1]), torch.tensor([1., 5, 1, 1])  # means over 2 and 6 weights: 3, 4, 1, 1
    scores = {'few': few[:, None].expand(4, 2), 'many': many[:, None].expand(4, 6)}
    sparsifier = Sparsifier(model, 'filter', example=(torch.ones(1, 2), torch.ones(1, 6)), coupled=True, regrow=lambda name: scores[name])
    sparsifier.masks.update({'few': torch.zeros(4, 2, dtype=torch.bool), 'many': torch.zeros(4, 6, dtype=torch.bool)})
    for sparsity, born in ((75, 1), (50, 0)):
        change = sparsifier.sparsify_model(sparsity, regrow=True)
        for name in scores: assert change.born[name].any(1).nonzero().tolist() == [[born]]


@pytest.mark.parametrize('kind', ['Linear', 'Conv2d'])
def test_a_pattern_lets_the_best_of_its_places_come_back(kind):
    model = nn.Sequential(nn.Linear(16, 6) if kind == 'Linear' else nn.Conv2d(16, 6, 3))
    with_gradients(model)
    sparsifier = Sparsifier(model, context='2:4', layers='0')
    n = model[0].weight.numel()
    before = sparsifier.sparsify_model(50).masks['0']
    born = sparsifier.sparsify_model(50, share=.5, regrow=True).born['0']
    size = model[0].weight.grad.abs()
    assert born.sum() == n // 4 and size[born].min() > size[~before & ~born].max()
    sparsifier.sparsify_model(50)
    kept = sparsifier.masks['0'].transpose(0, 1).reshape(4, 4, -1).sum(1)
    assert (kept == 2).all()


# Evidence

def test_a_layer_without_a_gradient_comes_last_and_does_not_wait():
    model = with_gradients(four())
    model[2].weight.grad = None
    sparsifier = Sparsifier(model, regrow='gradient')
    sparsifier.sparsify_model(80)
    before = gone(sparsifier)
    change = sparsifier.sparsify_model(40, regrow=True)
    assert not change.waiting and gone(sparsifier)[2] == before[2] and sum(gone(sparsifier)) == 4000


def test_gradients_that_are_asked_for_and_missing_are_an_error_and_nothing_changes():
    sparsifier = Sparsifier(four(), regrow='gradient')
    sparsifier.sparsify_model(50)  # takes none
    before = tensors_of(sparsifier)
    with pytest.raises(ValueError, match='regrow: grad is needed and no layer has any: call after loss.backward'):
        sparsifier.sparsify_model(25, regrow=True)
    assert same(before, tensors_of(sparsifier))
    sparsifier.sparsify_model(0, regrow=True)  # all come back: there is nothing to choose
    assert sparsifier.masks.left('0') == 2500


def test_a_regrowth_by_what_steps_gather_gets_it_of_pruned_weights_too():
    model = nn.Sequential(nn.Linear(10, 10, bias=False))
    sparsifier = Sparsifier(model, regrow=lambda grad_mean: grad_mean.abs())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.)
    sparsifier.attach(optimizer)
    before, grads = sparsifier.sparsify_model(80).masks['0'], torch.randn(3, 10, 10)
    for grad in grads:
        model[0].weight.grad = grad.clone()
        optimizer.step()
    born, size = sparsifier.sparsify_model(50, regrow=True).born['0'], grads.mean(0).abs()
    assert born.sum() == 30 and size[born].min() > size[~before & ~born].max()


def test_a_regrowth_may_read_data():
    data = [torch.ones(8, 10) * torch.arange(10.)]
    sparsifier = Sparsifier(nn.Sequential(nn.Linear(10, 6)), regrow=lambda input_norm: input_norm, layers='0', data=data)
    before = sparsifier.sparsify_model(80).masks['0']
    born = sparsifier.sparsify_model(60, regrow=True).born['0']
    columns = torch.arange(10).expand(6, 10)
    assert born.sum() == 12 and columns[born].min() >= columns[~before & ~born].max()


# What is refused

@pytest.mark.parametrize('regrow', [lambda scores, pruned: scores, lambda: 1])
def test_a_function_that_asks_for_no_evidence_is_refused(net, regrow):
    with pytest.raises(ValueError, match='regrow: <lambda> asks for .*expected arguments named weight'): Sparsifier(net, regrow=regrow)


def test_what_is_no_regrowth_is_refused(net):
    with pytest.raises(TypeError, match='regrow: got 7, expected one of gradient, random, criterion'): Sparsifier(net, regrow=7)
    with pytest.raises(ValueError, match="regrow: got 'rigl', .*did you mean 'gradient'"): Sparsifier(net, regrow='rigl')


def test_a_regrowth_that_fails_changes_nothing(net):
    def failing(weight): raise RuntimeError('mine')
    for regrow, says in ((failing, 'mine'), (lambda weight: 7, 'gave 7'), (lambda weight: weight * torch.nan, 'NaN')):
        sparsifier = Sparsifier(net, regrow=regrow)
        sparsifier.sparsify_model(50)
        before = tensors_of(sparsifier)
        for how in (dict(sparsity=20, regrow=True), dict(sparsity=50, swap=.5)):
            with pytest.raises((RuntimeError, ValueError), match=says): sparsifier.sparsify_model(**how)
            assert same(before, tensors_of(sparsifier))


@pytest.mark.parametrize('regrow', ['no', 'position', 1, None, float('nan')])
def test_only_a_bool_lets_weights_come_back(net, regrow):
    sparsifier = Sparsifier(net)
    sparsifier.sparsify_model(50)
    before = tensors_of(sparsifier)
    with pytest.raises(TypeError, match='regrow: got .*expected True or False'): sparsifier.sparsify_model(20, regrow=regrow)
    assert same(before, tensors_of(sparsifier))


# Any case

@settings(max_examples=60, deadline=None)
@given(sparsities=st.lists(st.integers(0, 100), min_size=2, max_size=5), seed=st.integers(0, 99), regrow=st.sampled_from([None, *REGROWTHS]),
       context=st.sampled_from([c for c in CONTEXTS if c not in ('uniform_plus', 'work')]), granularity=st.sampled_from(['weight', 'kernel', 'filter', block(2, 3)]))
@pytest.mark.filterwarnings('ignore:sparsity')
def test_counts_are_exact_up_and_down(sparsities, seed, regrow, context, granularity):
    torch.manual_seed(seed)
    model = with_gradients(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 2), nn.Linear(6, 9)))
    sparsifier = Sparsifier(model, granularity, context, regrow=regrow, layers=['0', '1', '2'])
    for sparsity in sparsities:
        change = sparsifier.sparsify_model(sparsity, regrow=True)
        fresh = Sparsifier(with_gradients(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 2), nn.Linear(6, 9))), granularity, context, layers=['0', '1', '2'])
        if granularity == 'weight' and context != 'local' and sparsity < 100:
            assert sum(gone(sparsifier)) == round(sparsity / 100 * 462)
        if context in ('local', 'erk', 'er') and granularity != block(2, 3):
            fresh.sparsify_model(sparsity)
            assert gone(sparsifier) == gone(fresh)
        for name, layer in sparsifier.layers.items():
            assert not (change.born[name] & change.died[name]).any()
            assert not layer.weight[~sparsifier.masks[name]].any() and not layer.weight[change.born[name]].any()
            layer.weight.data += torch.randn_like(layer.weight) * sparsifier.masks[name]
