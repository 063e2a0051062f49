"Read and sum numbers wherever they lie, and compare what several processes decide."
import random
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from hashlib import blake2b
from math import prod

import numpy as np
import torch
from torch import distributed, nn

from fasterai.shards import Place, here, is_sharded, is_split, place_of, reshard
from fasterai.snapshot import random_numbers_kept


class Alone:
    """Read and sum the numbers of one process.

    On a CPU numpy compares and picks many times faster than torch; on a GPU tensors stay where they are,
    and what the host must see comes over in one piece. A class with the same methods can do so for several
    processes."""

    splits = False  # each process has a part of the model only

    def on_host(self, tensor) -> bool:
        "Tell whether the CPU can read a tensor at once."
        return tensor.is_cpu

    def array(self,
        values,  # a tensor or an array
    ):  # an array where the values are on the host, else as they came
        "Return values in the form that is fastest where they are."
        if isinstance(values, torch.Tensor) and self.on_host(values): return values.numpy()
        return values

    def fetched(self,
        pieces: list,  # tensors, or arrays
    ) -> list:  # arrays
        "Bring tensors to the host, in one piece from each device, so that it waits once."
        found = [self.array(piece) for piece in pieces]
        for device in {piece.device for piece in found if isinstance(piece, torch.Tensor)}:
            here = [i for i, piece in enumerate(found) if _is_on(device, piece)]
            joined = torch.cat([found[i] for i in here]).cpu()
            for i, piece in zip(here, joined.split([len(found[i]) for i in here])): found[i] = piece.numpy()
        return found

    def sent(self,
        pieces: list,  # arrays, or tensors that may be there already
        devices: list,  # where each shall be
    ) -> list:  # tensors
        "Send arrays to devices, in one piece to each."
        found = [piece if isinstance(piece, torch.Tensor) else torch.from_numpy(piece) for piece in pieces]
        for device in {device for piece, device in zip(found, devices) if piece.device != device}:
            here = [i for i, piece in enumerate(found) if devices[i] == device != piece.device]
            joined = torch.cat([found[i] for i in here]).to(device)
            for i, piece in zip(here, joined.split([len(found[i]) for i in here])): found[i] = piece
        return found

    def count(self,
        mask,  # bool, tensor or array
    ) -> int:
        "Count what is True."
        mask = self.array(mask)
        if isinstance(mask, np.ndarray): return int(np.count_nonzero(mask))
        return int(torch.count_nonzero(mask))

    def in_step(self,
        coroutines: list,  # generators, which yield what this process has and are sent a list of what each process has
    ) -> list:  # what each returns
        "Run coroutines to their ends. One process hears itself alone."
        return [_alone(coroutine) for coroutine in coroutines]

    def totals(self,
        numbers: list,  # of what is here
    ) -> list:  # of all processes
        "Return sums over all processes, where each has a part."
        return numbers

    def everywhere(self,
        answers: list,  # of bools
    ) -> list:
        "Tell for each question whether all processes say so, where each has a part."
        return answers

    def any_of(self,
        masks: list,  # bool arrays
    ) -> list:
        "Return where any process has True, where each has a part."
        return masks

    def place(self,
        parameter: nn.Parameter,
    ) -> Place | None:  # None: all of it is here
        "Return which part of a parameter is here."
        return None

    def whole(self,
        tensor: torch.Tensor,
    ) -> torch.Tensor:  # without a gradient
        "Return all of a tensor, of which each process may have a part."
        return tensor.detach()

    def agreed(self,
        decide: Callable,  # without arguments
        digests: Callable | None = None,  # of what `decide` returns: {name: bytes}; None: nothing is compared
        what: str = 'arguments',  # what is compared, for the error
    ):
        "Return what a function returns, where all processes come to the same. One process always does."
        return decide()

    def alike(self):
        "Return a context manager in which all processes draw the same random numbers."
        return nullcontext()

    def share_buffers(self):
        "Have all processes take over the buffers of the first."

    def summed(self,
        tensors: dict,  # key: tensor
    ) -> dict:  # the keys of all processes: tensor
        "Return sums over the data of all processes. What a process does not have is zero there."
        return tensors


def _is_on(device, piece): return isinstance(piece, torch.Tensor) and piece.device == device


