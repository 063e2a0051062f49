"What each of several processes does in test_shards.py: it prunes a model of which it has a part, and the whole one."
import os
import signal
import sys
import traceback
import warnings
from datetime import timedelta
from functools import partial

import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from fasterai.criteria import elementwise
from fasterai.granularity import block
from fasterai.peers import Shards, digest
from fasterai.shards import here, is_split, place_of
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


def tied():
    "Two layers that share a weight."
    model = nn.Sequential(*mlp()[:2], nn.Linear(62, 12), nn.Linear(12, 62))
    model[3].weight = model[0].weight
    return model


def frozen():
    model = mlp()
    model[2].requires_grad_(False)
    return model


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


def root_alone(model): return fully_shard(model, mesh=mesh_of(distributed.get_world_size()))


# ---- All come to what one process would

def give_gradients(plain, split, keep=slice(None)):
    "The same gradients, each process its part; zero but for some entries."
    for p, q in zip(plain.parameters(), split.parameters()):
        p.grad = torch.zeros_like(p)
        p.grad.view(-1)[keep] = torch.randn_like(p).view(-1)[keep]
        place = place_of(q)
        q.grad = place.split(place.part(p.grad))


def same(whole, part):
    "Tell whether a tensor, or the part of it that is here, has the values of a whole one."
    return torch.equal(place_of(part).part(whole), here(part))


def several_steps(pairs):
    "Steps of training before an event: one in which no gradient is there, and one in which one entry of each is."
    for keep in (slice(None), slice(0), slice(1)):
        give_gradients(*(model for model, _ in pairs), keep)
        for _, sparsifier in pairs: sparsifier.evidence.step()


def compared(make, wrap, spoil=None, events=((40, {}), (85, {})), dtype=torch.float32, trained=False, **rules):
    "Prune a model and one that is split, and say what differs."
    plain, split = make().to(dtype), make().to(dtype)
    if spoil: spoil(plain), spoil(split)
    split = wrap(split)
    sparsifiers = Sparsifier(plain, **rules), Sparsifier(split, **rules)
    assert isinstance(sparsifiers[1].peers, Shards)
    for sparsity, more in events:
        torch.manual_seed(int(sparsity))
        if trained: several_steps(list(zip((plain, split), sparsifiers)))
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
    'gradients of several steps': {'criteria': 'gradient', 'trained': True},
    'movement of several steps': {'criteria': 'movement', 'trained': True, 'context': 'erk'},
    'saliency of several steps, filter': {'criteria': 'taylor', 'trained': True, 'granularity': 'filter', 'context': 'local', 'events': [(40, {})]},
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


CASES[4] |= {f'shared weights, {name}': partial(compared, tied, root_alone, **rules) for name, rules in (('global', {}), ('filter', SMALL['filter']))}
CASES[4]['frozen layers'] = partial(compared, frozen, fsdp, context='local')


# ---- Training

def trained(make, wrap, data, clip=True, **rules):
    "Train and prune, with clipping, a validation between, and what the forward has gathered left in place."
    model = wrap(make())
    if hasattr(model, 'set_reshard_after_backward'): model.set_reshard_after_backward(False)
    sparsifier, optimizer = Sparsifier(model, **rules), torch.optim.AdamW(model.parameters(), lr=.01)
    sparsifier.attach(optimizer)
    for step in range(1, 6):
        F.cross_entropy(model(data[0]), data[1]).backward()
        if clip: nn.utils.clip_grad_norm_(model.parameters(), 1.)
        sparsifier.sparsify_model(min(20 * step, 60))
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad(): model(data[0])
        model.train()
    dead = {name: ~here(mask) for name, mask in sparsifier.masks.items()}
    state = {name: optimizer.state[layer.weight]['exp_avg'] for name, layer in sparsifier.layers.items()}
    assert all(not here(layer.weight)[dead[name]].any() for name, layer in sparsifier.layers.items())
    assert all(not here(state[name])[dead[name]].any() for name in dead) and any(here(m).any() for m in state.values())
    whole = {name: layer.weight.full_tensor() if is_split(layer.weight) else layer.weight for name, layer in sparsifier.layers.items()}
    zeros = {name: int((weight == 0).sum()) for name, weight in whole.items()}
    assert {row.layer: row.zeros for row in sparsifier.report().rows} == zeros
    assert sparsifier.sparsity == 100 * sum(zeros.values()) / sum(weight.numel() for weight in whole.values())
    for name, layer in sparsifier.layers.items():
        if not layer.grouping.whole_filters: continue
        bias, filters = layer.module.bias.full_tensor(), whole[name].flatten(1).any(1)
        assert not bias[~filters].any() and bias[filters].all() and not filters.all()
        norm = model[int(name) + 1]
        assert not norm.running_mean[~filters].any() and not norm.bias.full_tensor()[~filters].any() and norm.running_mean[filters].all()
    return {'sparsity': round(sparsifier.sparsity, 1)}


