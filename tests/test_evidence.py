"What a step and a layer's input tell, and when: of kinds of evidence that the tests make, and of those that are there."
import pickle
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from conftest import convnet
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from torch import nn
from torch.nn import functional as F

from fasterai import kinds as table
from fasterai.callback import SparsifyCallback
from fasterai.evidence import Evidence
from fasterai.kinds import EVIDENCE, Kind
from fasterai.peers import ALONE
from fasterai.schedule import linear
from fasterai.sparsifier import Sparsifier

summed_grads = Kind(read=lambda layer, state: state, start=lambda layer: torch.zeros_like(layer.weight),
                    on_step=lambda layer, state: state + layer.weight.grad)
input_sums = Kind(read=lambda layer, state: state.expand_as(layer.weight), start=lambda layer: torch.zeros(()),
                  on_input=lambda layer, state, read: state + read.input.sum())


@pytest.fixture
def kinds(monkeypatch):
    monkeypatch.setitem(EVIDENCE, 'summed_grads', summed_grads)
    monkeypatch.setitem(EVIDENCE, 'input_sums', input_sums)


def by_grads(summed_grads): return summed_grads.abs()
def by_inputs(weight, input_sums): return weight.abs() + 0 * input_sums


def test_a_step_is_seen_before_gradients_are_masked(kinds):
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), .1)
    sparsifier = Sparsifier(model, criteria=by_grads, layers='0')
    model[0].weight.grad = torch.arange(16.).view(4, 4)
    sparsifier.evidence.step()
    sparsifier.sparsify_model(50)
    sparsifier.attach(optimizer)
    model[0].weight.grad = torch.ones(4, 4)
    optimizer.step()
    assert (sparsifier.evidence.of(sparsifier.layers['0'])['summed_grads'] == torch.arange(16.).view(4, 4) + 1).all()
    assert (model[0].weight.grad == 0).sum() == 8  # those were masked after it


def test_the_criterion_reads_what_was_collected(kinds):
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    sparsifier = Sparsifier(model, criteria=by_grads, layers='0')
    for grads in ([3., 0, 0, 5, 0, 0, 7, 8], [0., 1, 0, -5, 0, 0, 0, 0]):
        model[0].weight.grad = torch.tensor(grads).view(2, 4)
        sparsifier.evidence.step()
    sparsifier.sparsify_model(50)
    assert sparsifier.masks['0'].int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]


def test_the_callback_tells_each_step_once_and_before_its_event(kinds, make_learner):
    seen = []

    class Watch(Callback):
        order = SparsifyCallback.order - .01

        def before_step(self): seen.append(sum(float(p.grad.abs().sum()) for p in weights(self.learn.model)))
    learn = make_learner()
    callback = SparsifyCallback(50, criteria=by_grads, schedule=linear(0, 1))
    steps = []
    kind = Kind(summed_grads.read, summed_grads.start, lambda layer, state: steps.append(layer.name) or state + layer.weight.grad.abs())
    EVIDENCE['summed_grads'] = kind
    learn.fit(1, cbs=[callback, Watch()])
    layers = callback.sparsifier.layers
    total = sum(float(callback.sparsifier.evidence.of(layer)['summed_grads'].sum()) for layer in layers.values())
    assert total == pytest.approx(sum(seen), rel=1e-5)  # the gradients of pruned weights too
    assert steps == [*layers] * 4


def weights(model): return [p for p in model.parameters() if p.ndim > 1]


def test_inputs_are_seen_without_a_hook(kinds):
    model = convnet()
    sparsifier = Sparsifier(model, criteria=by_inputs)
    x = torch.randn(2, 1, 8, 8)
    with sparsifier.evidence.watching():
        model(x)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        F.conv2d(x, model[0].weight)
        F.conv2d(weight=model[0].weight, input=x)
        F.conv2d(x, torch.randn(1, 1, 3, 3))  # of no layer
    model(x)  # nobody looks any more
    sums = {n: float(sparsifier.evidence.states['input_sums', n]) for n in sparsifier.layers}
    assert sums['0'] == pytest.approx(3 * float(x.sum()), rel=1e-4)
    assert sums['8'] == pytest.approx(float(model[:8](x).sum()), rel=1e-4)


def test_what_nobody_asks_for_is_not_collected(kinds):
    model = convnet()
    sparsifier = Sparsifier(model)
    for p in model.parameters(): p.grad = torch.ones_like(p)
    sparsifier.evidence.step()
    with sparsifier.evidence.watching(): model(torch.randn(1, 1, 8, 8))
    assert sparsifier.evidence.states == {}


