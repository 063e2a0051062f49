"What each of several processes does in test_shards.py: it prunes a model of which it has a part, and the whole one."
import os
import warnings
from datetime import timedelta
from functools import partial

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fasterai.granularity import block
from fasterai.peers import Shards
from fasterai.shards import here, place_of
from fasterai.sparsifier import Sparsifier

CASES = {2: {}, 4: {}}  # by the number of processes {name: function}


def conv_net():
    "Layers with more, as many, and fewer rows than there are processes, and one of 1 weight."
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(),
                         nn.Linear(5 * 16, 30), nn.ReLU(), nn.Linear(30, 3), nn.Linear(3, 1), nn.Linear(1, 1), nn.Linear(1, 12))


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 62), nn.ReLU(), nn.Linear(62, 24), nn.ReLU(), nn.Linear(24, 5))


def batch(rank, n=16):
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randint(0, 12, (n,), generator=generator)


# ---- Ways to split a model

def mesh_of(*sizes): return init_device_mesh('cpu', sizes, mesh_dim_names=('outer', 'inner')[:len(sizes)])


def fsdp(model, mesh=None, **more):
    mesh = mesh or mesh_of(distributed.get_world_size())
    for i in range(0, len(model), 3): fully_shard(model[i], mesh=mesh, **more)
    return fully_shard(model, mesh=mesh, **more)


def columns(model): return fsdp(model, shard_placement_fn=lambda p: Shard(min(1, p.ndim - 1)))
def hsdp(model): return fsdp(model, mesh_of(2, 2))
PLAN = {'0': ColwiseParallel(), '2': RowwiseParallel()}
def tensor_parallel(model): return parallelize_module(model, mesh_of(distributed.get_world_size()), PLAN)


def both(model):
    mesh = mesh_of(2, 2)
    return fsdp(parallelize_module(model, mesh['inner'], PLAN), mesh['outer'])


# ---- All come to what one process would

def give_gradients(plain, split):
    "The same gradients, each process its part."
    for p, q in zip(plain.parameters(), split.parameters()):
        p.grad = torch.randn_like(p)
        place = place_of(q)
        q.grad = place.split(place.part(p.grad))


def same(whole, part):
    "Tell whether a tensor, or the part of it that is here, has the values of a whole one."
    return torch.equal(place_of(part).part(whole), here(part))


def compared(make, wrap, spoil=None, events=((40, {}), (85, {})), dtype=torch.float32, **rules):
    "Prune a model and one that is split, and say what differs."
    plain, split = make().to(dtype), make().to(dtype)
    if spoil: spoil(plain), spoil(split)
    split = wrap(split)
    sparsifiers = Sparsifier(plain, **rules), Sparsifier(split, **rules)
    assert isinstance(sparsifiers[1].peers, Shards)
    for sparsity, more in events:
        torch.manual_seed(int(sparsity))
        give_gradients(plain, split)
        torch.manual_seed(7)
        first = sparsifiers[0].sparsify_model(sparsity, **more)
        torch.manual_seed(7)
        second = sparsifiers[1].sparsify_model(sparsity, **more)
        for kind in ('masks', 'born', 'died'):
            masks = getattr(first, kind)
            for name, mask in getattr(second, kind).items(): assert same(masks[name], mask), (sparsity, kind, name)
        for (name, p), q in zip(plain.named_parameters(), split.parameters()): assert same(p, q), (sparsity, name)
        for p, q in zip(plain.buffers(), split.buffers()): assert torch.equal(p, q)
        assert {name: mask.left for name, mask in first.after.items()} == {name: mask.left for name, mask in second.after.items()}
        assert sparsifiers[0].sparsity == sparsifiers[1].sparsity
    a, b = (sparsifier.report() for sparsifier in sparsifiers)
    assert a.rows == b.rows and (a.parameters, a.parameter_zeros) == (b.parameters, b.parameter_zeros)
    return 'equal'


def rounded(model):
    with torch.no_grad():
        for p in model.parameters(): p.copy_((p * 8).round() / 8)


