
import pytest
import torch
from conftest import convnet, same, tensors_of
from torch import nn

from fasterai.selected import Selected
from fasterai.sparsifier import Sparsifier


def test_a_tensor_that_is_all_zero_is_an_initialisation(net):
    nn.init.zeros_(net[8].weight)
    assert Sparsifier(net).masks['8'].all()


def test_masks_win_over_nan(net):
    sparsifier = Sparsifier(net)
    sparsifier.sparsify_model(50)
    for p in net.parameters(): p.data.fill_(float('nan'))
    sparsifier.apply_masks()
    assert sparsifier.report().zeros == 283


def test_a_filter_that_comes_back_can_learn(net):
    sparsifier = Sparsifier(net, 'filter', 'local')
    sparsifier.sparsify_model(50)
    sparsifier.sparsify_model(0, regrow=True)
    assert (net[1].weight == 1).all() and (net[4].weight == 1).all() and ((net[4].bias == 0) | (net[4].bias == .01)).all()
    net(torch.randn(8, 1, 8, 8)).square().sum().backward()
    assert (net[3].weight.grad.flatten(1).abs().sum(1) > 0).all()


def test_state_dict_round_trip(net, tmp_path):
    sparsifier = Sparsifier(net)
    sparsifier.sparsify_model(70)
    torch.save(sparsifier.state_dict(), tmp_path / 'masks.pt')
    state = torch.load(tmp_path / 'masks.pt', weights_only=True)
    assert state['0']['bits'].dtype == torch.uint8 and len(state['0']['bits']) == 7  # 54 weights
    other = Sparsifier(convnet())
    other.load_state_dict(state)
    assert all(torch.equal(sparsifier.masks[n], other.masks[n]) for n in sparsifier.layers) and other.report().zeros == 396


@pytest.mark.parametrize('spoil, says', [
    (lambda s: s.pop('3'), 'got masks for 0, 8, expected those for 0, 3, 8'),
    (lambda s: s.update(x=s['3']), 'got masks for 0, 3, 8, x'),
    (lambda s: s['3'].update(shape=(8, 6, 9)), r"got a mask of shape \(8, 6, 9\) for '3', expected \(8, 6, 3, 3\)"),
    (lambda s: s['3'].update(bits=s['3']['bits'][:-1]), "for '3'")])
def test_masks_that_do_not_fit_are_refused(net, spoil, says):
    sparsifier = Sparsifier(net)
    state = sparsifier.state_dict()
    spoil(state)
    before = tensors_of(sparsifier)
    with pytest.raises(ValueError, match=says): sparsifier.load_state_dict(state)
    assert same(before, tensors_of(sparsifier))


@pytest.mark.parametrize('state, error', [(None, TypeError), ({'0': {}, '3': {}, '8': {}}, ValueError)])
def test_states_of_other_kinds_are_refused(net, state, error):
    with pytest.raises(error, match='state: got'): Sparsifier(net).load_state_dict(state)


def test_recurrent_weights_stay_sparse_and_flat():
    lstm = nn.LSTM(6, 8, num_layers=2, bidirectional=True)
    pointers = [p.data_ptr() for p in lstm.parameters()]
    sparsifier = Sparsifier(lstm)
    sparsifier.sparsify_model(80)
    optimizer = torch.optim.Adam(lstm.parameters())
    sparsifier.attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        lstm(torch.randn(5, 2, 6))[0].square().mean().backward()
        optimizer.step()
    lstm.flatten_parameters()
    report = sparsifier.report()
    assert report.zeros == round(.8 * report.weights) and len(report.rows) == 8
    assert [p.data_ptr() for p in lstm.parameters()] == pointers  # what cuDNN has flattened is where it was


