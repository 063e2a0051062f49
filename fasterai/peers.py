"Read and sum numbers wherever they lie, and compare what several processes decide."
import random
import sys
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from hashlib import blake2b
from math import prod

import numpy as np
import torch
from torch import distributed, nn

from fasterai.snapshot import random_numbers_kept


class Alone:
    """Read and sum the numbers of one process.

    On a CPU numpy compares and picks many times faster than torch; on a GPU tensors stay where they are,
    and what the host must see comes over in one piece. A class with the same methods can do so for several
    processes."""

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


def _is_on(device, piece): return isinstance(piece, torch.Tensor) and piece.device == device


def _alone(coroutine):
    "Run a coroutine to its end, and send it what it yields."
    try:
        told = next(coroutine)
        while True: told = coroutine.send([told])
    except StopIteration as end: return end.value


ALONE = Alone()


@dataclass(frozen=True)
class Place:
    "Say which part of a tensor a process has: a box of it."
    shape: tuple  # of the whole
    sizes: tuple  # of the part; an axis may have length 0
    offset: tuple  # where the part begins along each axis
    speaks: bool = True  # no process before this one has the same part

    @property
    def n_whole(self) -> int:
        "Return the number of entries of the whole."
        return prod(self.shape)

    def positions(self,
        at: np.ndarray,  # ints (n,), positions in the flattened part
    ) -> np.ndarray:  # ints (n,), in the flattened whole; they rise where those do
        "Return the positions in the whole of entries of the part."
        if self.sizes == self.shape or not len(at): return at
        along = np.unravel_index(at, self.sizes)
        return np.ravel_multi_index([i + start for i, start in zip(along, self.offset)], self.shape)


class Replicas(Alone):
    """Compare what the ranks of a group decide. Each holds the whole model, as in DistributedDataParallel.

    All go on or all raise, so that no rank comes to weights that the others do not have. Each method waits
    for the same call on all ranks."""

    def __init__(self,
        model: nn.parallel.DistributedDataParallel,
    ):
        self.group = model.process_group
        self.gpu = max((p.get_device() for p in model.parameters() if p.is_cuda), default=-1)  # -1: none
        self.buffers = list(model.module.buffers()) if model.broadcast_buffers else []

    def agreed(self, decide, digests=None, what='arguments'):
        """Return what a function returns, where all ranks come to the same.

        The error of one rank makes all raise: `ValueError` where it is one, else `RuntimeError`, as where
        they differ or one cannot be reached."""
        try:
            found = decide()
            mine = {} if digests is None else digests(found)
        except Exception as error:
            with suppress(RuntimeError): self._gather(what, (_failure(error), {}))
            raise
        told = self._gather(what, (None, mine))
        _raise_failure([failure for failure, _ in told])
        _check_same([of_rank for _, of_rank in told], what)
        return found

    @contextmanager
    def alike(self):
        "Have all ranks draw the random numbers of the first, of Python, numpy and torch's CPU generator."
        seed, *_ = self._gather('random numbers', int(torch.randint(2 ** 32, ())))
        with random_numbers_kept():
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            yield

    def share_buffers(self):
        "Have all ranks take over the buffers of the first, as each forward of DistributedDataParallel does."
        first = distributed.get_global_rank(self.group, 0)
        for buffer in self.buffers: distributed.broadcast(buffer, first, self.group)

    def _gather(self, what, mine):
        "Return what each rank has, by rank; `RuntimeError` where ranks are not in step, or one is gone."
        found = [None] * distributed.get_world_size(self.group)
        try:
            with torch.cuda.device(self.gpu):
                distributed.all_gather_object(found, (what, mine), group=self.group)
        except RuntimeError as error:
            raise RuntimeError(f'ranks: one cannot be reached ({error}); nothing was changed') from error
        kinds = [kind for kind, _ in found]
        if len({*kinds}) == 1: return [of_rank for _, of_rank in found]
        raise RuntimeError(f'ranks: they compare {", ".join(kinds)}, expected the same on all: call '
                           'sparsify_model and attach on all ranks, in one order; nothing was changed')


def _failure(error): return isinstance(error, ValueError), f'{type(error).__name__}: {error}'


def _raise_failure(failures):
    "Raise what went wrong on another rank, if anything did."
    for rank, failure in enumerate(failures):
        if failure is None: continue
        is_value_error, said = failure
        kind = ValueError if is_value_error else RuntimeError
        raise kind(f'ranks: rank {rank} failed, so nothing was changed on any: {said}')


def _check_same(digests, what):
    "Raise `RuntimeError` where the digests of a name are not the same on all ranks."
    first, *others = digests
    names = dict.fromkeys(name for of_rank in digests for name in of_rank)
    differ = {name: [rank for rank, of_rank in enumerate(others, 1) if of_rank.get(name) != first.get(name)]
              for name in names}
    differ = {name: ranks for name, ranks in differ.items() if ranks}
    if not differ: return
    name, ranks = next(iter(differ.items()))
    more = f' (and of {len(differ) - 1} more)' if len(differ) > 1 else ''
    where = ', '.join(map(str, ranks))
    raise RuntimeError(f'ranks: got other {what} of {name!r}{more} on rank {where} than on rank 0, expected '
                       'the same on all, from the same weights, gradients (outside of no_sync), data and '
                       'random numbers; nothing was changed')


def peers_of(
    model: nn.Module,
) -> Alone:  # `Replicas` where there are several
    "Return the processes that hold the same model, as DistributedDataParallel in it says."
    found = [m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
    return Replicas(found[0]) if found else ALONE


def digest(
    *tensors: torch.Tensor | None,
) -> bytes:
    "Return a short text that differs, but for chance, where the bits of tensors differ."
    found = blake2b(digest_size=8)
    for tensor in tensors: found.update(b'' if tensor is None else _bits(tensor.detach()))
    return found.digest()


def _bits(tensor):
    if tensor.dtype == torch.bool: return np.packbits(tensor.cpu().numpy())
    return tensor.cpu().reshape(-1).contiguous().view(torch.uint8).numpy()


def is_split(
    tensor: torch.Tensor,
) -> bool:
    "Tell whether a tensor is a DTensor, of which each process has a part."
    module = sys.modules.get('torch.distributed.tensor')  # whoever made one has loaded it
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(
    model: nn.Module,
) -> bool:
    "Tell whether each process has a part of a model, or of one of its parameters, only."
    module = sys.modules.get('torch.distributed.fsdp')
    kinds = [getattr(module, name, None) for name in ('FullyShardedDataParallel', 'FSDPModule')]
    kinds = tuple(kind for kind in kinds if kind is not None)
    if any(isinstance(one, kinds) for one in model.modules()): return True
    return any(is_split(parameter) for parameter in model.parameters())


def as_array(
    tensor: torch.Tensor,  # without a gradient
) -> torch.Tensor | np.ndarray:
    "Return the numpy array of a tensor where there is one; it is compared and counted many times faster."
    has_array = ALONE.on_host(tensor) and tensor.dtype in (torch.float32, torch.float64)
    return tensor.numpy() if has_array else tensor
