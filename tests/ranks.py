"What each of two processes does in test_ranks.py. `run` is called in each, and returns {case: what came of it}."
import os
import sys
from copy import deepcopy
from datetime import timedelta
from functools import partial
from importlib.util import find_spec

import torch
from torch import distributed, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

from fasterai.peers import digest
from fasterai.schedule import rigl
from fasterai.snapshot import Snapshot
from fasterai.sparsifier import Sparsifier

EQUAL, RAISING = {}, {}  # {name of a case: function}


def net():
    "Two blocks and an output layer, the same on each rank."
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12),
                         nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 12))


def batch(rank, n=16):
    "Data of a rank."
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randint(0, 12, (n,), generator=generator)


class Branches(nn.Module):
    "One layer, and another one that not all inputs come to."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.always, self.seldom = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        y = self.always(x)
        return self.seldom(y) if x.sum() > 0 else y


def replicas(rank, **kwargs):
    "The model in DDP; the random numbers differ by rank from then on."
    model = DDP(net(), **kwargs)
    torch.manual_seed(rank)
    return model


def backward(model, rank): F.cross_entropy(model(batch(rank)[0]), batch(rank)[1]).backward()


def bits(model): return {name: digest(p) for name, p in model.module.named_parameters()}
def masks_of(sparsifier): return {name: digest(mask) for name, mask in sparsifier.masks.items()}


def adam(parameters): return torch.optim.AdamW(parameters, lr=.01)


def trained(rank, make=adam, event=None, ddp=(), **rules):
    "Prune in four steps of training, each rank on its own data."
    model = replicas(rank, **dict(ddp))
    sparsifier = Sparsifier(model, example=batch(0)[0], **rules)
    optimizer = make(model.parameters())
    sparsifier.attach(optimizer)
    for step in range(1, 5):
        backward(model, rank)
        if event is None: sparsifier.sparsify_model(20 * step)
        else: event(sparsifier, step)
        optimizer.step()
        optimizer.zero_grad()
    return model, sparsifier, optimizer


def outcome(model, sparsifier):
    held = all(not layer.weight.detach()[~sparsifier.masks[name]].any() for name, layer in sparsifier.layers.items())
    return {'weights': bits(model), 'masks': masks_of(sparsifier), 'sparsity': sparsifier.sparsity, 'held': held}


# ---- All ranks come to the same

def equal(name, **kwargs): EQUAL[name] = lambda rank: outcome(*trained(rank, **kwargs)[:2])


equal('magnitude, global')
equal('gradient, local', criteria='gradient', context='local')
equal('2:4', context='2:4', layers=nn.Linear, event=lambda s, step: s.sparsify_model(50))
equal('filter and BatchNorm', granularity='filter', context='local')
equal('erk, gradients zeroed in their buckets', context='erk', criteria='taylor', ddp={'gradient_as_bucket_view': True}.items())
equal('weights come back at random', event=lambda s, step: s.sparsify_model(60, swap=.3), regrow='random')
equal('weights come back by gradient', event=lambda s, step: s.sparsify_model((80, 60, 40, 80)[step - 1], regrow=True))
equal('random', criteria='random')
equal('torch.rand', criteria=lambda weight: torch.rand(weight.shape))
equal('the same data', criteria='wanda', data=[batch(0)[0]])
equal('one layer', event=lambda s, step: s.sparsify_layer('3', 20 * step))


def case(of):
    def add(function):
        of[function.__name__] = function
        return function
    return add


def of_all_data(name, **rules):
    "Each rank has data of its own, not as many: the masks are those of one process with all of them."
    def run(rank):
        sparsifier = Sparsifier(replicas(rank), data=[batch(rank)] if rank else [batch(0, 4), batch(2)], **rules)
        whole = Sparsifier(net(), data=[batch(0, 4), batch(2), batch(1)], **rules)
        for one in (sparsifier, whole): one.sparsify_model(60)
        assert masks_of(sparsifier) == masks_of(whole)
        return outcome(sparsifier.model, sparsifier)
    EQUAL[name] = run


