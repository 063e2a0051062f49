"Tell which tensors share memory, and check that values fit those that do."
import numpy as np
import torch

from fasterai.deploy.container import bytes_of, listed, refusal

ALIGNED = 16  # bytes of the largest number, complex128


def span(tensor) -> tuple:
    "Return the addresses where a tensor's memory begins and ends."
    if not tensor.numel(): return 0, 0
    last = sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def overlaps_itself(tensor) -> bool:
    "Tell whether one number in memory stands for several of a tensor."
    axes = sorted((step, length) for length, step in zip(tensor.shape, tensor.stride()) if length > 1)
    if not tensor.numel(): return False
    reach = 0  # how far the axes of smaller steps go
    for step, length in axes:
        if step <= reach: break
        reach += step * (length - 1)
    else: return False  # each step leads beyond all before: so it is for nearly every tensor
    places = np.zeros(1, np.int64)
    for step, length in axes: places = np.add.outer(places, step * np.arange(length)).ravel()
    return len(np.unique(places)) < len(places)


def memory_key(tensor):
    "Return a key that is equal for tensors of the same memory, and unique for an empty tensor."
    if not tensor.numel(): return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_neg()


def check_tied(
    state: dict,  # {name: tensor} of the model
    values: dict,  # {name: tensor}, what they are to become
    path: str,  # where the values come from, as the user gave it
):
    "Check that tensors which are one in the model are to become equal, to the bit; `ValueError` if not."
    first = {}  # {memory: the first name of the tensor there}
    for name, tensor in state.items():
        tied = first.setdefault(memory_key(tensor), name)
        if values[tied] is values[name] or _equal_bits(values[tied], values[name]): continue
        raise refusal(path, f'where {name!r} is not {tied!r}; in the model they are one')


def _equal_bits(one, other):
    return np.array_equal(bytes_of(one.contiguous()), bytes_of(other.contiguous()))


def check_overlaps(
    state: dict,  # {name: tensor} of the model
    values: dict,  # {name: tensor}, what they are to become
    path: str,  # where the values come from, as the user gave it
):
    """Check that tensors which share a part of their memory can have all values at once; `ValueError` if not.

    The values are written to other memory, in the order of the model, and read back."""
    for names in _overlapping(state):
        starts, stops = zip(*(span(state[name]) for name in names))
        begin = min(starts) // ALIGNED * ALIGNED
        length = -(-(max(stops) - begin) // ALIGNED) * ALIGNED
        memory = torch.zeros(length, dtype=torch.uint8, device='cpu')
        views = {name: _same_view(state[name], memory, begin) for name in names}
        written = {name: -values[name] if state[name].is_neg() else values[name] for name in names}
        for name in names: views[name].copy_(written[name])
        for name in names:
            if _equal_bits(views[name], written[name]): continue
            others = listed([n for n in names if n != name])
            raise refusal(path, f'where {name!r} and {others} differ; in the model they share memory')


def _overlapping(state):
    "Return lists of the names of tensors whose memory may overlap, each in the order of the model."
    once = {memory_key(tensor): name for name, tensor in state.items() if tensor.numel()}.values()
    order = {name: i for i, name in enumerate(state)}
    groups, device, reach = [], None, 0
    for name in sorted(once, key=lambda name: (str(state[name].device), span(state[name]))):
        start, stop = span(state[name])
        if state[name].device == device and start < reach: groups[-1].append(name)
        else: groups.append([name])
        device, reach = state[name].device, max(stop, reach if len(groups[-1]) > 1 else 0)
    return [sorted(names, key=order.get) for names in groups if len(names) > 1]


def _same_view(tensor, memory, begin):
    "Return a tensor's view of other memory, which begins at an address."
    offset = (tensor.data_ptr() - begin) // tensor.element_size()
    return memory.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), offset)