def test_evidence_of_another_shape_is_read_for_a_whole_layer(monkeypatch):
    monkeypatch.setitem(EVIDENCE, 'column', Kind(read=lambda layer, state: torch.tensor([5., 1, 3]), weight_shaped=False))

    def by_column(weight, column): return weight.abs() * column
    by_column.elementwise = True
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    nn.init.ones_(model[0].weight)
    sparsifier = Sparsifier(model, criteria=by_column, layers='0')
    sparsifier.sparsify_model(50)
    assert sparsifier.masks['0'].int().tolist() == [[1, 0, 0], [1, 0, 1]]  # the first of the two threes


def test_gradients_of_an_embedding_are_read_dense():
    layer = SimpleNamespace(name='a', weight=nn.Parameter(torch.ones(3, 2)))
    layer.weight.grad = torch.sparse_coo_tensor([[1]], [[5., 6]], (3, 2))
    assert Evidence(('grad',), None).of(layer)['grad'].tolist() == [[0, 0], [5, 6], [0, 0]]


def test_a_frozen_layer_has_nothing_to_tell(kinds):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    sparsifier = Sparsifier(model, criteria=by_grads, layers=['0', '1'])
    model[0].weight.grad = torch.ones(2, 2)
    sparsifier.evidence.step()
    assert list(sparsifier.evidence.states) == [('summed_grads', '0')]


def test_evidence_that_was_never_collected_says_how_to_collect_it(kinds):
    with pytest.raises(ValueError, match="summed_grads is needed and no layer has any: a training step collects it"):
        Sparsifier(convnet(), criteria=by_grads).sparsify_model(50)
    with pytest.raises(ValueError, match="input_sums is needed and no layer has any: give batches with data=, or run them inside"):
        Sparsifier(convnet(), criteria=by_inputs).sparsify_model(50)


def test_missing_evidence_says_how_to_supply_it():
    layers = [SimpleNamespace(name=n, weight=nn.Parameter(torch.ones(2))) for n in 'ab']
    found = Evidence(('weight', 'grad'), None)
    with pytest.raises(ValueError, match="grad is needed and no layer has any: call after loss.backward"):
        found.lacking(layers)
    layers[0].weight.grad = torch.ones(2)
    assert found.lacking(layers) == {'b'}
    layers[1].weight.grad = torch.zeros(2)
    assert found.lacking(layers) == {'b'}
    layers[1].weight.grad = torch.tensor([0., 1])
    assert found.lacking(layers) == set()


@pytest.mark.parametrize('grad, lacks', [(torch.tensor(0.), True), (torch.tensor(2.), False), (torch.zeros(3, 2), True), (torch.eye(3), False),
                                         (torch.cat([torch.zeros(4, 2), torch.ones(1, 2)]), False), (torch.zeros(0, 2), True)])
def test_a_gradient_that_is_all_zero_is_none(grad, lacks, monkeypatch):
    layers = [SimpleNamespace(name=n, weight=nn.Parameter(torch.zeros_like(g))) for n, g in (('a', torch.ones(1)), ('b', grad))]
    layers[0].weight.grad, layers[1].weight.grad = torch.ones(1), grad
    for on_host in (ALONE.on_host, lambda tensor: False):
        monkeypatch.setattr(ALONE, 'on_host', on_host)
        assert Evidence(('grad',), None).lacking(layers) == ({'b'} if lacks else set())


# What is gathered from several steps. Each table is of one layer with the weights 2, -1, 3; a step is a gradient.

WEIGHT = [2., -1, 3]
GATHERED = ['grad_mean', 'saliency', 'batch_squares', 'movement']
STEPS = {  # kind: what is known after each of two steps
    'grad_mean': [[1, 4, -2], [2, 2, 0]],
    'saliency': [[2, 4, 6], [4, 2, 6]],
    'batch_squares': [[1, 16, 4], [5, 8, 4]],
    'movement': [[-2, 4, 6], [-8, 4, 0]],
}
NOW = {'grad_mean': [1, 4, -2], 'saliency': [2, 4, 6], 'batch_squares': [1, 16, 4]}  # where no step was told
GRADS = [1., 4, -2], [3., 0, 2]
gathered = pytest.mark.parametrize('kind', GATHERED)
means = pytest.mark.parametrize('kind', NOW)


