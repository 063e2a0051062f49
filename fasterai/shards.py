"Say which part of a tensor this process has, of those that `fully_shard` and tensor parallel split."
import sys
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch
from torch import nn


@dataclass(frozen=True)
class Place:
    "Say which part of a tensor a process has: a box of it."
    shape: tuple  # of the whole
    sizes: tuple  # of the part; an axis may have length 0
    offset: tuple  # where the part begins along each axis
    speaks: bool = True  # no process before this one has the same part
    spec: tuple | None = field(default=None, compare=False)  # mesh and placements of a DTensor

    @property
    def n_whole(self) -> int:
        "Return the number of entries of the whole."
        return prod(self.shape)

    @property
    def box(self) -> tuple:  # of slices
        "Return where the part is in the whole."
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.sizes))

    def positions(self,
        at: np.ndarray,  # ints (n,), positions in the flattened part
    ) -> np.ndarray:  # ints (n,), in the flattened whole; they rise where those do
        "Return the positions in the whole of entries of the part."
        if self.sizes == self.shape or not len(at): return at
        along = np.unravel_index(at, self.sizes)
        return np.ravel_multi_index([i + start for i, start in zip(along, self.offset)], self.shape)

    def part(self,
        whole: torch.Tensor,  # of the shape of the whole
    ) -> torch.Tensor:  # contiguous
        "Return a copy of the part of a tensor that all processes have."
        return whole[self.box].clone(memory_format=torch.contiguous_format)

    def split(self,
        part: torch.Tensor,  # of the sizes of the part
    ) -> torch.Tensor:
        "Return a part as a tensor of the shape of the whole: a DTensor, unless all of it is here."
        if self.spec is None: return part
        from torch.distributed.tensor import DTensor
        mesh, placements = self.spec
        stride = tuple(prod(self.shape[i + 1:]) for i in range(len(self.shape)))
        return DTensor.from_local(part, mesh, placements, run_check=False, shape=torch.Size(self.shape),
                                  stride=stride)


def is_split(
    tensor: torch.Tensor,
) -> bool:
    "Tell whether a tensor is a DTensor, of which each process has a part."
    module = sys.modules.get('torch.distributed.tensor')  # whoever made one has loaded it
    return module is not None and isinstance(tensor, module.DTensor)


def _fsdp(name): return getattr(sys.modules.get('torch.distributed.fsdp'), name, ())


def is_sharded(
    model: nn.Module,
) -> bool:
    "Tell whether each process has a part of a model, or of one of its parameters, only."
    kinds = _fsdp('FullyShardedDataParallel'), _fsdp('FSDPModule')
    if any(isinstance(one, kinds) for one in model.modules()): return True
    return any(is_split(parameter) for parameter in model.parameters())


def refuse_shards(
    model: nn.Module,
    who: str,  # asks
):
    "Raise `ValueError` where each process has a part of a model only."
    if not is_sharded(model): return
    raise ValueError(f'model: got one that is split over processes (fully_shard, tensor parallel) for {who}, '
                     'expected one that is whole in each, or a Sparsifier in a loop of your own')


def here(
    tensor: torch.Tensor,
) -> torch.Tensor:  # without a gradient; it shares the memory
    "Return the part of a tensor that this process has: a tensor that is not split itself."
    tensor = tensor.detach()
    return tensor.to_local() if is_split(tensor) else tensor


def place_of(
    tensor: torch.Tensor,
) -> Place:
    "Return which part of a tensor this process has; `ValueError` where parts are to be added."
    shape = tuple(tensor.shape)
    if not is_split(tensor): return Place(shape, shape, (0,) * len(shape))
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(f'model: got a DTensor of parts that are to be added, {tensor.placements}, '
                         'expected one that is split or replicated')
    chunk, = tensor.__create_chunk_list__()
    found = Place(shape, tuple(chunk.sizes), tuple(chunk.offsets),
                  spec=(tensor.device_mesh, tuple(tensor.placements)))
    if found.sizes == tuple(here(tensor).shape): return found
    raise ValueError(f'model: got a DTensor whose part has the shape {tuple(here(tensor).shape)}, '
                     f'expected {found.sizes}')


def part_for(
    mask: torch.Tensor,  # of the whole tensor
    tensor: torch.Tensor,
) -> torch.Tensor:
    "Return the part of a mask for the part of a tensor that this process has."
    return place_of(tensor).part(mask) if is_split(tensor) else mask


def split_like(
    tensor: torch.Tensor,  # whole, or split as the weight is
    weight: torch.Tensor,  # of the same shape
) -> torch.Tensor:  # a copy of the part that is here
    "Return the part of a tensor for that of a weight; `ValueError` where it is split otherwise."
    if not is_split(tensor): return part_for(tensor.detach(), weight).clone()
    if is_split(weight) and place_of(tensor) == place_of(weight): return here(tensor).clone()
    raise ValueError(f'state: got a DTensor with placements {tensor.placements}, expected a whole tensor, or '
                     'one that is split as the weight is')


def reshard(
    model: nn.Module,
):
    "Have each process keep its part only: between forward and backward some parameters are whole copies."
    kinds = _fsdp('FSDPModule')
    for module in model.modules():
        if isinstance(module, kinds): module.reshard()


def kind_of(
    module: nn.Module,
) -> type:
    "Return the class of a module, as it was before `fully_shard` made one of its own for it."
    kind, made = type(module), _fsdp('FSDPModule')
    return kind.__mro__[2] if made and isinstance(module, made) else kind