TRAINED = {2: {}, 4: {}}
def images(): return batch(distributed.get_rank())


def rows(rank):
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(16, 12, generator=generator), torch.randint(0, 5, (16,), generator=generator)


TRAINED[2]['fully_shard'] = lambda: trained(conv_net, fsdp, images())
TRAINED[2]['fully_shard, gradient, local'] = lambda: trained(conv_net, fsdp, images(), criteria='gradient', context='local')
TRAINED[2]['fully_shard, filter and BatchNorm'] = lambda: trained(conv_net, fsdp, images(), granularity='filter', context='local', layers=nn.Conv2d)
TRAINED[2]['tensor parallel'] = lambda: trained(mlp, tensor_parallel, rows(0), clip=False, criteria='taylor')  # torch does not clip parts and whole weights together
TRAINED[4]['hsdp'] = lambda: trained(mlp, hsdp, rows(distributed.get_rank()))
TRAINED[4]['tensor parallel and fully_shard'] = lambda: trained(mlp, both, rows(distributed.get_rank() // 2))


# ---- All ranks raise, and change nothing

class Failing:
    "A criterion that fails on the last rank, at a call."
    def __init__(self, at=1, leave=None): self.left, self.leave = at if distributed.get_rank() == distributed.get_world_size() - 1 else -1, leave

    def __call__(self, weight):
        self.left -= 1
        if self.left == 0 and self.leave: self.leave()
        if self.left == 0: raise ValueError('no luck')
        return abs(weight)


def failing_context(layers, fraction):
    if distributed.get_rank(): raise TypeError('no luck')
    return [torch.from_numpy(la.all_scores() > 0) for la in layers]


def unchanged(act, wrap=fsdp, **rules):
    "Have something fail on a rank, and say what each has seen; an event of a new Sparsifier succeeds then."
    model = wrap(mlp())
    sparsifier = Sparsifier(model, **rules)
    bits = [here(p).clone() for p in model.parameters()]
    try: act(sparsifier)
    except (ValueError, RuntimeError, TypeError) as error: raised = type(error).__name__, str(error)
    else: raised = None
    same = all(torch.equal(here(p), q) for p, q in zip(model.parameters(), bits))
    masks = all(here(mask).all() for mask in sparsifier.masks.values())
    later = Sparsifier(model)
    later.sparsify_model(50)
    return {'raised': raised, 'unchanged': same and masks, 'later': later.sparsity}


def prune(sparsifier): sparsifier.sparsify_model(50)
def build_two(sparsifier): Sparsifier(sparsifier.model, layers='0' if distributed.get_rank() else 'nothing')
def other_argument(sparsifier): sparsifier.sparsify_model(50 if distributed.get_rank() else 500)
def other_masks(sparsifier): sparsifier.masks.update({'0': torch.ones(2) if distributed.get_rank() else torch.ones(62, 12, dtype=torch.bool)})


def diverged(sparsifier):
    "One copy of a part differs from the other."
    weight = here(sparsifier.layers['0'].weight)
    before = weight.clone()
    if distributed.get_rank() == 3: weight.neg_().add_(.1)
    moved = weight.clone()
    try: prune(sparsifier)
    finally:
        assert torch.equal(weight, moved)
        weight.copy_(before)


FAILING = {2: {}, 4: {}}
for _n in FAILING:
    FAILING[_n] |= {
        'an elementwise criterion': lambda: unchanged(prune, criteria=elementwise(Failing(2))),
        'a criterion of layers': lambda: unchanged(prune, criteria=Failing(3)),
        'a criterion of filters': lambda: unchanged(prune, criteria=Failing(2), granularity='filter', layers=['0', '2']),
        'a context': lambda: unchanged(prune, context=failing_context),
        'building': lambda: unchanged(build_two),
        'an argument': lambda: unchanged(other_argument),
        'masks of one\'s own': lambda: unchanged(other_masks)}
FAILING[4]['copies that differ'] = lambda: unchanged(diverged, hsdp)


# ---- How often ranks speak, and for how much

def exchanges(n_layers, **rules):
    "The number of exchanges in an event that would empty all layers but the last."
    layers = [nn.Linear(20, 20) for _ in range(n_layers)]
    with torch.no_grad(): layers[-1].weight.mul_(100)
    model = fsdp(nn.Sequential(*layers))
    sparsifier, gathered, found = Sparsifier(model, **rules), Shards.gathered, []
    def counted(self, *args): return found.append(args[0]) or gathered(self, *args)
    Shards.gathered = counted
    try: sparsifier.sparsify_model(100 * (1 - 1 / n_layers) + .5)
    finally: Shards.gathered = gathered
    return len(found)


# ---- State

STATE = {'global': {}, 'gradient': {'criteria': 'gradient'}, 'movement': {'criteria': 'movement'}, 'filter': {'granularity': 'filter', 'layers': ['0', '2']}}


def state_of(model, sparsifier): return {'model': model.state_dict(), 'masks': sparsifier.state_dict(packed=False)}
def whole(tensor): return tensor.full_tensor() if is_split(tensor) else tensor
def whole_masks(sparsifier): return {layer: whole(mask) for layer, mask in sparsifier.masks.items()}


def gathered(sparsifier):
    "What the steps have told of each layer."
    told = {(layer, kind): of for layer, saved in sparsifier.state_dict(packed=False).items() for kind, of in saved.get('evidence', {}).items()}
    return {key: (int(of['steps']), whole(of['total'])) for key, of in told.items()}


def saved(folder):
    "Prune and save; return the whole masks, and what was gathered since."
    found = {}
    for name, rules in STATE.items():
        model = fsdp(mlp())
        sparsifier = Sparsifier(model, **rules)
        for _ in range(2):
            F.cross_entropy(model(rows(0)[0]), rows(0)[1]).backward()
            sparsifier.evidence.step()
        sparsifier.sparsify_model(70)
        if name != 'gradient': sparsifier.evidence.step()
        checkpoint.save(state_of(model, sparsifier), checkpoint_id=f'{folder}/{name}')
        found[name] = whole_masks(sparsifier), gathered(sparsifier)
    return found


def loaded(folder, wrap):
    "Load what other processes have saved; return the masks of the state, those that the zeros make, and what was gathered."
    found = {}
    for name, rules in STATE.items():
        model = wrap(mlp())
        sparsifier = Sparsifier(model, **rules)
        for parameter in model.parameters(): here(parameter).fill_(1.)
        state = state_of(model, sparsifier)
        checkpoint.load(state, checkpoint_id=f'{folder}/{name}')
        model.load_state_dict(state['model'])
        sparsifier.load_state_dict(state['masks'])
        zeros = Sparsifier(model, keep_zeros=True, **rules)
        found[name] = whole_masks(sparsifier), whole_masks(zeros), gathered(sparsifier)
    return found


def tried(case):
    try: return case()
    except Exception as error:
        return f'{type(error).__name__}: {error}', traceback.format_exc()


# ---- A job that is killed, and goes on

STEPS, SAVED_AT, DIES_AT = 8, 4, 6


def bits_of(model, sparsifier, optimizer):
    "All that a step changes, of what is here."
    masks = {name: here(mask) for name, mask in sparsifier.masks.items()}
    momenta = [here(of['exp_avg']) for of in optimizer.state.values()]
    return digest(*model.parameters(), *masks.values(), *momenta)


def job(folder, dies=False, resumes=False):
    """Train and prune by a schedule and by what the steps tell.

    The last rank may die within an event, after a state was saved: this returns what the others see then. Another job goes on from it."""
    rank, n, step = distributed.get_rank(), distributed.get_world_size(), 0

    @elementwise
    def criterion(weight, movement):
        if dies and rank == n - 1 and step == DIES_AT: os.kill(os.getpid(), signal.SIGKILL)
        return abs(weight) + movement

    model = fsdp(mlp())
    optimizer = torch.optim.AdamW(model.parameters(), lr=.01)
    sparsifier, momenta = Sparsifier(model, criteria=criterion), get_optimizer_state_dict(model, optimizer)
    attached = sparsifier.attach(optimizer, 80, steps=STEPS)  # later, for torch makes a step to find out what the state of a new optimizer is like

    def state(): return {'model': model.state_dict(), 'optimizer': momenta, 'masks': sparsifier.state_dict()}
    if resumes:
        found = state()
        checkpoint.load(found, checkpoint_id=f'{folder}/job')
        model.load_state_dict(found['model'])
        set_optimizer_state_dict(model, optimizer, found['optimizer'])
        sparsifier.load_state_dict(found['masks'])
    begun = attached.step
    for step in range(begun + 1, STEPS + 1):
        generator = torch.Generator().manual_seed(n * step + rank)
        x, y = torch.randn(16, 12, generator=generator), torch.randint(0, 5, (16,), generator=generator)
        F.cross_entropy(model(x), y).backward()
        before = bits_of(model, sparsifier, optimizer) if step == DIES_AT else None
        try: optimizer.step()
        except RuntimeError as error: return {'said': str(error), 'unchanged': bits_of(model, sparsifier, optimizer) == before}
        optimizer.zero_grad()
        if step != SAVED_AT or not dies: continue
        momenta = get_optimizer_state_dict(model, optimizer)
        checkpoint.save(state(), checkpoint_id=f'{folder}/job')
    return {'begun': begun, 'bits': bits_of(model, sparsifier, optimizer), 'sparsity': sparsifier.sparsity}


def begin(rank, n, folder, name):
    torch.set_num_threads(1)
    sys.stderr = open(f'{folder}/{name}.{rank}.err', 'w')
    warnings.simplefilter('ignore')
    os.environ |= {'RANK': str(rank), 'WORLD_SIZE': str(n), 'GLOO_SOCKET_IFNAME': 'lo'}
    distributed.init_process_group('gloo', f'file://{folder}/store of {name}', rank=rank, world_size=n, timeout=timedelta(seconds=60))


def run(rank, n, folder):
    "Run the cases of n processes in one of them, and save what came of each."
    begin(rank, n, folder, n)
    found = {name: tried(case) for name, case in CASES[n].items()}
    found['trained'] = {name: tried(case) for name, case in TRAINED[n].items()}
    found['failed'] = {name: tried(case) for name, case in FAILING[n].items()}
    if n == 4: found['saved'] = tried(partial(saved, folder))
    if n == 2:
        found['loaded'] = tried(partial(loaded, folder, fsdp))
        found['exchanges'] = tried(lambda: [exchanges(n, context=context) for context in ('local', 'global') for n in (3, 12)])
        found['undisturbed'] = tried(partial(job, folder))
    torch.save(found, f'{folder}/{n}.{rank}.pt')


def load(rank, n, folder):
    "Load what four processes have saved."
    begin(rank, n, folder, n)
    torch.save({'loaded': tried(partial(loaded, folder, fsdp))}, f'{folder}/{n}.{rank}.pt')


def run_job(rank, n, folder, name, how):
    "Run a job, which may be killed."
    begin(rank, n, folder, name)
    torch.save(tried(partial(job, folder, **how)), f'{folder}/{name}.{rank}.pt')
