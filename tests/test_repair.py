"Repair by data: exact where it can be, never harmful, and the mask is the same before and after."
import warnings
from copy import deepcopy

import pytest
import torch
from conftest import convnet, same, tensors_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fasterai import repair as repairs
from fasterai.data import held_out, joined, read_data
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


def test_statistics_may_be_those_of_the_data_where_pruning_has_changed_something():
    dense, x = trained('convolutions')
    model = deepcopy(dense)
    with torch.no_grad(): model[3].weight[:, 2] = 0
    before = state(model)
    with torch.no_grad(): repairs._reestimate(model, dense, read_data(x.split(16), model))
    reads = model[:4](x).transpose(0, 1).flatten(1)
    torch.testing.assert_close([model[4].running_mean, model[4].running_var], [reads.mean(1), reads.var(1)], atol=1e-5, rtol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items() if not name.startswith('4.running'))


@pytest.mark.parametrize('most', [0, 2 ** 22])
def test_a_later_norm_sees_an_earlier_one_adapted(most, monkeypatch):
    monkeypatch.setattr('fasterai.data.JOINED', most)
    dense, x = trained('convolutions')
    model = deepcopy(dense)
    with torch.no_grad():
        model[0].weight[:, :, 0] = 0
        repairs._reestimate(model, dense, read_data(x.split(16), model))
    for i in (1, 4):
        reads = model[:i](x).transpose(0, 1).flatten(1)
        torch.testing.assert_close(model[i].running_mean, reads.mean(1), atol=1e-5, rtol=1e-4)


class Shared(nn.Module):
    "A BatchNorm that is used twice, with one behind it."
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x): return self.last(self.norm(self.a(self.norm(self.a(x)).relu())))


@pytest.mark.parametrize('net', [lambda: trained('convolutions'), lambda: (Shared().eval(), torch.randn(64, 4))])
@pytest.mark.parametrize('repair', [repairs._recalibrate, repairs._reestimate])
def test_one_pass_adapts_all_as_a_pass_for_each_does(net, repair, monkeypatch):
    dense, x = net()
    model, found = deepcopy(dense), []
    Sparsifier(model).sparsify_model(50)
    for most in (0, 2 ** 22):
        monkeypatch.setattr('fasterai.data.JOINED', most)
        other = deepcopy(model)
        with torch.no_grad(): repair(other, dense, read_data(x.split(16), model))
        found.append(state(other))
    for name, value in found[0].items(): torch.testing.assert_close(found[1][name], value, atol=1e-5, rtol=1e-4)
    assert not all(torch.equal(value, model.state_dict()[name]) for name, value in found[0].items())


def test_batches_are_joined_where_the_first_axis_is_the_batch():
    def n(*batches): return len(joined(read_data(list(batches), nn.Identity())))
    pictures, rows = torch.randn(2, 3, 4, 4), torch.randn(2, 5)
    assert n(pictures, pictures) == n(rows, rows[:1]) == 1
    assert n(rows, rows[:, :4]) == n(rows.long(), rows.long()) == n(pictures[0], pictures[0]) == n((rows, rows, 0), (rows, rows, 0)) == 2


@pytest.mark.parametrize('errors, form', [((.5, .2), 'second'), ((.5, .49), 'first'), ((.99, .5), 'second'), ((.99, .98), None), ((1.5, 3), None)])
def test_of_two_forms_the_first_is_kept_unless_the_second_is_clearly_nearer(errors, form):
    dense, x = linear([1, 2, 4], [3, 1, 5]), torch.randn(64, 3)
    model = deepcopy(dense)
    model[0].weight.data *= 2

    def moves(error):
        def change(model, dense, batches): model[0].weight.copy_(dense[0].weight * (1 + error ** .5))
        return change
    found = repairs._kept_if_nearer(model, dense, x, dict(zip(('first', 'second'), map(moves, errors))))
    left = {'first': errors[0], 'second': errors[1], None: 1}[form]
    assert found.form == form and found.kept == (form is not None) and found.after == pytest.approx(left * found.before)
    torch.testing.assert_close(model[0].weight, dense[0].weight * (1 + left ** .5))


def test_batchnorm_without_statistics_is_left_alone():
    dense, x = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.BatchNorm1d(6)).eval(), torch.randn(32, 4)
    model = deepcopy(dense)
    Sparsifier(model).sparsify_model(50)
    for repair in (repairs._recalibrate, repairs._reestimate):
        with torch.no_grad(): repair(model, dense, read_data(x.split(8), model))
    assert model[1].running_mean is None and not torch.equal(model[2].running_mean, dense[2].running_mean)


def test_what_does_harm_is_undone():
    dense, x = trained('convolutions')
    model = deepcopy(dense)
    Sparsifier(model).sparsify_model(30)
    before = state(model)

    def harm(model, dense, batches):
        for p in model.parameters(): p.mul_(3)
    found = repairs._kept_if_nearer(model, dense, x.split(16), {'harm': harm})
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