def by_gram(weight, gram): return (weight.flatten(1).abs() * gram.diagonal(dim1=-2, dim2=-1)).view_as(weight)


of_all_data('inputs of each rank', criteria='wanda')
of_all_data('Gram matrices of each rank', criteria=by_gram)
of_all_data('gradients of each rank', criteria='gradient', loss_func=F.cross_entropy)
of_all_data('samples of each rank', criteria='obd', loss_func=F.cross_entropy)


@case(EQUAL)
def inputs_seen_before(rank):
    "What each has seen stays its own: a second event does not count it twice."
    model, whole = replicas(rank), Sparsifier(net().eval(), criteria='wanda')
    sparsifier = Sparsifier(model.eval(), criteria='wanda')
    for _ in range(2):
        with sparsifier.evidence.watching(): model(batch(rank)[0])
        with whole.evidence.watching():
            for other in (0, 1): whole.model(batch(other)[0])
        for one in (sparsifier, whole): one.sparsify_layer('3', 60)
        assert masks_of(sparsifier) == masks_of(whole)
    return outcome(model, sparsifier)


@case(EQUAL)
def data_that_miss_a_layer(rank):
    "The data of rank 1 do not come to one layer. It is judged by what the other has seen."
    model = Branches()
    whole = Sparsifier(deepcopy(model), criteria='wanda', data=[torch.ones(2, 6), -torch.ones(2, 6)])
    sparsifier = Sparsifier(DDP(model), criteria='wanda', data=[-torch.ones(2, 6) if rank else torch.ones(2, 6)])
    for one in (sparsifier, whole): one.sparsify_model(60)
    assert masks_of(sparsifier) == masks_of(whole)
    return outcome(sparsifier.model, sparsifier)


@case(EQUAL)
def repair(rank):
    model = replicas(rank)
    backward(model, rank)  # the statistics of BatchNorm differ by rank then
    sparsifier = Sparsifier(model, data=[batch(0, 64)[0]], repair=('refit', 'batchnorm'))
    assert sparsifier.sparsify_model(70, rounds=2).repaired
    return outcome(model, sparsifier) | {'statistics': digest(*model.buffers())}


@case(EQUAL)
def no_sync(rank):
    "The event comes after a backward that has summed the gradients."
    model = replicas(rank)
    sparsifier = Sparsifier(model, criteria='gradient')
    with model.no_sync(): backward(model, rank)
    backward(model, rank)
    sparsifier.sparsify_model(50)
    return outcome(model, sparsifier)


@case(EQUAL)
def zero_redundancy(rank):
    make = partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW, lr=.01)
    model, sparsifier, optimizer = trained(rank, make)
    state, layers = optimizer.optim.state, sparsifier.layers.items()
    mine = {name: layer.weight for name, layer in layers if layer.weight in state}
    dead = sum(int(state[weight]['exp_avg'][~sparsifier.masks[name]].count_nonzero()) for name, weight in mine.items())
    assert mine and all(state[weight]['exp_avg'].any() for weight in mine.values())
    return outcome(model, sparsifier) | {'dead momenta': dead}


def driven(rank, make=adam):
    "Prune by a schedule that lets weights come back by their gradients."
    model = replicas(rank)
    sparsifier, optimizer = Sparsifier(model, regrow='gradient'), make(model.parameters())
    sparsifier.attach(optimizer, sparsity=60, schedule=rigl(every=.2), steps=10)
    for _ in range(10):
        backward(model, rank)
        optimizer.step()
        optimizer.zero_grad()
    return outcome(model, sparsifier)


@case(EQUAL)
def driven_by_an_optimizer(rank): return driven(rank)


@case(EQUAL)
def driven_by_zero_redundancy(rank):
    "The hook of the one outside comes first, on all ranks, whatever the one inside has of the parameters."
    return driven(rank, partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW, lr=.01))