@pytest.mark.parametrize('kind', [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients(kind):
    model = nn.Sequential(kind(20, 6, sparse=True))
    def backward(): model(torch.tensor([[1, 2, 2], [3, 4, 5]])).square().sum().backward()
    backward()
    sparsifier = Sparsifier(model, criteria='gradient', layers=['0'])
    sparsifier.sparsify_model(50)
    optimizer = torch.optim.SparseAdam(model.parameters())
    sparsifier.attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        backward()
        optimizer.step()
    assert sparsifier.report().zeros == 60 and not model[0].weight.grad.to_dense()[model[0].weight == 0].any()


@pytest.mark.parametrize('spoil', [
    lambda bits: bits.sum().to(torch.uint8), lambda bits: bits[:, None].expand(-1, 5), lambda bits: bits.to('meta'), lambda bits: bits[None],
    lambda bits: bits.to_sparse(), lambda bits: bits[:-1], lambda bits: bits.int(), lambda bits: bits.numpy(), lambda bits: None])
def test_bits_of_another_kind_are_refused(net, spoil):
    sparsifier = Sparsifier(net)
    sparsifier.sparsify_model(50)
    before, state = tensors_of(sparsifier), sparsifier.state_dict()
    state['8'] = state['8'] | {'bits': spoil(state['8']['bits'])}
    with pytest.raises(ValueError, match="state: got .* for '8', expected"): sparsifier.load_state_dict(state)
    assert same(before, tensors_of(sparsifier))


@pytest.mark.parametrize('packed', [None, 7, 'x', [], torch.ones(3), {'shape': 7, 'bits': torch.ones(3, dtype=torch.uint8)}])
def test_masks_of_another_kind_are_refused(net, packed):
    sparsifier = Sparsifier(net)
    with pytest.raises(ValueError, match="state: got .* for '8', expected a dict"):
        sparsifier.load_state_dict(sparsifier.state_dict() | {'8': packed})


# Masks of one's own

def test_masks_are_read_set_and_combined_by_name(net):
    one, two = Sparsifier(net), Sparsifier(convnet(), 'filter', 'local', layers=['0', '3', '8'])
    one.sparsify_model(50)
    two.sparsify_model(50)
    assert list(one.masks) == ['0', '3', '8'] and len(one.masks) == 3 and '3' in one.masks and 'x' not in one.masks
    both = {name: mask & two.masks[name] for name, mask in one.masks.items()}
    one.masks.update(both)
    assert all(torch.equal(one.masks[name], mask) for name, mask in both.items())
    assert one.report().zeros == sum(int((~mask).sum()) for mask in both.values())
    one.masks['3'] = torch.ones(8, 6, 3, 3, dtype=torch.bool)
    assert one.masks['3'].all() and (net[3].weight == 0).any()  # what comes back starts from zero
    with torch.no_grad(): net[3].weight.fill_(1)
    one.apply_masks()
    assert (net[3].weight == 1).all()


def test_a_mask_that_was_read_is_a_copy(net):
    for granularity in ('weight', 'filter', 'layer'):
        sparsifier = Sparsifier(net, granularity)
        sparsifier.masks['3'].fill_(False)
        assert sparsifier.masks['3'].all()
    mask = torch.zeros(8, 6, 3, 3, dtype=torch.bool)
    sparsifier.masks['3'] = mask
    mask.fill_(True)
    assert not sparsifier.masks['3'].any()


def test_an_event_counts_masks_of_ones_own(net):
    sparsifier = Sparsifier(net, 'filter', 'local', layers='3')
    mask = torch.ones(8, 6, 3, 3, dtype=torch.bool)
    mask[1] = mask[5, 0] = False
    sparsifier.masks['3'] = mask
    sparsifier.sparsify_model(50)
    assert abs(sparsifier.report().zeros - 216) <= 27 and not sparsifier.masks['3'][~mask].any()


@pytest.mark.parametrize('masks, says', [
    ({'x': torch.ones(1, dtype=torch.bool)}, "masks: got 'x', expected one of 0, 3, 8"),
    ({'3': torch.ones(8, 6, 3, 3)}, r"masks: got a strided tensor of float32 on cpu of shape \(8, 6, 3, 3\) for '3', expected a bool tensor of shape"),
    ({'0': torch.zeros(6, 1, 3, 3, dtype=torch.bool), '3': torch.ones(8, 6, dtype=torch.bool)}, r'of shape \(8, 6\)'),
    ({'3': None}, "masks: got NoneType for '3'")])
def test_masks_of_ones_own_that_do_not_fit_are_refused(net, masks, says):
    sparsifier = Sparsifier(net)
    before = tensors_of(sparsifier)
    with pytest.raises(ValueError, match=says): sparsifier.masks.update(masks)
    assert same(before, tensors_of(sparsifier))
    with pytest.raises(TypeError, match='masks: got list'): sparsifier.masks.update([])
    with pytest.raises(KeyError, match="masks: got '33', expected one of 0, 3, 8; did you mean '3'?"): sparsifier.masks['33']


def test_what_is_masked_along_is_found_once_in_an_event(monkeypatch):
    calls, found = [], Selected.dependents
    monkeypatch.setattr(Selected, 'dependents', lambda *given: calls.append(given) or found(*given))
    sparsifier = Sparsifier(convnet(), 'filter', example=torch.randn(1, 1, 8, 8))
    for n in (1, 2):
        sparsifier.sparsify_model(30 * n)
        assert len(calls) == n
