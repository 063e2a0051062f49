"Export a model to ONNX, and check the file before it takes its place."
import os
import tempfile
import warnings
from copy import deepcopy
from inspect import signature
from numbers import Number
from pathlib import Path
from types import NoneType

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from fasterai.arguments import flag
from fasterai.deploy.compare import agree, check_copyable, example_inputs, file_path, fresh, outputs
from fasterai.snapshot import evaluation_mode

TOLERANCE = 1e-4  # of the largest output: another runtime sums in another order
HALF = frozenset((torch.float16, torch.bfloat16))
HALF_TOLERANCE = 2e-2  # where any parameter or input is of such a type
KNOWN = torch.Tensor, Number, str, NoneType  # what a model may return


def export_onnx(
    model: nn.Module,  # the model, which is not changed; its zeros are written as ordinary weights
    path: str | Path,  # the file to write; an old one is replaced once the new one is found right
    example,  # a batch as the model takes it: a tuple for several inputs, a dict for keywords
    dynamic_batch: bool = True,  # True: the first axis of all inputs may have any length; False: the example's only
) -> Path:  # the file
    """Write a model as ONNX, in eval mode.

    The tensors of the example are the inputs of the file, and what else it has is fixed. The file is written
    only if onnxruntime computes the outputs of torch, for the example and for random inputs. `ValueError`
    where it cannot be, with what to do."""
    import onnxruntime
    check_copyable(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError('model: got a ScriptModule, expected the torch.nn.Module that it was made from')
    path, dynamic_batch = file_path(path), flag('dynamic_batch', dynamic_batch)
    inputs = _tensors(example_inputs(example, model), dynamic_batch)
    plain = deepcopy(model).cpu()
    outputs(plain, inputs)  # an error of the model's own comes first
    _check_outputs(plain, inputs)
    tolerance = HALF_TOLERANCE if _is_half(plain, inputs) else TOLERANCE
    lengths = (1, len(_inputs(inputs)[0]) + 1) if dynamic_batch else ()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        with warnings.catch_warnings(), evaluation_mode(plain):
            warnings.simplefilter('ignore')  # the exporter's own
            _try_to_write(plain, inputs, temporary, dynamic_batch)
            session = onnxruntime.InferenceSession(temporary, providers=['CPUExecutionProvider'])
            for batch in (inputs, *fresh(inputs, lengths)):
                if agree(*_both(session, plain, batch, dynamic_batch), tolerance): continue
                raise ValueError(f'model: onnxruntime does not compute for inputs of shape {batch} '
                                 f'what torch does; {str(path)!r} was not written')
        os.replace(temporary, path)
    return path


def _tensors(inputs, dynamic_batch):
    "Return copies of the inputs on the CPU; `TypeError` or `ValueError` where they are no tensors."
    others = [value for value in inputs.args if not isinstance(value, torch.Tensor)]
    others += [value for value in inputs.kwargs.values() if not isinstance(value, KNOWN)]
    if others or not _inputs(inputs): raise TypeError(f'example: got {inputs}, expected tensors')
    if dynamic_batch and not all(value.ndim for value in _inputs(inputs)):
        raise ValueError('example: got a tensor without axes, expected a batch, or dynamic_batch=False')
    return tree_map(lambda t: t.detach().cpu().clone() if isinstance(t, torch.Tensor) else t, inputs)


def _inputs(inputs):
    "Return the tensors among the inputs, in order."
    return [value for value in (*inputs.args, *inputs.kwargs.values()) if isinstance(value, torch.Tensor)]


def _check_outputs(model, inputs):
    "Refuse a model that returns what ONNX has no type for, as the cache of a language model."
    with evaluation_mode(model), torch.no_grad(): leaves = tree_leaves(inputs.call(model))
    others = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, KNOWN)]
    if not others: return
    hint = 'return tensors alone, by a module around it'
    has_cache = getattr(getattr(model, 'config', None), 'use_cache', False)
    if has_cache: hint = 'set model.config.use_cache = False'
    raise ValueError(f'model: {type(model).__name__} returns a {others[0]}, which ONNX has no type for, '
                     f'expected tensors: {hint}')


def _try_to_write(model, inputs, path, dynamic_batch):
    "Write a model; `ValueError` where torch.onnx.export fails, with what to do where that is known."
    try: return _write(model, inputs, path, dynamic_batch)
    except Exception as failure: error = failure
    said = f'{type(model).__name__} cannot be written by torch.onnx.export: {_said(error)}'
    with sdpa_kernel(SDPBackend.MATH):  # plain products, where the exporter fails in its own attention
        if _can_be_written(model, inputs, path, dynamic_batch): return
        is_fixed = dynamic_batch and _can_be_written(model, inputs, path, False)
    if is_fixed: said += '; with dynamic_batch=False it can'
    if 'grouped_mm' in said: said += "; call model.set_experts_implementation('batched_mm') first"
    raise ValueError(f'model: {said}') from error


def _can_be_written(model, inputs, path, dynamic_batch):
    try: _write(model, inputs, path, dynamic_batch)
    except Exception: return False
    return True


def _said(error):
    "Return the first line of the error that an error comes from."
    while error.__cause__ is not None: error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return ': '.join((type(error).__name__, *lines[:1]))


def _both(session, model, batch, dynamic_batch):
    "Return what onnxruntime computes, and what torch does; `ValueError` where one of them fails."
    try: return _run(session, _inputs(batch)), outputs(model, batch)
    except Exception as error:
        hint = ''
        if dynamic_batch: hint = '; pass dynamic_batch=False where the first axis of an input is no batch'
        raise ValueError(f'model: what was exported fails for inputs of shape {batch}: '
                         f'{_said(error)}{hint}') from error


def _write(model, inputs, path, dynamic_batch):
    "Write a model as an ONNX file, unchecked."
    shapes = None
    if dynamic_batch:
        # the exporter takes an axis of length one for fixed: an only item is shown to it twice
        if len(_inputs(inputs)[0]) == 1: inputs = tree_map(_twice, inputs)
        shapes = _dynamic(model, inputs)
    torch.onnx.export(model, inputs.args, path, kwargs=inputs.kwargs, dynamo=True, dynamic_shapes=shapes,
                      external_data=False, verbose=False)


def _twice(value): return torch.cat([value, value]) if isinstance(value, torch.Tensor) else value


def _dynamic(model, inputs):
    "Return, by the names of the model's arguments, that the first axis of each tensor may have any length."
    def free(value): return {0: torch.export.Dim.AUTO} if isinstance(value, torch.Tensor) else None
    given = signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments
    return {name: tree_map(free, value) for name, value in given.items()}


def _run(session, batch):
    "Return what onnxruntime computes, as tensors."
    names = [i.name for i in session.get_inputs()]
    found = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, batch)})
    return [torch.from_numpy(np.asarray(f)) for f in found]


def _is_half(model, inputs): return any(t.dtype in HALF for t in (*model.parameters(), *_inputs(inputs)))
