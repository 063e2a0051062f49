"Export a model to ONNX, and check the file before it takes its place."
import os
import tempfile
import warnings
from copy import deepcopy
from numbers import Number
from pathlib import Path
from types import NoneType

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fasterai.arguments import Inputs, flag
from fasterai.deploy.compare import agree, check_copyable, example_inputs, file_path, fresh, outputs
from fasterai.snapshot import evaluation_mode

TOLERANCE = 1e-4  # of the largest output: another runtime sums in another order
HALF = frozenset((torch.float16, torch.bfloat16))
HALF_TOLERANCE = 2e-2  # where any parameter or input is of such a type
KNOWN = torch.Tensor, Number, str, NoneType  # what a model may return


def export_onnx(
    model: nn.Module,  # the model, which is not changed; its zeros are written as ordinary weights
    path: str | Path,  # the file to write; an old one is replaced once the new one is found right
    example,  # a tensor, or a tuple of tensors for several inputs: a batch as the model takes it
    dynamic_batch: bool = True,  # True: the first axis of all inputs may have any length; False: the example's only
) -> Path:  # the file
    """Write a model as ONNX, in eval mode.

    The file is written only if onnxruntime computes the outputs of torch, for the example and for random
    inputs. `ValueError` where it cannot be, with what to do."""
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
    lengths = (1, len(inputs.args[0]) + 1) if dynamic_batch else ()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        with warnings.catch_warnings(), evaluation_mode(plain):
            warnings.simplefilter('ignore')  # the exporter's own
            _try_to_write(plain, inputs.args, temporary, dynamic_batch)
            session = onnxruntime.InferenceSession(temporary, providers=['CPUExecutionProvider'])
            for batch in (inputs, *fresh(inputs, lengths)):
                if agree(*_both(session, plain, batch, dynamic_batch), tolerance): continue
                raise ValueError(f'model: onnxruntime does not compute for inputs of shape {batch} '
                                 f'what torch does; {str(path)!r} was not written')
        os.replace(temporary, path)
    return path


def _tensors(inputs, dynamic_batch):
    "Return copies of the inputs on the CPU; `TypeError` or `ValueError` where they are no tensors in order."
    if inputs.kwargs:
        raise TypeError(f'example: got keywords {inputs}, expected tensors, '
                        'in a tuple in the order of the arguments of the model')
    if not inputs.args or not all(isinstance(value, torch.Tensor) for value in inputs.args):
        raise TypeError(f'example: got {inputs}, expected tensors')
    if dynamic_batch and not all(value.ndim for value in inputs.args):
        raise ValueError('example: got a tensor without axes, expected a batch, or dynamic_batch=False')
    return Inputs(tuple(value.detach().cpu().clone() for value in inputs.args))


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
    try: _write(model, inputs, path, dynamic_batch)
    except Exception as error:
        hint = ''
        if dynamic_batch and _can_be_written(model, inputs, path): hint = '; with dynamic_batch=False it can'
        raise ValueError(f'model: {type(model).__name__} cannot be written by torch.onnx.export: '
                         f'{_said(error)}{hint}') from error


def _can_be_written(model, inputs, path):
    try: _write(model, inputs, path, False)
    except Exception: return False
    return True


def _said(error):
    "Return the first line of the error that an error comes from."
    while error.__cause__ is not None: error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return ': '.join((type(error).__name__, *lines[:1]))


def _both(session, model, batch, dynamic_batch):
    "Return what onnxruntime computes, and what torch does; `ValueError` where one of them fails."
    try: return _run(session, batch.args), outputs(model, batch)
    except Exception as error:
        hint = ''
        if dynamic_batch: hint = '; pass dynamic_batch=False where the first axis of an input is no batch'
        raise ValueError(f'model: what was exported fails for inputs of shape {batch}: '
                         f'{_said(error)}{hint}') from error


def _write(model, inputs, path, dynamic_batch):
    "Write a model as an ONNX file, unchecked."
    shapes = None
    if dynamic_batch:
        shapes = tuple({0: torch.export.Dim.AUTO} for _ in inputs)
        # the exporter takes an axis of length one for fixed: an only item is shown to it twice
        if len(inputs[0]) == 1: inputs = tuple(torch.cat([i, i]) for i in inputs)
    torch.onnx.export(model, inputs, path, dynamo=True, dynamic_shapes=shapes,
                      external_data=False, verbose=False)


def _run(session, batch):
    "Return what onnxruntime computes, as tensors."
    names = [i.name for i in session.get_inputs()]
    found = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, batch)})
    return [torch.from_numpy(np.asarray(f)) for f in found]


def _is_half(model, inputs): return any(t.dtype in HALF for t in (*model.parameters(), *inputs.args))
