"Repair by data: exact where it can be, never harmful, and the mask is the same before and after."
from copy import deepcopy

import pytest
import torch
from conftest import convnet, same, tensors_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fasterai import repair as repairs
from fasterai.data import held_out, read_data
from fasterai.repair import Repaired, divergence, recalibrate, refit
from fasterai.sparsifier import Sparsifier


def linear(*rows):
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight.data = torch.tensor(rows, dtype=torch.float32)
    return nn.Sequential(layer)


def state(model): return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_weight_makes_up_for_one_that_reads_the_same():
    dense = linear([1, 2, 4], [3, 1, 5])
    model, x = deepcopy(dense), torch.randn(64, 3)
    x[:, 1] = x[:, 0]
    model[0].weight.data[0, 0] = model[0].weight.data[1, 1] = 0
    found = refit(model, dense, x)
    torch.testing.assert_close(model[0].weight, torch.tensor([[0., 3, 4], [4, 0, 5]]), atol=.05, rtol=0)
    assert found.kept and found.after < 1e-3 * found.before


def test_a_later_layer_makes_up_for_an_earlier_one():
    "The first layer loses a channel that is a copy of another; the layer that reads both makes up for it."
    dense = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        dense[0].weight[1], dense[0].bias[1] = dense[0].weight[0], dense[0].bias[0]
    model, x = deepcopy(dense), torch.randn(256, 4)
    with torch.no_grad(): model[0].weight[1], model[0].bias[1] = 0, 0
    expected = torch.stack([dense[2].weight[:, 0] + dense[2].weight[:, 1], dense[2].weight[:, 1], dense[2].weight[:, 2]], 1)
    assert refit(model, dense, x).kept
    torch.testing.assert_close(model[2].weight, expected, atol=.05, rtol=0)
    assert (model[0].weight[1] == 0).all()


NETWORKS = {
    'convolutions': (convnet, (1, 8, 8)),
    'grouped and transposed': (lambda: nn.Sequential(nn.Conv2d(2, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2),
                                                     nn.Flatten(), nn.Linear(4 * 12 * 12, 3)), (2, 8, 8)),
    'one dimension': (lambda: nn.Sequential(nn.Conv1d(3, 6, 3), nn.ReLU(), nn.Conv1d(6, 4, 2), nn.Flatten(), nn.Linear(4 * 6, 2)), (3, 9)),
}


def trained(name):
    "A network of that name with statistics that are not those of a fresh one."
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(64, *shape) + .5
    for _ in range(20): model(x)
    return model.eval(), x


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('granularity', ['weight', 'kernel', 'filter'])
@pytest.mark.parametrize('sparsity', [30, 60])
def test_repairs_come_nearer_and_move_no_mask(name, granularity, sparsity):
    dense, x = trained(name)
    model = deepcopy(dense)
    sparsifier = Sparsifier(model, granularity, 'local', example=x[:2], data=x.split(8), repair=('refit', 'batchnorm'))
    cut = deepcopy(dense)
    Sparsifier(cut, granularity, 'local', example=x[:2]).sparsify_model(sparsity)
    change = sparsifier.sparsify_model(sparsity)
    for twin, pruned in zip(model.parameters(), cut.parameters()): assert torch.equal(twin == 0, pruned == 0) or twin.ndim < 2
    zeros = [int((layer.weight == 0).sum()) for layer in sparsifier.layers.values()]
    assert zeros == [int((~sparsifier.masks[n]).sum()) for n in sparsifier.layers]
    others = read_data(torch.randn(256, *x.shape[1:]) + .5, dense)
    before, after = divergence(cut, dense, others), divergence(model, dense, others)
    assert after < before if any(r.kept for r in change.repaired) else after == before


def test_nothing_moves_where_nothing_was_pruned():
    dense, x = trained('convolutions')
    model = deepcopy(dense)
    before = state(model)
    assert [r(model, dense, x.split(16)) for r in (refit, recalibrate)] == [Repaired(0., 0., False)] * 2
    sparsifier = Sparsifier(model, data=x, repair=['refit', 'batchnorm'])
    sparsifier.sparsify_model(0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    dense.train()
    with torch.no_grad(): repairs._recalibrate(model, dense.eval(), read_data(x, model))  # without the choice that would undo it
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batchnorm_sees_on_the_data_what_it_saw_in_the_dense_network():
    dense, x = trained('convolutions')
    model = deepcopy(dense)
    with torch.no_grad(): model[0].weight[:, :, 0] = 0
    with torch.no_grad(): repairs._recalibrate(model, dense, read_data(x.split(16), model))

    def normalized(net):
        out = net[:2](x).transpose(0, 1).flatten(1)
        return out.mean(1), out.std(1)
    for now, before in zip(normalized(model), normalized(dense)): torch.testing.assert_close(now, before, atol=1e-4, rtol=1e-4)


def test_what_does_harm_is_undone():
    dense, x = trained('convolutions')
    model = deepcopy(dense)
    Sparsifier(model).sparsify_model(30)
    before = state(model)

    def harm(model, dense, batches):
        for p in model.parameters(): p.mul_(3)
    found = repairs._kept_if_nearer(model, dense, x.split(16), harm)
    assert not found.kept and found.before == found.after
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_inputs_that_are_dead_alike_or_too_few():
    dense = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(6, 12)
    x[:, :3], x[:, 4] = 0, x[:, 5]
    for data in (x, torch.zeros(4, 12), x[:1]):
        model = deepcopy(dense)
        Sparsifier(model).sparsify_model(50)
        zero = [p == 0 for p in model.parameters()]
        refit(model, dense, data)
        assert all(torch.isfinite(p).all() and torch.equal(p == 0, z) for p, z in zip(model.parameters(), zero))


def test_a_weight_that_is_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.layer, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x): return self.head(self.layer(self.layer(self.stem(x)).relu()).relu())
    dense, x = Twice(), torch.randn(128, 4)
    model = deepcopy(dense)
    Sparsifier(model, layers='layer').sparsify_model(40)
    assert refit(model, dense, x).kept and (model.layer.weight == 0).sum() == 14