def asks(*kinds):
    "A criterion that asks for these."
    arguments = ', '.join(['weight', *kinds])
    return eval(f'lambda {arguments}: weight.abs()')


def three(dtype=torch.float32):
    model = nn.Sequential(nn.Linear(3, 1, bias=False)).to(dtype)
    model[0].weight.data = torch.tensor([WEIGHT], dtype=dtype)
    return model


def gathering(*kinds, dtype=torch.float32):
    return Sparsifier(three(dtype), criteria=asks(*kinds), layers='0')


def tell(sparsifier, grad):
    weight = sparsifier.model[0].weight
    weight.grad = None if grad is None else torch.tensor([grad], dtype=weight.dtype)
    sparsifier.evidence.step()


def known(sparsifier, kind):
    found = sparsifier.evidence.of(sparsifier.layers['0'])[kind]
    return found.flatten().tolist()


@gathered
def test_two_steps_by_eye(kind):
    sparsifier = gathering(kind)
    for grad, expected in zip(GRADS, STEPS[kind]):
        tell(sparsifier, grad)
        assert known(sparsifier, kind) == expected


@means
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_gradient_that_is_there_is_widened_too(kind, dtype):
    sparsifier = gathering(kind, dtype=dtype)
    weight = sparsifier.model[0].weight
    weight.grad = weight.detach() / 7
    found = torch.tensor(known(sparsifier, kind))
    w, g = weight.detach().float().flatten(), weight.grad.float().flatten()
    assert torch.equal(found, {'grad_mean': g, 'saliency': (w * g).abs(), 'batch_squares': g * g}[kind])


@means
def test_where_no_step_was_told_the_gradient_that_is_there_counts(kind):
    sparsifier = gathering(kind)
    sparsifier.model[0].weight.grad = torch.tensor([GRADS[0]])
    assert known(sparsifier, kind) == NOW[kind]
    assert sparsifier.evidence.states == {}


def test_movement_is_of_steps_alone():
    sparsifier = gathering('movement')
    sparsifier.model[0].weight.grad = torch.ones(1, 3)
    with pytest.raises(ValueError, match='movement is needed and no layer has any: a training step collects it'): sparsifier.sparsify_model(50)


@gathered
@pytest.mark.parametrize('absent', [None, [0., 0, 0]], ids=['no gradient', 'zero gradient'])
def test_steps_in_which_a_layer_took_no_part_are_left_out(kind, absent):
    sparsifier = gathering(kind)
    for grad in (absent, GRADS[0], absent, GRADS[1], absent): tell(sparsifier, grad)
    assert known(sparsifier, kind) == STEPS[kind][1]


@gathered
def test_an_event_begins_a_mean_anew_and_goes_on_with_a_sum(kind):
    sparsifier = gathering(kind)
    tell(sparsifier, GRADS[1])
    tell(sparsifier, GRADS[1])
    sparsifier.sparsify_model(0)
    tell(sparsifier, GRADS[0])
    assert known(sparsifier, kind) == (STEPS[kind][0] if kind != 'movement' else [-14, 4, -6])


@gathered
def test_a_failed_event_leaves_it_as_it_was(kind):
    sparsifier = gathering(kind)
    for grad in GRADS: tell(sparsifier, grad)
    sparsifier.model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match='the weight of layer .0. has NaN'): sparsifier.sparsify_model(50)
    assert known(sparsifier, kind) == STEPS[kind][1]


@means
def test_only_the_layers_of_an_event_begin_anew(kind):
    model = nn.Sequential(three()[0], three()[0])
    sparsifier = Sparsifier(model, criteria=asks(kind), layers=['0', '1'])
    for layer in model: layer.weight.grad = torch.tensor([GRADS[1]])
    sparsifier.evidence.step()
    sparsifier.sparsify_layer('1', 50)
    assert [*sparsifier.evidence.states] == [(kind, '0')]


@means
def test_a_layer_that_took_part_in_no_step_waits_and_is_named(kind):
    model = nn.Sequential(three()[0], three()[0])
    sparsifier = Sparsifier(model, criteria=asks(kind), layers=['0', '1'])
    for absent in (None, torch.zeros(1, 3)):
        model[0].weight.grad, model[1].weight.grad = torch.ones(1, 3), absent
        sparsifier.evidence.step()
        with pytest.warns(UserWarning, match="'1' took no part"): assert sparsifier.sparsify_model(0).waiting == {'1'}
    model[1].weight.grad = torch.ones(1, 3)
    sparsifier.evidence.step()
    assert not sparsifier.sparsify_model(0).waiting