@case(EQUAL)
def saved_and_loaded(rank):
    model, sparsifier, _ = trained(rank)
    other = Sparsifier(DDP(net()))
    other.load_state_dict(sparsifier.state_dict())
    plain = Sparsifier(net())  # the names are those of the bare model
    plain.load_state_dict(sparsifier.state_dict())
    assert masks_of(plain) == masks_of(other) == masks_of(sparsifier)
    return outcome(other.model, other)


# ---- All ranks raise, and change nothing

class Private:
    "A criterion that draws from a generator of each rank's own."
    def __init__(self, rank): self.generator = torch.Generator().manual_seed(rank)
    def __call__(self, weight): return torch.rand(weight.shape, generator=self.generator)


class Failing:
    "A criterion that fails on rank 1, at a call."
    def __init__(self, rank, at=1, error=ValueError, leave=None):
        self.left, self.error, self.leave = at if rank else -1, error, leave

    def __call__(self, weight):
        self.left -= 1
        if self.left == 0:
            if self.leave: self.leave()
            raise self.error('no luck')
        return weight.abs()


def refused(rank, act, model=None, **rules):
    "Have an event fail; a later one succeeds."
    model = replicas(rank) if model is None else model
    sparsifier = Sparsifier(model, **rules)
    before, masks = bits(model), masks_of(sparsifier)
    try: act(sparsifier)
    except Exception as error: raised = type(error).__name__, str(error)
    else: raised = None
    return {'raised': raised, 'unchanged': bits(model) == before, 'masks unchanged': masks_of(sparsifier) == masks,
            'later': outcome(model, sparsifier_after(model))}


def sparsifier_after(model):
    sparsifier = Sparsifier(model)
    sparsifier.sparsify_model(50)
    return sparsifier


def prune(sparsifier): sparsifier.sparsify_model(50)


def raising(name, act=prune, **rules):
    RAISING[name] = lambda rank: refused(rank, act, **{key: rule(rank) for key, rule in rules.items()})


def prune_at_nan(sparsifier): sparsifier.sparsify_model(float('nan') if distributed.get_rank() else 50)
def prune_in_rounds(sparsifier): sparsifier.sparsify_model(60, rounds=3)


raising('private random numbers', criteria=Private)
raising('a criterion fails', criteria=Failing)
raising('a criterion fails by TypeError', criteria=partial(Failing, error=TypeError))
raising('a criterion fails in the second round', prune_in_rounds, criteria=partial(Failing, at=5))
raising('repaired by other data', data=lambda rank: [batch(rank, 64)[0]], repair=lambda rank: 'refit')
raising('an argument', prune_at_nan)


@case(RAISING)
def event_inside_no_sync(rank):
    model = replicas(rank)
    with model.no_sync(): backward(model, rank)
    return refused(rank, prune, model, criteria='gradient')


@case(RAISING)
def no_gradient_on_a_rank(rank):
    model = replicas(rank)
    backward(model, rank)
    if rank: model.zero_grad()
    return refused(rank, prune, model, criteria='gradient')


def with_other_masks(sparsifier, act):
    "Act on a Sparsifier that holds other zeros on rank 1, which DDP does not see."
    if distributed.get_rank(): sparsifier.masks._of['7'].keep[0] = False
    try: act(sparsifier)
    finally: sparsifier.masks._of['7'].keep[0] = True


def attach(sparsifier): sparsifier.attach(torch.optim.SGD(sparsifier.model.parameters(), .1))


raising('other zeros at an event', partial(with_other_masks, act=lambda s: s.sparsify_layer('0', 50)))
raising('other zeros at attach', partial(with_other_masks, act=attach))


@case(RAISING)
def one_prunes_and_one_attaches(rank): return refused(rank, attach if rank else prune)