def _alone(coroutine):
    "Run a coroutine to its end, and send it what it yields."
    try:
        told = next(coroutine)
        while True: told = coroutine.send([told])
    except StopIteration as end: return end.value


def abreast(
    coroutines: list,
):  # a coroutine, which returns what each returns
    "Run coroutines in step: what they yield is yielded together, as {number of one: what it yields}."
    results, told, waiting = [None] * len(coroutines), None, dict(enumerate(coroutines))
    while waiting:
        asked = {}
        for i, coroutine in list(waiting.items()):
            try: asked[i] = coroutine.send(None if told is None else [of_rank[i] for of_rank in told])
            except StopIteration as end:
                results[i] = end.value
                del waiting[i]
        if asked: told = yield asked
    return results


ALONE = Alone()


class Several(Alone):
    """Compare what the ranks of a group decide, and gather what each has.

    All go on or all raise, so that no rank comes to weights that the others do not have. Each method waits
    for the same call on all ranks."""

    groups, gpu = (), -1  # process groups, the first of which is gathered last; the number of a GPU, -1: none

    def agreed(self, decide, digests=None, what='arguments'):
        """Return what a function returns, where all ranks come to the same.

        The error of one rank makes all raise: `ValueError` where it is one, else `RuntimeError`, as where
        they differ or one cannot be reached."""
        try:
            found = decide()
            mine = {} if digests is None else digests(found)
        except Exception as error:
            if not getattr(error, 'all_know', False):
                with suppress(RuntimeError, ValueError): self.gathered(what, None, _failure(error))
                _known(error)
            raise
        self._check_same(self.gathered(what, mine), what)
        return found

    @contextmanager
    def alike(self):
        "Have all ranks draw the random numbers of the first, of Python, numpy and torch's CPU generator."
        seed, *_ = self.gathered('random numbers', int(torch.randint(2 ** 32, ())))
        with random_numbers_kept():
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            yield

    def gathered(self,
        what: str,  # for the error
        mine,  # of this rank
        failure: tuple | None = None,  # (whether it is a ValueError, what it says), of this rank
    ) -> list:  # of each rank
        """Return what each rank has, by rank.

        `ValueError` or `RuntimeError` where one has failed, `RuntimeError` where ranks are not in step, or
        one is gone."""
        found = [(what, failure, mine)]
        try:
            for group in reversed(self.groups): found = self._joined(found, group)
        except RuntimeError as error: raise _unreached(error) from error
        kinds = [kind for kind, _, _ in found]
        _raise_failure([failure for _, failure, _ in found])
        if len({*kinds}) == 1: return [of_rank for _, _, of_rank in found]
        said = (f'ranks: they compare {", ".join(kinds)}, expected the same on all: call sparsify_model '
                'and attach on all ranks, in one order; nothing was changed')
        raise _known(RuntimeError(said))

    def _joined(self, mine, group):
        "Join lists of all ranks of a group."
        told = [None] * distributed.get_world_size(group)
        with torch.cuda.device(self.gpu): distributed.all_gather_object(told, mine, group=group)
        return [one for of_rank in told for one in of_rank]

    def _check_same(self, digests, what):
        "Raise `RuntimeError` where the digests of a name are not the same on all ranks that have one."
        names = dict.fromkeys(name for of_rank in digests for name in of_rank)
        differ = {name: self._other(name, digests) for name in names}
        differ = {name: ranks for name, ranks in differ.items() if ranks}
        if not differ: return
        name, ranks = next(iter(differ.items()))
        named = name if isinstance(name, str) else name[0]
        more = f' (and of {len(differ) - 1} more)' if len(differ) > 1 else ''
        where = ', '.join(map(str, ranks))
        first = _first(name, digests)
        raise RuntimeError(f'ranks: got other {what} of {named!r}{more} on rank {where} than on rank '
                           f'{first}, expected the same on all, from the same weights, gradients '
                           '(outside of no_sync), data and random numbers; nothing was changed')

    def _other(self, name, digests):
        "Return the ranks that have another digest of a name than the first."
        first = digests[_first(name, digests)][name]
        return [rank for rank, of_rank in enumerate(digests) if self._differs(of_rank, name, first)]

    def _differs(self, digests, name, first): return digests.get(name) != first


