"ONNX, checked before it is handed over."
import os
import tempfile
import warnings
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fasterai.deploy.smaller import agree, example_inputs, outputs

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
    outputs(model, inputs)  # an error of the model's own comes first
    plain, inputs = deepcopy(model).cpu().eval(), tuple(i.cpu() for i in inputs)
    dynamic = tuple({0: torch.export.Dim.AUTO} for _ in inputs) if dynamic_batch else None
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the exporter's own
        temporary = Path(folder) / path.name
        twice = tuple(torch.cat([i, i]) for i in inputs) if dynamic_batch and len(inputs[0]) == 1 else inputs  # a batch of one would be taken for fixed
        torch.onnx.export(plain, twice, temporary, dynamo=True, dynamic_shapes=dynamic, external_data=False, verbose=False)
        session = onnxruntime.InferenceSession(temporary, providers=['CPUExecutionProvider'])
        for batch in _fresh(inputs, dynamic_batch):
            found = session.run(None, {n.name: t.numpy() for n, t in zip(session.get_inputs(), batch)})
            if not agree([torch.from_numpy(np.asarray(f)) for f in found], outputs(plain, batch), TOLERANCE):
                raise ValueError(f'model: onnxruntime does not compute for inputs of shape {[tuple(b.shape) for b in batch]} what torch does; '
                                 f'{str(path)!r} was not written')
        os.replace(temporary, path)
    return path


def _fresh(inputs, dynamic):
    "The example, and others like it: of whole numbers those that are there, in another order."
    yield inputs
    generator = torch.Generator().manual_seed(0)

    def like(tensor, length):
        order = torch.randint(len(tensor), (length,), generator=generator)
        if not tensor.is_floating_point(): return tensor[order]
        return torch.randn((length, *tensor.shape[1:]), generator=generator).to(tensor.dtype)
    for length in (1, len(inputs[0]) + 1) if dynamic else (len(inputs[0]),): yield tuple(like(i, length) for i in inputs)
