"Masks that move while each layer's count stays: what goes, what comes, and when."
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from conftest import INF, same, tensors_of
from conftest import layer as layer_of
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.optimizer import SGD, Adam
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fasterai.callback import SparsifyCallback
from fasterai.context import CONTEXTS, within
from fasterai.exchange import exchanged
from fasterai.granularity import block
from fasterai.keep import KeepSparse
from fasterai.schedule import Due, gradual, rigl, steps
from fasterai.sparsifier import Sparsifier


def left(sparsifier): return {name: sparsifier.masks.left(name) for name in sparsifier.layers}


def two():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3))
    for p in model.parameters(): p.grad = torch.randn_like(p)
    return model


# By table

@pytest.mark.parametrize('n, places, keep', [
    (1, None, [0, 1, 1, 0, 1, 0]), (2, None, [0, 0, 1, 1, 1, 0]), (3, None, [0, 0, 0, 1, 1, 1]), (9, None, [0, 0, 0, 1, 1, 1]),
    (3, [0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 0, 0]),  # one at the first place only: the other is empty
    (3, [0, 1, 0, 0, 1, 1], [0, 0, 1, 1, 1, 0]),
])
def test_tables(n, places, keep):
    groups, new = layer_of('a', [1., 2, 3, -INF, -INF, -INF]), torch.tensor([0., 0, 0, 5, 7, 4])
    places = None if places is None else torch.tensor(places)
    found = exchanged(groups, groups.alive, ~groups.alive, new.__getitem__, n, places)
    assert found.int().tolist() == keep and groups.alive.int().tolist() == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize('places', [None, torch.zeros(8, dtype=torch.int64)], ids=['any', 'one place'])