@means
def test_after_an_event_another_one_needs_a_gradient(kind):
    sparsifier = gathering(kind)
    tell(sparsifier, GRADS[0])
    sparsifier.model.zero_grad()
    sparsifier.sparsify_model(30)
    with pytest.raises(ValueError, match=f'{kind} is needed and no layer has any: call after loss.backward.*or attach the optimizer'):
        sparsifier.sparsify_model(60)


@gathered
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_widened_before_it_is_multiplied(kind, dtype):
    sparsifier = gathering(kind, dtype=dtype)
    one = 1 + (2 ** -7 if dtype == torch.bfloat16 else 2 ** -10)  # three times as much has a digit more than there is room for
    tell(sparsifier, [2 ** -13, 0., one])
    expected = {'grad_mean': [2 ** -13, 0, one], 'saliency': [2 ** -12, 0, 3 * one], 'batch_squares': [2 ** -26, 0, one * one],
                'movement': [-2 ** -12, 0, -3 * one]}
    assert known(sparsifier, kind) == expected[kind]
    layer = sparsifier.layers['0']
    assert sparsifier.evidence.of(layer)[kind].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for _ in range(3): tell(sparsifier, [.1, 0, 0])
    assert sparsifier.evidence.states[kind, '0'].steps == 4


@gathered
def test_a_copy_and_a_pickle_have_it_and_go_their_own_way(kind):
    sparsifier = Sparsifier(three(), criteria=by_kind[kind], layers='0')
    tell(sparsifier, GRADS[0])
    for twin in (deepcopy(sparsifier), pickle.loads(pickle.dumps(sparsifier))):
        tell(twin, GRADS[1])
        assert known(twin, kind) == STEPS[kind][1] and known(sparsifier, kind) == STEPS[kind][0]


def by_grad_mean(grad_mean): return abs(grad_mean)
def by_squares(batch_squares): return batch_squares


by_kind = {'grad_mean': by_grad_mean, 'saliency': 'gradient', 'batch_squares': by_squares, 'movement': 'movement'}


@gathered
def test_it_is_one_tensor_a_weight(kind):
    sparsifier = gathering(kind)
    for grad in GRADS: tell(sparsifier, grad)
    assert [*sparsifier.evidence.states] == [(kind, '0')]
    assert sum(tensor.numel() for tensor in sparsifier.evidence.states[kind, '0']) == 3 + 1


@gathered
def test_a_step_is_told_by_an_attached_optimizer_and_reads_no_masked_gradient(kind):
    sparsifier = gathering(kind)
    weight = sparsifier.model[0].weight
    optimizer = torch.optim.SGD([weight], lr=0.)
    sparsifier.attach(optimizer)
    sparsifier.masks['0'] = torch.tensor([[True, True, False]])
    weight.data[0, 2] = 3  # so that what is masked would be seen
    for half in (1, 2):  # accumulated in two batches
        batch = torch.tensor([GRADS[0]]) / 2
        weight.grad = batch if half == 1 else weight.grad + batch
    optimizer.step()
    assert known(sparsifier, kind) == STEPS[kind][0]


def test_accumulated_gradients_are_one_step_in_a_fit(make_learner):
    learn = make_learner(batches=6, bs=8)
    callback = SparsifyCallback(0, criteria='movement')
    learn.fit(1, cbs=[callback, GradientAccumulation(24)])
    assert {int(state.steps) for state in callback.sparsifier.evidence.states.values()} == {2}


def test_a_large_layer_is_added_up_in_pieces(monkeypatch):
    monkeypatch.setattr(table, 'PIECE', 8)
    model = nn.Sequential(nn.Conv2d(3, 7, 2).to(memory_format=torch.channels_last))
    sparsifier, weight = Sparsifier(model, criteria='gradient', layers='0'), model[0].weight
    weight.grad = torch.randn_like(weight)
    for _ in range(2): sparsifier.evidence.step()
    found = sparsifier.evidence.of(sparsifier.layers['0'])['saliency']
    assert torch.equal(found, (weight * weight.grad).abs())


# The weight as it was

def test_the_weight_as_it_was_when_the_sparsifier_was_made():
    sparsifier = gathering('initial')
    sparsifier.model[0].weight.data.mul_(5)
    sparsifier.sparsify_model(40)
    assert known(sparsifier, 'initial') == WEIGHT
    assert known(pickle.loads(pickle.dumps(Sparsifier(sparsifier.model, criteria='magnitude_increase', layers='0'))), 'initial') == [10, 0, 15]