def test_a_repair_that_fails_leaves_all_as_it_was():
    dense, x = trained('convolutions')
    model = deepcopy(dense).train()

    def broken(model, dense, data):
        for p in model.parameters(): p.data.mul_(2)
        raise RuntimeError('broken')
    sparsifier = Sparsifier(model, 'filter', example=x[:2], data=x, repair=['refit', broken])
    before, values, rng = tensors_of(sparsifier), state(model), torch.get_rng_state()
    with pytest.raises(RuntimeError, match='broken'): sparsifier.sparsify_model(50)
    assert same(before, tensors_of(sparsifier)) and all(torch.equal(v, values[n]) for n, v in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state()) and all(m.training for m in model.modules())
    sparsifier.repairs = sparsifier.repairs[:1]
    sparsifier.sparsify_model(50)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize('repair, data, error, says', [
    ('refitt', torch.randn(2, 4), ValueError, "repair: got 'refitt', expected one of refit, batchnorm, or a function .*; did you mean 'refit'"),
    ('refit', None, ValueError, "data: got None, expected batches with repair='refit'"),
    ('refit', 7, TypeError, 'data: got int, expected batches: a DataLoader'), ('refit', [], ValueError, 'data: got no batch')])
def test_what_cannot_be_is_refused(repair, data, error, says):
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(error, match=says): Sparsifier(model, data=data, repair=repair).sparsify_model(50)
    assert (model[0].weight != 0).all()


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x, scale=1.): return scale * self.layer(x)


def test_forms_of_data(make_learner):
    x, y = torch.randn(12, 4), torch.zeros(12)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    assert [tuple(batch.args[0].shape) for batch in read_data(loader, nn.Linear(4, 2))] == [(4, 4)] * 3
    assert len(read_data((part for part in x.split(3)), nn.Linear(4, 2))) == 4 and len(read_data(x, nn.Linear(4, 2))) == 1
    batch, = read_data([{'x': x, 'scale': 2.}], Keywords())
    assert batch.kwargs['scale'] == 2.
    assert len(read_data(make_learner().dls, convnet())) == 4
    solve, judge = held_out(read_data(x.split(1), nn.Linear(4, 2)))
    assert (len(solve), len(judge)) == (9, 3)
    (solve,), (judge,) = held_out(read_data(x, nn.Linear(4, 2)))
    assert (len(solve.args[0]), len(judge.args[0])) == (9, 3)


class Padded(nn.Module):
    "Tokens that a mask says are real or padding: a layer, BatchNorm over the positions, a layer."
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x, attention_mask): return self.head(self.norm(self.stem(x).transpose(1, 2)).relu().transpose(1, 2))


def test_padded_tokens_do_not_count():
    "Whatever stands in the padding, repair and divergence are the same."
    dense = Padded().eval()
    tokens, real = torch.randn(24, 5, 4), torch.rand(24, 5) < .6
    found = []
    for padding in (0., 30.):
        model = deepcopy(dense)
        Sparsifier(model).sparsify_model(50)
        data = [{'x': tokens.masked_fill(~real[..., None], padding)[i:i + 6], 'attention_mask': real[i:i + 6]} for i in range(0, 24, 6)]
        before = divergence(model, dense, read_data(data, model))
        result = refit(model, dense, data)
        with torch.no_grad(): repairs._recalibrate(model, dense, read_data(data, model))  # without the choice that would undo it
        found.append(([before, result], state(model)))
    (results, values), (others, same_values) = found
    assert results == others and results[1].kept
    assert all(torch.equal(value, same_values[name]) for name, value in values.items())


def test_batches_that_come_once_serve_all_repairs_and_events():
    dense, x = trained('convolutions')
    sparsifier = Sparsifier(deepcopy(dense), data=(part for part in x.split(8)), repair=('refit', 'batchnorm'))
    for sparsity in (30, 50): assert len(sparsifier.sparsify_model(sparsity).repaired) == 2
