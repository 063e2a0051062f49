"Save what `shrink` has made, in a file without code, and make it again from that and the larger network."
import json
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

from fasterai.deploy.compare import check_copyable, check_module
from fasterai.deploy.container import listed, parse, read_header, refusal
from fasterai.deploy.files import load_sparse, save_state, state_of
from fasterai.deploy.placing import checked_path, named_errors, open_plain
from fasterai.deploy.table import altered, read_table


def save_small(
    small: nn.Module,  # what `shrink` has returned; it may have been trained since
    path: str | Path,  # the file to write, as `save_sparse` does
    model: nn.Module,  # the network that `shrink` was given, or another of its code
):
    """Write a smaller network to one safetensors file, with the numbers that differ in its modules.

    `load_small` makes the network from the file and the code of the larger one, in any process and without
    pickle. `ValueError` where the two have other modules; other errors are those of `save_sparse`."""
    check_module(small, 'small')
    check_copyable(model)
    larger, numbers = dict(model.named_modules()), {}
    for name, module in small.named_modules():
        if type(larger.get(name)) is not type(module):
            raise ValueError(f'model: got one that has no {type(module).__name__} at {name!r}, '
                             'expected the network that was shrunk')
        differ = {attr: value for attr, value in _numbers(module).items()
                  if _numbers(larger[name]).get(attr, value) != value}
        if differ: numbers[name] = differ
    save_state(state_of(small), path, json.dumps({'numbers': numbers}))


def load_small(
    model: nn.Module,  # a model of the architecture that `shrink` was given; it is not changed
    path: str | Path,  # a file that `save_small` has written
) -> nn.Module:  # a smaller copy, with the tensors of the file
    "Return a smaller network from a file that `save_small` has written. Errors are those of `load_sparse`."
    check_copyable(model)
    path = checked_path(path)
    with named_errors(path), open_plain(path) as file: metadata, _ = read_header(file, path)
    table, numbers = read_table(metadata, path), _read_numbers(metadata, path)
    small = deepcopy(model)
    modules, state = dict(small.named_modules()), state_of(small)
    missing = [name for name in numbers if name not in modules]
    if missing: raise refusal(path, f'which does not fit the model: it lacks {listed(missing)}')
    for name, tensor in state.items(): _cut(name, tensor, table, path)
    for name, changed in numbers.items(): _set(modules[name], name, changed, path)
    return load_sparse(small, path)


def _numbers(module):
    "Return the attributes of a module that are numbers, or lists of them, and count something."
    return {attr: list(value) if isinstance(value, tuple) else value for attr, value in vars(module).items()
            if not attr.startswith('_') and _are_counts(value)}


def _are_counts(value):
    if type(value) is int: return value > 0
    return type(value) in (list, tuple) and bool(value) and all(type(v) is int and v > 0 for v in value)


def _read_numbers(metadata, path):
    if 'forms' not in metadata: raise refusal(path, 'which save_small has not written; load_sparse reads it')
    try: told = parse(metadata['forms'])
    except ValueError: raise altered(path, 'its numbers cannot be read') from None
    if type(told) is not dict or told.keys() != {'numbers'} or type(told['numbers']) is not dict:
        raise refusal(path, 'which save_small has not written')
    for name, changed in told['numbers'].items():
        if type(changed) is dict and all(map(_are_counts, changed.values())): continue
        raise altered(path, f'its numbers are wrong at {name!r:.99}')
    return told['numbers']


def _cut(name, tensor, table, path):
    "Make a tensor as small as the file has it."
    entry = table.get(table.get(name, {}).get('same', name))
    if entry is None: return  # load_sparse says what is missing
    shape, before = tuple(entry['shape']), tuple(tensor.shape)
    if shape == before: return
    fits = len(shape) == len(before) and all(new <= old for new, old in zip(shape, before))
    if not fits: raise refusal(path, f'whose tensor {name!r} has shape {shape}, expected at most {before}')
    with torch.no_grad(): tensor.data = tensor.detach()[tuple(map(slice, shape))].clone()


def _set(module, name, changed, path):
    "Set the numbers of a module, each of which it has and none of which grows."
    have = _numbers(module)
    for attr, value in changed.items():
        old = have.get(attr)
        fits = type(old) is type(value) and (old >= value if type(value) is int else len(old) == len(value))
        if not fits:
            raise refusal(path, f'which does not fit the model: {attr!r} of {name!r} is {old}, not {value}')
        setattr(module, attr, tuple(value) if isinstance(vars(module)[attr], tuple) else value)