def test_ties_go_by_position(places):
    groups = layer_of('a', [0.] * 4 + [-INF] * 4)
    found = exchanged(groups, groups.alive, ~groups.alive, torch.arange(8.).__getitem__, 2, places)
    assert found.int().tolist() == [0, 0, 1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize('n', [0, 1, 7, 60, 500])
def test_places_that_are_all_one_are_none(n):
    scores, new = torch.randn(1000), torch.randn(1000)
    scores[torch.rand(1000) < .6] = -INF
    groups = layer_of('a', scores.tolist())
    of_one = torch.zeros(1000, dtype=torch.int64)
    both = [exchanged(groups, groups.alive, ~groups.alive, new.__getitem__, n, places) for places in (None, of_one)]
    assert torch.equal(*both) and both[0].sum() == groups.n_alive


# In a Sparsifier

@pytest.mark.parametrize('context', ['erk', 'local', 'global'])
def test_rigl_drops_the_smallest_and_grows_exactly_the_largest_gradients(context):
    model = two()
    sparsifier = Sparsifier(model, context=context, layers=['0', '2'])
    before = sparsifier.sparsify_model(80).masks
    weights = {name: layer.weight.detach().abs().clone() for name, layer in sparsifier.layers.items()}
    change, counts = sparsifier.sparsify_model(80, swap=.3), left(sparsifier)
    for name, layer in sparsifier.layers.items():
        died, born, alive = change.died[name], change.born[name], before[name]
        n = min(round(Fraction(.3) * int(alive.sum())), int((~alive).sum()))
        assert int(died.sum()) == int(born.sum()) == n and counts[name] == int(alive.sum())
        assert weights[name][died].max() <= weights[name][alive & ~died].min()
        size = layer.weight.grad.abs()
        assert torch.equal(born, ~alive & (size >= size[~alive].sort().values[-n]))
        assert not layer.weight[born].any()


def test_set_grows_at_random():
    def born(seed):
        torch.manual_seed(0)
        sparsifier = Sparsifier(two(), regrow='random', layers=['0', '2'])
        sparsifier.sparsify_model(80)
        torch.manual_seed(seed)
        return sparsifier.sparsify_model(80, swap=.5)
    first, other = born(1), born(2)
    assert same(first.died.values(), other.died.values()) and not same(first.born.values(), other.born.values())
    assert same(first.born.values(), born(1).born.values())


def test_what_goes_does_not_come_back_in_the_same_event():
    sparsifier = Sparsifier(nn.Sequential(nn.Linear(10, 10)), layers='0')
    before = sparsifier.sparsify_model(10).masks['0']
    change = sparsifier.sparsify_model(10, swap=.9)  # 81 shall go, but only 10 are gone
    assert change.born['0'].sum() == change.died['0'].sum() == 10 and torch.equal(change.born['0'], ~before)


def test_a_dense_layer_and_an_empty_one_exchange_nothing():
    sparsifier = Sparsifier(two(), layers=['0', '2'])
    for sparsity in (0, 100):
        change = sparsifier.sparsify_model(sparsity)
        assert not any(born.any() for born in sparsifier.sparsify_model(sparsity, swap=.5).born.values())
        assert change.masks.keys() == {'0', '2'}


def test_pruning_comes_first_where_the_sparsity_rises():
    "What this event has pruned does not come back in it."
    sparsifier = Sparsifier(two(), layers=['0', '2'])
    first = sparsifier.sparsify_model(50)
    change = sparsifier.sparsify_model(80, swap=.3)
    assert sum(left(sparsifier).values()) == 1080 - round(.8 * 1080)
    assert sum(int(born.sum()) for born in change.born.values()) == sum(round(Fraction(.3) * n) for n in left(sparsifier).values())
    for name in first.masks: assert not (change.born[name] & first.masks[name]).any()


@pytest.mark.parametrize('kind', ['Linear', 'Conv2d'])
@pytest.mark.parametrize('share', [1, .5])
def test_a_pattern_stays_a_pattern(kind, share):
    model = nn.Sequential(nn.Linear(18, 6) if kind == 'Linear' else nn.Conv2d(18, 6, 3))
    model[0].weight.grad = torch.randn_like(model[0].weight)
    sparsifier = Sparsifier(model, context='2:4', layers='0')
    sparsifier.sparsify_model(50, share)
    before = left(sparsifier)
    change = sparsifier.sparsify_model(50, share, swap=.3)
    assert left(sparsifier) == before and int(change.born['0'].sum()) == round(Fraction(.3) * before['0'])
    sparsifier.sparsify_model(50)
    kept = sparsifier.masks['0'][:, :16].transpose(0, 1).reshape(4, 4, -1).sum(1)
    assert (kept == 2).all() and sparsifier.masks['0'][:, 16:].sum() == sparsifier.masks['0'][:, 16:].numel() / 2


def test_an_exchange_keeps_to_the_axis_of_its_context():
    model = nn.Sequential(nn.Linear(20, 8))
    sparsifier = Sparsifier(model, context=within('O'), layers='0')
    sparsifier.sparsify_model(50)
    change = sparsifier.sparsify_model(50, swap=.5)
    assert (sparsifier.masks['0'].sum(1) == 10).all() and change.born['0'].sum() == 40


def test_wrong_shares_are_refused(net):
    sparsifier = Sparsifier(net)
    before = tensors_of(sparsifier)
    for swap in (-.1, 1.1, None, '1', True, float('nan')):
        with pytest.raises(ValueError, match='swap: got .*expected a number from 0 to 1'): sparsifier.sparsify_model(50, swap=swap)
    with pytest.raises(ValueError, match='rounds: got 3 with swap=0.3'): sparsifier.sparsify_model(50, swap=.3, rounds=3)
    assert same(before, tensors_of(sparsifier))


@settings(max_examples=60, deadline=None)
@given(sparsities=st.lists(st.integers(1, 99), min_size=2, max_size=4), swap=st.floats(0, 1), seed=st.integers(0, 99),
       context=st.sampled_from([*[c for c in CONTEXTS if c not in ('uniform_plus', 'work')], '2:4', '1:3', within('I')]),
       granularity=st.sampled_from(['weight', 'kernel', 'filter', 'column', block(2, 3)]), regrow=st.sampled_from([None, 'random', 'criterion']))
@pytest.mark.filterwarnings('ignore:sparsity')
def test_each_layer_keeps_its_count(sparsities, swap, seed, context, granularity, regrow):
    torch.manual_seed(seed)
    if context not in CONTEXTS: granularity = 'weight'
    sparsifier = Sparsifier(two(), granularity, context, layers=['0', '2'], regrow=regrow)
    pattern = sparsifier.rules.context_info.sparsity
    for sparsity in sparsities:
        how = dict(sparsity=sparsity) if pattern is None else dict(sparsity=float(100 * pattern), share=sparsity / 100)
        sparsifier.sparsify_model(**how)
        for layer in sparsifier.layers.values(): layer.weight.data += torch.randn_like(layer.weight)
        sparsifier.sparsify_model(**how)  # by erk the second event may prune another filter, of what the first has rounded
        before, masks = left(sparsifier), {n: sparsifier.masks[n] for n in sparsifier.layers}
        change = sparsifier.sparsify_model(**how, swap=swap)
        assert left(sparsifier) == before
        for name, layer in sparsifier.layers.items():
            born, died = change.born[name], change.died[name]
            assert born.sum() == died.sum() and not (born & masks[name]).any()
            whole = layer.grouping.count(sparsifier.masks[name])
            assert ((whole == 0) | (whole == layer.grouping.sizes)).all()
            groups, living = layer.grouping.groups, int((layer.grouping.count(masks[name]) > 0).sum())
            if context in CONTEXTS and not layer.grouping.pad:
                assert int(born.sum()) == layer.grouping.size * min(round(Fraction(swap) * living), groups - living)


# In a fit

class Watch(Callback):
    "Looks at the masks after each step, last of all."
    order = 99

    def __init__(self, callback): self.callback, self.masks, self.states = callback, [], []

    def after_step(self):
        sparsifier = self.callback.sparsifier
        self.masks.append({name: sparsifier.masks[name] for name in sparsifier.layers})
        assert all(not layer.weight[~sparsifier.masks[name]].any() for name, layer in sparsifier.layers.items())


def counts(masks): return [sum(int(m.sum()) for m in at.values()) for at in masks]
def moves(masks): return [not same(a.values(), b.values()) for a, b in pairwise(masks)]


def test_masks_move_at_their_times_and_counts_stay(make_learner):
    learn = make_learner()
    callback = SparsifyCallback(80, context='erk', schedule=rigl(every=steps(3), swap=.3, end=.75))
    learn.fit(4, .1, cbs=[callback, watch := Watch(callback)])  # 16 steps
    assert set(counts(watch.masks)) == {566 - round(.8 * 566)}
    assert [i + 2 for i, moved in enumerate(moves(watch.masks)) if moved] == [3, 6, 9]  # at 12 it ends
    assert all(len({int(at[name].sum()) for at in watch.masks}) == 1 for name in callback.sparsifier.layers)


def test_the_share_falls_by_a_cosine(make_learner):
    learn = make_learner()
    callback = SparsifyCallback(50, 'weight', 'local', schedule=rigl(every=steps(2), swap=.5, end=1.), layers='3')
    learn.fit(2, 1., cbs=[callback, watch := Watch(callback)])  # 8 steps; of 216 weights
    seen = [int((a['3'] & ~b['3']).sum()) for a, b in pairwise(watch.masks)]
    assert seen == [round(54 * (1 + .5 ** .5)), 0, 54, 0, round(54 * (1 - .5 ** .5)), 0, 0]


@pytest.mark.parametrize('opt_func', [lambda p, lr: SGD(p, lr, mom=.9, wd=.1), Adam])
def test_grown_weights_start_from_zero_and_so_does_their_optimizer_state(make_learner, opt_func):
    learn = make_learner(opt_func=opt_func)
    callback = SparsifyCallback(60, schedule=rigl(every=steps(2), swap=.5))

    class Look(Callback):
        order, n = SparsifyCallback.order + .01, 0  # right after the event, before the step

        def before_step(self):
            sparsifier = callback.sparsifier
            now = {name: sparsifier.masks[name] for name in sparsifier.layers}
            for name, before in getattr(self, 'held', {}).items():
                weight, born = sparsifier.layers[name].weight, now[name] & ~before
                self.n += int(born.sum())
                assert not weight[born].any() and (weight.grad[born].any() or not born.any())
                state = [s for s in learn.opt.state[weight].values() if isinstance(s, torch.Tensor) and s.shape == weight.shape]
                assert state and not any(s[born].any() for s in state)
            self.held = now
    look = Look()
    learn.fit(3, .1, cbs=[callback, look])
    assert look.n > 100


def test_accumulated_gradients_decide(make_learner):
    "The gradient of all batches of a step, before that of pruned weights is masked."
    learn = make_learner()
    callback = SparsifyCallback(60, schedule=rigl(every=steps(4), swap=.5, end=1.), layers='3', context='local')

    class Keep(Callback):
        order, grads, weight, born = SparsifyCallback.order - .01, [], None, []

        def before_step(self):
            self.grads.append(learn.model[3].weight.grad.clone())

    class Compare(Callback):
        order = SparsifyCallback.order + .01

        def before_step(self):
            now = callback.sparsifier.masks['3']
            if keep.weight is not None:
                born, size = now & ~keep.weight, keep.grads[-1].abs()
                if born.any(): keep.born.append(bool(size[born].min() >= size[~keep.weight & ~born].max()))
            keep.weight = now
    keep = Keep()
    learn.fit(4, .1, cbs=[callback, keep, Compare(), GradientAccumulation(16)])
    assert keep.born and all(keep.born) and len(keep.grads) == 8


def test_gradual_pruning_with_regrowth(make_learner):
    learn = make_learner()
    callback = SparsifyCallback(80, schedule=gradual(0, .75, every=steps(3), swap=.3))
    learn.fit(4, .1, cbs=[callback, watch := Watch(callback)])
    found = [566 - n for n in counts(watch.masks)]
    share = [1 - (1 - min(3 * (step // 3) / 12, 1)) ** 3 for step in range(1, 17)]
    assert found == [round(.8 * 566 * s) for s in share]
    born = [sum(int((b[n] & ~a[n]).sum()) for n in a) for a, b in pairwise(watch.masks)]
    assert born[4] > 0 and born[7] > 0 and sum(born) == born[4] + born[7]  # steps 6 and 9: at 3 nothing is gone yet


def test_a_function_of_ones_own_may_exchange(make_learner):
    learn = make_learner()
    callback = SparsifyCallback(80, schedule=lambda p: Due(1, .5, int(p * 4)))
    learn.fit(2, .1, cbs=[callback, watch := Watch(callback)])
    assert set(counts(watch.masks)) == {566 - round(.8 * 566)}
    assert [i + 2 for i, moved in enumerate(moves(watch.masks)) if moved] == [2, 4, 6, 8]


def test_a_later_fit_keeps_the_masks_that_have_moved(make_learner):
    learn = make_learner()
    callback = SparsifyCallback(80, schedule=rigl(every=steps(2)))
    learn.fit(2, .1, cbs=callback)
    masks = {name: callback.sparsifier.masks[name] for name in callback.sparsifier.layers}
    learn.fit(2, .1)
    assert all(not learn.model[int(name)].weight[~mask].any() for name, mask in masks.items())
    assert len(learn._grab_cbs(KeepSparse)) == 1


def test_a_resumed_fit_makes_no_exchange_twice(make_learner):
    "It goes on at the next one, with the masks that there are."
    learn = make_learner()
    callback = SparsifyCallback(80, schedule=rigl(every=steps(4), end=1.))
    learn.fit(4, .1, cbs=[callback, Watch(callback)])
    fresh = make_learner(learn.model)
    callback = SparsifyCallback(80, schedule=rigl(every=steps(4), end=1.))
    held = {i: learn.model[int(i)].weight != 0 for i in ('0', '3', '8')}
    fresh.fit(4, .1, start_epoch=2, cbs=[callback, watch := Watch(callback)])
    assert len(watch.masks) == 8 and same(watch.masks[0].values(), held.values())
    assert [i + 2 for i, moved in enumerate(moves(watch.masks)) if moved] == [4]
    assert set(counts(watch.masks)) == {566 - round(.8 * 566)}


def test_a_state_that_was_saved_in_the_middle_goes_on_the_same():
    def run(sparsifier, model):
        torch.manual_seed(5)
        for p in model.parameters(): p.grad = torch.randn_like(p)
        return sparsifier.sparsify_model(80, swap=.3).masks
    model = two()
    sparsifier = Sparsifier(model, layers=['0', '2'])
    sparsifier.sparsify_model(80)
    sparsifier.sparsify_model(80, swap=.3)
    other = two()
    other.load_state_dict(model.state_dict())
    again = Sparsifier(other, layers=['0', '2'])
    again.load_state_dict(sparsifier.state_dict())
    assert left(again) == left(sparsifier)
    assert same(run(sparsifier, model).values(), run(again, other).values())