def test_a_frozen_layer_has_a_beginning_too():
    model = nn.Sequential(three()[0], three()[0])
    model[0].weight.requires_grad_(False)
    sparsifier = Sparsifier(model, criteria='magnitude_increase')
    model[0].weight.requires_grad_(True)
    model[0].weight.data += 1
    assert known(sparsifier, 'initial') == WEIGHT


def test_of_what_nobody_asks_for_nothing_is_kept():
    assert not Sparsifier(three(), criteria='gradient', layers='0').evidence.states
    assert [*gathering('initial', 'movement').evidence.states] == [('initial', '0')]


# What was gathered is saved

def trained(steps, model=None, criterion='movement', state=None, path=None):
    "A Sparsifier after some steps, which may go on from a state; the steps are the same each time."
    torch.manual_seed(1)
    model = model or nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    sparsifier = Sparsifier(model, criteria=criterion, layers=['0', '2'])
    if state is not None: sparsifier.load_state_dict(state)
    optimizer = torch.optim.SGD(model.parameters(), .1)
    sparsifier.attach(optimizer)
    for i in steps:
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    sparsifier.detach()
    return sparsifier


@pytest.mark.parametrize('criterion', ['movement', 'gradient', 'taylor', 'magnitude_increase'])
def test_what_was_gathered_survives_a_resume(criterion, tmp_path):
    whole = trained(range(6), criterion=criterion)
    first = trained(range(3), criterion=criterion)
    torch.save(first.state_dict(), tmp_path / 'state.pt')
    state = torch.load(tmp_path / 'state.pt', weights_only=True)
    second = trained(range(3, 6), deepcopy(first.model), criterion, state)
    whole.sparsify_model(50)
    second.sparsify_model(50)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters()))


def test_a_state_of_masks_alone_says_that_evidence_begins_anew():
    first = trained(range(3))
    state = {name: {'shape': saved['shape'], 'bits': saved['bits']} for name, saved in first.state_dict().items()}
    with pytest.warns(UserWarning, match="state: got none of what earlier steps have gathered, 'movement': it begins anew"):
        first.load_state_dict(state)
    Sparsifier(first.model, layers=['0', '2']).load_state_dict(state)  # needs none


def test_between_events_no_data_are_read():  # a fit asks at each step whether a layer that waits is known now
    class Unread:
        def __iter__(self): raise AssertionError
    model = nn.Linear(4, 4)
    sparsifier = Sparsifier(model, criteria='sparsegpt', data=Unread())
    assert not sparsifier.evidence.known(sparsifier.layers['weight'])


def test_a_state_of_another_criterion_says_that_evidence_begins_anew():
    state = trained(range(3), criterion='gradient').state_dict()
    other = trained(range(3))
    with pytest.warns(UserWarning, match="of what earlier steps have gathered, 'movement': it begins anew"):
        other.load_state_dict(state)
    assert not other.evidence.states  # its own is of another network


def test_a_state_from_right_after_an_event_has_nothing_to_warn_of(recwarn):
    first = trained(range(3), criterion='gradient')
    first.sparsify_model(50)
    other = trained(range(3), criterion='gradient')
    other.load_state_dict(first.state_dict())
    assert not recwarn.list and not other.evidence.states


@pytest.mark.parametrize('wrong, says', [(5, "5 as evidence about '0', expected a dict"),
    ({'movement': {'steps': 3, 'total': 4}}, "as 'movement' of '0', expected two tensors")])
def test_a_state_that_is_none_is_refused(wrong, says):
    first = trained(range(3))
    state, before = first.state_dict(), dict(first.evidence.states)
    state['0']['evidence'] = wrong
    with pytest.raises(ValueError, match=f'state: got .*{says}'): first.load_state_dict(state)
    assert first.evidence.states == before


def test_a_saved_state_is_a_copy_and_a_wrong_one_changes_nothing():
    first = trained(range(3))
    state = first.state_dict()
    before = state['0']['evidence']['movement']['total'].clone()
    other = trained(range(3), state=deepcopy(state))
    assert torch.equal(state['0']['evidence']['movement']['total'], before) and other.evidence.states
    state['0']['evidence']['movement']['total'] = torch.zeros(2, 2)
    states = dict(first.evidence.states)
    with pytest.raises(ValueError, match=r"state: got 'movement' of shape \(2, 2\) for '0', expected \(8, 6\)"): first.load_state_dict(state)
    assert first.evidence.states == states