def _first(name, digests):
    "Return the first rank that has a digest of a name."
    return next(rank for rank, of_rank in enumerate(digests) if name in of_rank)


class Replicas(Several):
    "Compare what the ranks of a group decide. Each holds the whole model, as in DistributedDataParallel."

    def __init__(self,
        model: nn.parallel.DistributedDataParallel,
    ):
        self.groups = [model.process_group]
        self.gpu = max((p.get_device() for p in model.parameters() if p.is_cuda), default=-1)
        self.buffers = list(model.module.buffers()) if model.broadcast_buffers else []

    def share_buffers(self):
        "Have all ranks take over the buffers of the first, as each forward of DistributedDataParallel does."
        group, = self.groups
        first = distributed.get_global_rank(group, 0)
        for buffer in self.buffers: distributed.broadcast(buffer, first, group)

    def summed(self, tensors):
        sizes = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
        told = self.gathered('evidence', sizes)
        of_all = {key: size for of_rank in told for key, size in of_rank.items()}
        if any(of_rank.items() - of_all.items() for of_rank in told):
            raise _known(RuntimeError('ranks: they have evidence of other shapes; nothing was changed'))
        device = torch.device('cpu' if self.gpu < 0 else f'cuda:{self.gpu}')
        try: return {key: self._sum(tensors.get(key), *size, device) for key, size in of_all.items()}
        except RuntimeError as error: raise _unreached(error) from error

    def _sum(self, tensor, shape, dtype, device):
        "Return the sum over the ranks, the bits of the first: the order in which each adds is not promised."
        group, = self.groups
        if tensor is None: total = torch.zeros(shape, dtype=dtype, device=device)
        else: total = tensor.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=group)
        distributed.broadcast(total, distributed.get_global_rank(group, 0), group)
        return total


class Shards(Several):
    """Ask the ranks of a group, each of which has a part of the model, as `fully_shard` and tensor parallel
    leave it.

    The group is that of the largest mesh of the parameters. `ValueError` where other meshes are not within
    it."""

    splits = True

    def __init__(self,
        model: nn.Module,
    ):
        reshard(model)
        self.parameters = dict(model.named_parameters())
        meshes = [p.device_mesh for p in self.parameters.values() if is_split(p)]
        mesh = max(meshes, key=lambda mesh: mesh.size())
        self.groups = mesh.get_all_groups()
        self.gpu = max((p.get_device() for p in map(here, self.parameters.values()) if p.is_cuda), default=-1)
        self._places = self.agreed_places(mesh, meshes)

    def agreed_places(self, mesh, meshes):
        "Return the place of each parameter, by its id, where all ranks together have the whole."
        ranks = {*mesh.mesh.flatten().tolist()}
        if any(not {*other.mesh.flatten().tolist()} <= ranks for other in meshes):
            raise ValueError('model: got parameters on meshes of which none has all processes, expected one '
                             'mesh, and parts of it')
        mine = {name: place_of(p) for name, p in self.parameters.items()}
        boxes = {name: (place.sizes, place.offset) for name, place in mine.items()}
        told = self.gathered('places', boxes)
        rank = mesh.mesh.flatten().tolist().index(distributed.get_rank())
        found = {}
        for name, place in mine.items():
            of_ranks = [of_rank.get(name) for of_rank in told]
            _check_whole(name, place.shape, of_ranks)
            first = of_ranks.index((place.sizes, place.offset))
            found[id(self.parameters[name])] = replace(place, speaks=first == rank)
        return found

    def place(self,
        parameter: nn.Parameter,
    ) -> Place:
        "Return which part of a parameter is here; `ValueError` where it is not the one that it was."
        found = self._places.get(id(parameter))
        if found is not None and place_of(parameter) == replace(found, speaks=True): return found
        raise ValueError('model: got a parameter that is split otherwise than it was, or another one, '
                         'expected that which the Sparsifier was made with; make a new one')

    def in_step(self, coroutines):
        """Run coroutines to their ends on all ranks.

        Each yields what this rank has, and is sent what each rank has: what all of them yield travels in
        one exchange."""
        all_of_them, told = abreast(coroutines), None
        try:
            while True:
                told = self.gathered('questions', all_of_them.send(told))
                if any(of_rank.keys() != told[0].keys() for of_rank in told):
                    raise _known(RuntimeError('ranks: they ask about other layers; nothing was changed'))
        except StopIteration as end: return end.value

    def totals(self, numbers): return [sum(of_all) for of_all in zip(*self.gathered('totals', numbers))]

    def everywhere(self, answers):
        "Tell for each question whether all ranks say so."
        return [all(of_all) for of_all in zip(*self.gathered('answers', answers))]

    def any_of(self, masks):
        told = self.gathered('masks of filters', [np.packbits(mask) for mask in masks])
        found = [np.bitwise_or.reduce(of_all) for of_all in zip(*told)]
        return [np.unpackbits(bits, count=len(mask)).astype(bool) for bits, mask in zip(found, masks)]

    def whole(self, tensor):
        "Return all of a tensor, gathered by torch."
        if not is_split(tensor): return tensor.detach()
        shapes = self.gathered('whole weights', tuple(tensor.shape))
        if len({*shapes}) > 1: raise _known(RuntimeError(f'ranks: they gather {shapes}, expected one tensor'))
        return tensor.detach().full_tensor()

    def _differs(self, digests, name, first): return digests.get(name, first) != first