def test_too_few_rows_are_told():
    dense, x = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(9, 12)
    model = deepcopy(dense)
    Sparsifier(model).sparsify_model(50)
    with pytest.warns(UserWarning, match=r"data: got 7 rows for '0.weight' with 12 inputs, expected at least") as told: refit(model, dense, x)
    assert len(told) == 1
    model[0].weight.data[:, 4:] = 0  # inputs that nothing reads are not counted
    x[:, 0] = 0  # nor those that are always zero
    with pytest.warns(UserWarning) as told: refit(model, dense, x[:5])
    assert len(told) == 1 and "'0.weight'" not in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        refit(model, dense, torch.randn(32, 12))


class Both(nn.Module):
    "A weight that belongs to two modules, and one that is used twice, beside a table that shares a weight with a layer."
    def __init__(self):
        super().__init__()
        self.table, self.a, self.b, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 9)
        self.b.weight, self.head.weight = self.a.weight, self.table.weight

    def forward(self, x): return self.head(self.b(self.a(self.table(x)).relu()).relu())


def test_a_weight_of_two_modules_is_solved_and_one_of_a_table_is_not():
    dense, x = Both(), torch.randint(0, 9, (64, 5))
    model = deepcopy(dense)
    with torch.no_grad(): model.a.weight[:, 0], model.table.weight[:4] = 0, 0
    table = model.table.weight.clone()
    with torch.no_grad(): repairs._refit(model, dense, read_data(x.split(16), model))
    assert model.b.weight is model.a.weight and not torch.equal(model.a.weight[:, 1:], dense.a.weight[:, 1:])
    assert (model.a.weight[:, 0] == 0).all() and torch.equal(model.table.weight, table)


def test_layers_that_read_the_same_are_solved_in_one_pass_and_those_of_a_changed_input_are_not():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.q, self.k, self.v, self.head = (nn.Linear(4, 4) for _ in range(5))

        def forward(self, x):
            x = self.stem(x)
            q, k = self.q(x), self.k(x)
            x.relu_()  # in place: another input at the same address
            return self.head(q + k + self.v(x))
    model = Branches()
    with torch.no_grad(): groups = repairs._in_order(model, read_data(torch.randn(8, 4), model)[0])
    assert [[layer.name.split('.')[0] for layer in group] for group in groups] == [['stem'], ['q', 'k'], ['v'], ['head']]
    dense = deepcopy(model)
    Sparsifier(model).sparsify_model(40)
    assert refit(model, dense, torch.randn(256, 4).split(32)).kept


@pytest.mark.parametrize('held, passes', [(0, 6), (2 * 16 * 8 * 4, 3), (2 ** 28, 1)])
def test_one_pass_of_the_dense_network_serves_as_many_layers_as_fit(held, passes, monkeypatch):
    "Six layers read 16 rows of 8 numbers in each of four batches; what they have read is overwritten."
    class Overwriting(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            x.zero_()
            return out.relu()
    dense, x = nn.Sequential(nn.Linear(8, 8), *(Overwriting(8, 8) for _ in range(5))), torch.randn(64, 8)
    monkeypatch.setattr(repairs, 'HELD', 4 * held)
    model, calls = deepcopy(dense), []
    Sparsifier(model).sparsify_model(40)
    once, batches = deepcopy(model), read_data(x.split(16), model)
    with torch.no_grad():
        dense[0].register_forward_pre_hook(lambda *_: calls.append(0))
        repairs._refit(model, dense, batches)
        assert len(calls) == 4 * passes
        monkeypatch.setattr(repairs, 'HELD', 0)
        repairs._refit(once, dense, batches)
    assert all(torch.equal(value, once.state_dict()[name]) for name, value in model.state_dict().items())


def transformer(): return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()


@pytest.mark.parametrize('prune', ['in_proj_weight', 'out_proj.weight', 'all'])
def test_attention_is_solved(prune):
    dense, padded = transformer(), torch.rand(64, 6) < .3
    padded[:, 0] = False
    spread = torch.randn(5, 16)  # so that one entry can make up for another
    data = [{'src': x, 'src_key_padding_mask': p} for x, p in zip((torch.randn(64, 6, 5) @ spread).split(8), padded.split(8))]
    model = deepcopy(dense)
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1 and (prune in name or prune == 'all')}
    with torch.no_grad():
        for p in weights.values(): p[torch.rand_like(p) < .3] = 0
    zero = {name: p == 0 for name, p in model.named_parameters()}
    found = refit(model, dense, data)
    assert found.kept and all(torch.equal(p == 0, zero[name]) for name, p in model.named_parameters())
    others = [{'src': torch.randn(64, 6, 5) @ spread}]
    cut = deepcopy(dense)
    for name, p in cut.named_parameters(): p.data[zero[name]] = 0
    assert divergence(model, dense, read_data(others, model)) < .9 * divergence(cut, dense, read_data(others, model))