@case(RAISING)
def event_of_one_rank(rank):
    "The other waits until the time of the group is over."
    group = distributed.new_group(timeout=timedelta(seconds=2))
    model = DDP(net(), process_group=group)
    sparsifier, before = Sparsifier(model), bits(model)
    try: raised = None if rank else prune(sparsifier)
    except RuntimeError as error: raised = type(error).__name__, str(error)
    return {'raised': raised, 'unchanged': bits(model) == before and sparsifier.sparsity == 0}


@case(RAISING)
def uneven_inputs(rank):
    "Within Join a rank without a batch makes no event: both wait until the time of the group is over."
    group = distributed.new_group(timeout=timedelta(seconds=2))
    model = DDP(net(), process_group=group)
    sparsifier, before, raised = Sparsifier(model), bits(model), None
    try:
        with Join([model]):
            for _ in range(1 - rank): prune(sparsifier)
    except RuntimeError as error: raised = type(error).__name__, str(error)
    return {'raised': raised, 'unchanged': bits(model) == before and sparsifier.sparsity == 0}


def learner(model, **kwargs):
    "A Learner with one batch."
    from fastai.basics import DataLoaders, Learner
    return Learner(DataLoaders([batch(0)], [batch(0)]), model, loss_func=F.cross_entropy, **kwargs)


def refused_shards(rank):
    "What cannot be done with a model of which each process has a part, or has one since."
    from torch.distributed.fsdp import fully_shard

    from fasterai.callback import SparsifyCallback
    from fasterai.keep import KeepSparse
    from fasterai.sensitivity import sensitivity
    from fasterai.tickets import find_ticket
    mesh, found = distributed.device_mesh.init_device_mesh('cpu', (2,)), {}
    late, split = net(), fully_shard(net(), mesh=mesh)
    sparsifier, of_parts = Sparsifier(late), Sparsifier(split)
    acts = {'later': lambda: fully_shard(late, mesh=mesh) and sparsifier.sparsity,
            'data': lambda: Sparsifier(split, criteria='wanda', data=[batch(0)[0]]), 'example': lambda: Sparsifier(split, 'filter', example=batch(0)[0]),
            'work': lambda: Sparsifier(split, context='work'), 'criterion': lambda: Sparsifier(split, criteria='synflow'),
            'repair': lambda: Sparsifier(split, repair='batchnorm', data=[batch(0)[0]]), 'rounds': lambda: of_parts.sparsify_model(50, rounds=3),
            'another model': lambda: of_parts.move_to(split), 'a copy': lambda: deepcopy(of_parts), 'rewind': lambda: of_parts.rewind(Snapshot(split)),
            'SparsifyCallback': lambda: learner(split, cbs=SparsifyCallback(50)).fit(1), 'KeepSparse': lambda: learner(split, cbs=KeepSparse()).fit(1),
            'find_ticket': lambda: find_ticket(learner(split), lambda learn: learn.fit(1), 50),
            'sensitivity': lambda: sensitivity(split, metric=lambda model: 0),
            'distil': lambda: of_parts.attach(torch.optim.SGD(split.parameters(), .1), 50, steps=9, distil=.5),
            'rewind_to': lambda: of_parts.attach(torch.optim.SGD(split.parameters(), .1), 50, steps=9, rewind_to=.1),
            'recipe': lambda: of_parts.attach(torch.optim.SGD(split.parameters(), .1), 50, steps=9, recipe='accurate')}
    for name, act in acts.items():
        try: found[name] = act()
        except Exception as error: found[name] = type(error).__name__, str(error)
    return found


# ---- fastai and accelerate

def indices(loader, t, rank):
    "`DistributedDL._broadcast` without its `.cuda()`."
    t = torch.LongTensor(t)
    distributed.broadcast(t, rank)
    return t.tolist()