def _check_whole(name, shape, boxes):
    "Raise `ValueError` unless the boxes that ranks have of a tensor are all of it, and do not overlap."
    apart = sorted({box for box in boxes if box is not None and prod(box[0])})
    size = sum(prod(sizes) for sizes, _ in apart)
    overlap = any(_meet(one, other) for i, one in enumerate(apart) for other in apart[:i])
    if None not in boxes and size == prod(shape) and not overlap: return
    raise ValueError(f'model: got parts of {name!r} that are not all of it, or overlap, '
                     'expected those of one tensor on all processes of the mesh')


def _meet(one, other):
    "Tell whether two boxes have an entry in common."
    along = zip(*one, *other)
    return all(start < start2 + size2 and start2 < start + size for size, start, size2, start2 in along)


def _known(error):
    "Mark an error that all ranks raise."
    error.all_know = True
    return error


def _unreached(error):
    return _known(RuntimeError(f'ranks: one cannot be reached ({error}); nothing was changed'))


def _failure(error): return isinstance(error, ValueError), f'{type(error).__name__}: {error}'


def _raise_failure(failures):
    "Raise what went wrong on another rank, if anything did."
    for rank, failure in enumerate(failures):
        if failure is None: continue
        is_value_error, said = failure
        kind = ValueError if is_value_error else RuntimeError
        raise _known(kind(f'ranks: rank {rank} failed, so nothing was changed on any: {said}'))


def peers_of(
    model: nn.Module,
) -> Alone:  # `Replicas` or `Shards` where there are several
    """Return the processes that hold the same model, as DistributedDataParallel in it says, or parts of it.

    `ValueError` where both is so, or the parts are those of FullyShardedDataParallel (FSDP1)."""
    replicated = [m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
    if not is_sharded(model): return Replicas(replicated[0]) if replicated else ALONE
    parts = [p for p in model.parameters() if is_split(p)]
    if parts and not replicated: return Shards(model)
    raise ValueError('model: got one that is split over processes by FullyShardedDataParallel (FSDP1), or '
                     'within DistributedDataParallel, expected fully_shard or tensor parallel')


def digest(
    *tensors: torch.Tensor | None,
) -> bytes:
    "Return a short text that differs, but for chance, where the bits of tensors differ."
    found = blake2b(digest_size=8)
    for tensor in tensors: found.update(b'' if tensor is None else _bits(here(tensor)))
    return found.digest()


def _bits(tensor):
    if tensor.dtype == torch.bool: return np.packbits(tensor.cpu().numpy())
    return tensor.cpu().reshape(-1).contiguous().view(torch.uint8).numpy()


def as_array(
    tensor: torch.Tensor,  # without a gradient
) -> torch.Tensor | np.ndarray:
    "Return the numpy array of a tensor where there is one; it is compared and counted many times faster."
    has_array = ALONE.on_host(tensor) and tensor.dtype in (torch.float32, torch.float64)
    return tensor.numpy() if has_array else tensor
