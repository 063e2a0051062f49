"Read the table that describes a file's tensors, and check that it fits the model and the file."
import hashlib
import json

from fasterai.deploy.container import are_lengths, bytes_of, listed, parse, refusal
from fasterai.deploy.packing import check_parts, dtype_name

FORMAT = 'fasterai.sparse 1'


def altered(
    path: str,  # as the user gave it
    why,  # what is wrong with the file
) -> ValueError:
    "Return the error for a file that contradicts itself."
    return refusal(path, f'which was altered since it was written ({why})')


def digest(
    tensors: dict,  # {name: tensor} as they are in the file
    descriptions: dict,  # {name: how to unpack it}
    forms: str | None = None,  # of the layers
) -> str:
    "Return a digest of all that a file says of a model. It finds damage; it is no signature."
    found = hashlib.sha256(json.dumps(descriptions).encode())
    if forms is not None: found.update(forms.encode())
    for name in sorted(tensors):
        found.update(f'{name} {tensors[name].dtype} {tuple(tensors[name].shape)}'.encode())
        found.update(bytes_of(tensors[name]))
    return found.hexdigest()


def read_table(
    metadata: dict,  # {str: str} of the file
    path: str,  # as the user gave it
) -> dict:  # {name: how to unpack it}
    "Read the descriptions of all tensors; `ValueError` for one that `save_sparse` does not write."
    found = metadata.get('format')
    if found != FORMAT:
        raise refusal(path, f'of format {found!r:.99}, expected that of save_sparse, {FORMAT!r}')
    try: table = parse(metadata.get('tensors', ''))
    except ValueError: raise altered(path, 'its table cannot be read') from None
    if type(table) is not dict: raise altered(path, 'its table is none')
    for name, description in table.items():
        if _is_description(description, table): continue
        raise altered(path, f'its table is wrong at {name!r:.99}')
    return table


def _is_description(value, table):
    if type(value) is not dict: return False
    if value.keys() == {'same'}:
        source = value['same']
        return type(source) is str and type(table.get(source)) is dict and 'same' not in table[source]
    if value.keys() not in ({'shape', 'dtype'}, {'shape', 'dtype', 'packed'}): return False
    return are_lengths(value['shape']) and type(value['dtype']) is str and value.get('packed', True) is True


def check_fit(
    state: dict,  # {name: tensor} of the model
    descriptions: dict,  # of the file
    path: str,  # as the user gave it
) -> dict:  # {name: the name in the file that has its values}
    "Check that a file has the tensors of the model, in their shapes and types; `ValueError` if not."
    missing = [n for n in state if n not in descriptions]
    unexpected = [n for n in descriptions if n not in state]
    if missing or unexpected:
        problems = []
        if missing: problems.append(f'it lacks {listed(missing)}')
        if unexpected: problems.append(f'it has the unexpected {listed(unexpected)}')
        raise refusal(path, f'which does not fit the model: {"; ".join(problems)}')
    sources = {name: descriptions[name].get('same', name) for name in state}
    for name, tensor in state.items():
        description = descriptions[sources[name]]
        shape, dtype = tuple(description['shape']), description['dtype']
        if shape != tuple(tensor.shape):
            raise refusal(path, f'whose tensor {name!r} has shape {shape}, expected {tuple(tensor.shape)}')
        expected = dtype_name(tensor.dtype)
        if dtype != expected:
            raise refusal(path, f'whose tensor {name!r} has type {dtype:.99}, expected {expected}')
    return sources


def check_entries(
    state: dict,  # {name: tensor} of the model
    descriptions: dict,  # of the file, which fit the model
    entries: dict,  # {name: Entry} of the file
    path: str,  # as the user gave it
):
    "Check that a file has what its table says, and nothing more; `ValueError` if not."
    known = set()
    try:
        for name, description in descriptions.items():
            if 'same' in description: continue
            known.update(check_parts(name, description, state[name].dtype, entries))
    except ValueError as error: raise altered(path, error) from None
    more = [name for name in entries if name not in known]
    if more: raise altered(path, f'it has {listed(more)}, which its table lacks')