def fitted(rank, folder, cb, before=None, again=None):
    "Fit in `learn.distrib_ctx`, and again."
    from conftest import new_learner
    from fastai.distributed import DistributedDL
    DistributedDL._broadcast = indices
    learn = new_learner(folder, net())
    torch.manual_seed(rank)
    if before: before(learn)
    with learn.distrib_ctx(sync_bn=False, cpu=True):
        try: learn.fit(2, .1, cbs=cb)
        except Exception as error: return {'raised': (type(error).__name__, str(error))}
        if again: learn.fit(1, .1, cbs=again())
    weights = {name: digest(p) for name, p in learn.model.named_parameters()}
    zeros = sum(int((p == 0).sum()) for p in learn.model.parameters() if p.ndim > 1)
    total = sum(p.numel() for p in learn.model.parameters() if p.ndim > 1)
    return {'weights': weights, 'sparsity': 100 * zeros / total}


def with_fastai(rank, folder):
    "Fits by SparsifyCallback under `learn.distrib_ctx()`."
    from fasterai.callback import SparsifyCallback
    from fasterai.keep import KeepSparse
    callbacks = {
        'magnitude': partial(SparsifyCallback, 80),
        'gradient': partial(SparsifyCallback, 80, criteria='gradient', context='local'),
        'random': partial(SparsifyCallback, 80, criteria='random'),
        'filter': partial(SparsifyCallback, 50, 'filter'),
        'data': partial(SparsifyCallback, 80, criteria='wanda', context='local', repair='batchnorm'),
    }
    found = {name: fitted(rank, folder, make(), again=list) for name, make in callbacks.items()}
    found['a rank fails'] = fitted(rank, folder, SparsifyCallback(80, criteria=Failing(rank)))

    def zero_one(learn): learn.model[0].weight.data[rank] = 0
    found['other zeros'] = fitted(rank, folder, KeepSparse(), zero_one)
    return found


def with_accelerate(rank, folder):
    from accelerate import Accelerator
    accelerator, found = Accelerator(cpu=True), {}
    for name, criteria in {'accelerate': 'magnitude', 'accelerate, gradient': 'gradient'}.items():
        model = net()
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), .01))
        sparsifier = Sparsifier(model, criteria=criteria)
        sparsifier.attach(optimizer)
        for step in range(1, 5):
            accelerator.backward(F.cross_entropy(model(batch(rank)[0]), batch(rank)[1]))
            sparsifier.sparsify_model(20 * step)
            optimizer.step()
            optimizer.zero_grad()
        found[name] = outcome(model, sparsifier)
    return found


def dying(rank, done):
    "Rank 1 leaves in the middle of an event, after it has said what it did before."
    def leave():
        done({'left': True})
        os._exit(0)
    return refused_by_death(rank, Failing(rank, leave=leave))


def refused_by_death(rank, criterion):
    model = replicas(rank)
    sparsifier, before = Sparsifier(model, criteria=criterion), bits(model)
    try: raised = prune(sparsifier)
    except RuntimeError as error: raised = type(error).__name__, str(error)
    return {'raised': raised, 'unchanged': bits(model) == before and sparsifier.sparsity == 0}


def tried(case, rank):
    "Run a case. Where all ranks raise they are in step for the next one."
    try: return case(rank)
    except Exception as error: return {'error': f'{type(error).__name__}: {error}'}


def run(rank, folder):
    "Run all cases in one of two processes, and save what came of them."
    sys.stderr = open(f'{folder}/{rank}.err', 'w')
    torch.set_num_threads(1)
    os.environ |= {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'GLOO_SOCKET_IFNAME': 'lo'}
    distributed.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=2, timeout=timedelta(seconds=60))
    found = {name: tried(case, rank) for name, case in (EQUAL | RAISING).items()}
    found['shards'] = refused_shards(rank)
    if find_spec('accelerate'): found |= {'fastai': with_fastai(rank, folder), 'accelerate': with_accelerate(rank, folder)}

    def done(last): torch.save(found | {'death': last}, f'{folder}/{rank}.pt')
    done(dying(rank, done))