def scattered(model):
    "Zeros that come in: single ones, and whole filters."
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p[torch.rand(p.shape, generator=generator) < .3] = 0
            if p.ndim > 1 and len(p) > 2: p[1] = 0


def by_position(weight): return weight.float().cumsum(-1).abs()
def own_context(layers, fraction): return [torch.from_numpy(la.all_scores() > la.all_scores().mean()) for la in layers]


RULES = {
    'global': {},
    'gradient, local': {'criteria': 'gradient', 'context': 'local'},
    'erk': {'context': 'erk'},
    'uniform_plus, floor': {'context': 'uniform_plus', 'min_keep': .05},
    'ties': {'spoil': rounded},
    'ties, local': {'spoil': rounded, 'context': 'local', 'min_keep': 2},
    'zeros that come in': {'spoil': scattered, 'context': 'local', 'criteria': 'gradient'},
    'zeros that come in, erk': {'spoil': scattered, 'context': 'erk'},
    'zeros that are kept': {'spoil': scattered, 'keep_zeros': True},
    'half precision': {'dtype': torch.bfloat16},
    'everything': {'events': [(99.9, {}), (100, {})]},
    'a criterion of whole layers': {'criteria': by_position},
    'taylor, filter': {'criteria': 'taylor', 'granularity': 'filter', 'layers': nn.Linear, 'exclude': ['10', '11'], 'events': [(40, {})]},
    'lamp': {'context': 'lamp'},
    'normalized': {'context': 'normalized'},
    '2:4': {'context': '2:4', 'layers': nn.Linear, 'exclude': ['10', '11', '12'], 'events': [(50, {'share': .6}), (50, {})]},
    'a context of one\'s own': {'context': own_context},
    'filter': {'granularity': 'filter', 'context': 'local', 'events': [(20, {}), (40, {})]},
    'filter, zeros that come in': {'granularity': 'filter', 'spoil': scattered, 'events': [(30, {}), (40, {})]},
    'filter, rounded': {'granularity': 'filter', 'round_to': 2, 'context': 'local', 'events': [(40, {})]},
    'block': {'granularity': block(4, 4), 'layers': nn.Linear},
    'kernel': {'granularity': 'kernel', 'layers': nn.Conv2d, 'criteria': 'gradient'},
    'regrowth': {'events': [(80, {}), (60, {'regrow': True}), (60, {'swap': .3})]},
}
for _name, _rules in RULES.items():
    CASES[2][f'fully_shard, {_name}'] = partial(compared, conv_net, fsdp, **_rules)
SMALL = {name: RULES[name] for name in ('global', 'gradient, local', 'ties', 'ties, local', 'zeros that come in', 'zeros that are kept', 'lamp')}
SMALL |= {'2:4': {'context': '2:4', 'events': [(50, {})]}, 'filter': {'granularity': 'filter', 'context': 'local', 'events': [(40, {})]}}
for _name, _rules in SMALL.items():
    CASES[2][f'columns, {_name}'] = partial(compared, mlp, columns, **_rules)
    CASES[2][f'tensor parallel, {_name}'] = partial(compared, mlp, tensor_parallel, **_rules)
    CASES[4][f'fully_shard, {_name}'] = partial(compared, conv_net, fsdp, **_rules)
    CASES[4][f'hsdp, {_name}'] = partial(compared, mlp, hsdp, **_rules)
    CASES[4][f'tensor parallel and fully_shard, {_name}'] = partial(compared, mlp, both, **_rules)


def tried(case):
    try: return case()
    except Exception as error:
        import traceback
        return f'{type(error).__name__}: {error}', traceback.format_exc()


def run(rank, n, folder):
    "Run the cases of n processes in one of them, and save what came of each."
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    os.environ |= {'RANK': str(rank), 'WORLD_SIZE': str(n), 'GLOO_SOCKET_IFNAME': 'lo'}
    distributed.init_process_group('gloo', f'file://{folder}/store{n}', rank=rank, world_size=n, timeout=timedelta(seconds=60))
    found = {name: tried(case) for name, case in CASES[n].items()}
    torch.save(found, f'{folder}/{n}.{rank}.pt')
    distributed.destroy_process_group()
