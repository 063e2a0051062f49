"ONNX, checked before it is handed over."
import os
import tempfile
import warnings
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fasterai.deploy.compare import agree, evaluating, example_inputs, fresh, outputs

TOLERANCE = 1e-4  # of the largest output: another runtime sums in another order


def export_onnx(
    model: nn.Module,  # it is not changed; its zeros go along as ordinary weights
    path: str | Path,  # the file, which is replaced if it is there, once the new one is right
    example,  # a batch as the model takes it, a tuple for several inputs
    dynamic_batch: bool = True,  # may the first axis of all inputs have another length than the example's?
) -> Path:  # the file
    "Write a model as ONNX, in eval mode; onnxruntime has by then computed the same as torch, on the example and on inputs made afresh."
    import onnxruntime
    if not isinstance(model, nn.Module): raise TypeError(f'model: got {type(model).__name__}, allowed is a torch.nn.Module')
    inputs, path = example_inputs(example), Path(path)
    if not all(isinstance(i, torch.Tensor) for i in inputs):
        raise TypeError(f'example: got {[type(i).__name__ for i in inputs]}, allowed are tensors')
    plain, inputs = evaluating(deepcopy(model).cpu()), tuple(i.detach().cpu().clone() for i in inputs)
    outputs(plain, inputs)  # an error of the model's own comes first
    half = any(t.dtype in (torch.float16, torch.bfloat16) for t in (*plain.parameters(), *inputs))
    dynamic = tuple({0: torch.export.Dim.AUTO} for _ in inputs) if dynamic_batch else None
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the exporter's own
        temporary = Path(folder) / path.name
        shown = tuple(torch.cat([i, i]) for i in inputs) if dynamic_batch and len(inputs[0]) == 1 else inputs  # one would be taken for fixed
        torch.onnx.export(plain, shown, temporary, dynamo=True, dynamic_shapes=dynamic, external_data=False, verbose=False)
        session = onnxruntime.InferenceSession(temporary, providers=['CPUExecutionProvider'])
        for batch in (inputs, *fresh(inputs, (1, len(inputs[0]) + 1) if dynamic_batch else ())):
            found = session.run(None, {n.name: t.numpy() for n, t in zip(session.get_inputs(), batch)})
            if not agree([torch.from_numpy(np.asarray(f)) for f in found], outputs(plain, batch), 2e-2 if half else TOLERANCE):
                raise ValueError(f'model: onnxruntime does not compute for inputs of shape {[tuple(b.shape) for b in batch]} what torch does; '
                                 f'{str(path)!r} was not written')
        os.replace(temporary, path)
    return path