class Cross(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, query, memory): return self.attention(query, memory, memory)[0]


def test_attention_of_two_inputs_is_solved_in_parts():
    dense, data = Cross(), [(torch.randn(16, 4, 8), torch.randn(16, 5, 8), 0) for _ in range(8)]
    model = deepcopy(dense)
    with torch.no_grad(): model.attention.in_proj_weight[torch.rand(24, 8) < .4] = 0
    zero, old = model.attention.in_proj_weight == 0, model.attention.in_proj_weight.clone()
    for _, memory, _ in data: memory[..., 1] = memory[..., 0]  # a weight of keys and values can make up for its neighbour
    for query, _, _ in data: query[..., 3] = query[..., 2]  # and one of the queries for another
    found, weight = refit(model, dense, data), model.attention.in_proj_weight
    assert found.kept and torch.equal(weight == 0, zero)
    assert not any(torch.equal(a, b) for a, b in zip(weight.chunk(3), old.chunk(3)))
    for part, (a, b) in zip(zip(weight.chunk(3), old.chunk(3), dense.attention.in_proj_weight.chunk(3)), [(2, 3), (0, 1), (0, 1)]):
        new, cut, whole = part
        one = (cut[:, a] != 0) & (cut[:, b] == 0)
        torch.testing.assert_close(new[one, a], whole[one, a] + whole[one, b], atol=.1, rtol=.1)


@pytest.mark.parametrize('repair', [refit, recalibrate])
def test_an_interrupt_leaves_all_as_it_was(repair, monkeypatch):
    dense, x = trained('convolutions')
    model = deepcopy(dense).train()
    Sparsifier(model).sparsify_model(50)
    before, calls = state(model), []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3: raise KeyboardInterrupt
        return whole(*args)
    name = '_solve' if repair is refit else 'divergence'
    whole = getattr(repairs, name)
    monkeypatch.setattr(repairs, name, interrupted)
    with pytest.raises(KeyboardInterrupt): repair(model, dense, x.split(8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(m.training for m in model.modules()) and torch.is_grad_enabled()


@pytest.mark.parametrize('pattern', ['2:4', 'kernel', 'filter'])
def test_patterns_stay(pattern):
    dense, x = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4)), torch.randn(128, 4, 1, 1) + .3 * torch.randn(128, 4, 8, 8)
    model = deepcopy(dense)
    if pattern == '2:4': Sparsifier(model, context='2:4').sparsify_model(50)
    else: Sparsifier(model, pattern, 'local', example=x[:1]).sparsify_model(50)
    zero = [p == 0 for p in model.parameters()]
    found = refit(model, dense, x.split(16))
    assert found.kept and all(torch.equal(p == 0, z) for p, z in zip(model.parameters(), zero))


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


def test_a_network_without_layers_that_can_be_solved():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.LSTM(4, 4)

        def forward(self, x): return self.cell(x)[0]
    dense = Recurrent()
    model = deepcopy(dense)
    Sparsifier(model).sparsify_model(50)
    assert not refit(model, dense, torch.randn(8, 4, 4)).kept and not recalibrate(model, dense, torch.randn(8, 4, 4)).kept


def test_a_wrapped_network_is_repaired():
    dense, x = trained('convolutions')
    model = deepcopy(dense)
    Sparsifier(model).sparsify_model(50)
    wrapped = nn.DataParallel(deepcopy(model))
    assert refit(wrapped, dense, x.split(8)) == refit(model, dense, x.split(8))
    assert all(torch.equal(a, b) for a, b in zip(wrapped.parameters(), model.parameters(), strict=True))


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
    sparsifier.repairs.functions = sparsifier.repairs.functions[:1]
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


def test_dataloaders_of_torch_in_those_of_fastai():
    from fastai.data.core import DataLoaders
    loader = DataLoader(TensorDataset(torch.randn(8, 4), torch.zeros(8)), batch_size=4)
    assert [batch.args[0].shape for batch in read_data(DataLoaders(loader, loader), nn.Linear(4, 2))] == [(4, 4)] * 2


@pytest.mark.parametrize('repair', ['refit', 'batchnorm'])
def test_a_loader_that_shuffles_takes_no_random_numbers(repair):
    data = torch.utils.data.DataLoader(torch.randn(32, 1, 8, 8), batch_size=8, shuffle=True)
    sparsifier = Sparsifier(convnet(), data=data, repair=repair)
    before = torch.get_rng_state()
    sparsifier.sparsify_model(50)
    assert torch.equal(torch.get_rng_state(), before)


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
