"Run a model on batches of data, so that evidence about its layers is gathered. The model is left as it was."
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import partial

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fasterai.arguments import Inputs, is_function, name_of, read_example, takes
from fasterai.data import read_labelled, real_positions
from fasterai.inputs import Stop, Watching
from fasterai.progress import progress
from fasterai.snapshot import undisturbed


class _Counted:
    "Count the calls of layers in a batch while they are reported, and stop the batch after so many."

    def __init__(self, report, calls): self.report, self.calls, self.n = report, calls, 0

    def __call__(self, read):
        self.report(read)
        self.n += 1
        if self.n == self.calls: raise Stop


class Calibration:
    """Hold a model, data, and a loss, of which evidence is gathered.

    The data are read once an event, so that all layers see the same batches."""

    def __init__(self,
        model: nn.Module,
        data=None,  # batches, as `data.read_labelled` takes them; None: there are none
        loss_func: Callable | None = None,  # of output and label, or of the output where a batch has no label
        example=None,  # one batch of inputs, or a function that returns one; for what needs no data
    ):
        self.model, self.data, self.loss_func, self.example = model, data, loss_func, example
        self._batches = None

    @contextmanager
    def reading(self):
        "Read the data when they are first asked for inside a `with` block, and let them go after it."
        try: yield
        finally: self._batches = None

    @property
    def batches(self) -> list:  # of (`Inputs`, label)
        "Return the batches of data."
        if self._batches is None:
            with undisturbed(self.model): self._batches = read_labelled(self.data, self.model)
        return self._batches

    @property
    def has_loss(self) -> bool:
        "Tell whether gradients can be computed."
        return self.data is not None and self.loss_func is not None

    def an_example(self) -> Inputs:
        "Return inputs of one call: the example, or else the first batch."
        if self.example is None and self.data is None:
            raise ValueError('example: got None, expected one batch of inputs, or batches with data=; '
                             'nothing was changed')
        if self.example is None: return self.batches[0][0]
        return read_example(self.example() if is_function(self.example) else self.example, self.model)

    def reads(self,
        weights: list,  # parameters of the model
        report: Callable,  # gets an `inputs.Read` for each call of a layer with one of them
    ):
        """Run all batches and report what the layers read.

        A batch is run no further than the last of them, as the first batch has shown it."""
        wanted, calls = {id(weight) for weight in weights}, None
        with undisturbed(self.model), torch.no_grad():
            for inputs, _ in progress(self.batches):
                counted = _Counted(report, calls)
                watching = Watching(wanted, counted, real_positions(inputs, self.model))
                with suppress(Stop), watching: inputs.call(self.model)
                calls = calls or counted.n

    def are_read(self,
        weights: list,  # parameters of the model
    ) -> set:  # of ids
        "Return of which weights the inputs can be seen."
        found = set()
        inputs, _ = self.batches[0]
        watching = Watching({id(weight) for weight in weights}, lambda read: found.add(id(read.weight)))
        with undisturbed(self.model), torch.no_grad(), watching: inputs.call(self.model)
        return found

    def batch_gradients(self,
        weights: list,  # parameters of the model
        report: Callable,  # gets a list of tensors or None, one a weight
    ):
        "Run all batches and report the gradient of the loss of each."
        self._gradients(weights, lambda batch: [batch], report)

    def sample_gradients(self,
        weights: list,  # parameters of the model
        report: Callable,  # gets a list of tensors or None, one a weight
    ):
        "Run all batches sample by sample and report the gradient of the loss of each sample."
        self._gradients(weights, _samples, report)

    def _gradients(self, weights, split, report):
        with undisturbed(self.model), learning(weights):
            for batch in progress(self.batches):
                for inputs, label in split(batch): report(self._gradient(weights, inputs, label))

    def _gradient(self, weights, inputs, label):
        with torch.enable_grad():
            loss = self._loss(inputs.call(self.model), label)
            return torch.autograd.grad(loss, weights, allow_unused=True)

    def _loss(self, output, label):
        "Return the loss of a batch."
        loss = self._of_output(output) if label is None else self.loss_func(output, label)
        is_tensor = isinstance(loss, torch.Tensor)
        if is_tensor and loss.numel() == 1 and loss.requires_grad: return loss
        came = f'a tensor of shape {tuple(loss.shape)}' if is_tensor else repr(loss)
        if is_tensor and not loss.requires_grad: came += ' without a gradient'
        raise ValueError(f'loss_func: got {came} from {name_of(self.loss_func)}, expected a tensor of one '
                         'number, with a gradient; nothing was changed')

    def _of_output(self, output):
        "Return the loss of a batch that has no label."
        called = getattr(self.loss_func, 'forward', self.loss_func)  # of a module
        if takes(called, 1): return self.loss_func(output)
        taker = name_of(self.loss_func)
        raise ValueError(f'data: got a batch without a label, which {taker} takes; expected (input, label), '
                         'or a loss_func of the output alone; nothing was changed')


def _samples(batch):
    "Yield each sample of a batch as a batch of its own."
    leaves = tree_leaves(batch)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim]
    n = min((len(tensor) for tensor in tensors), default=0)
    if not n or any(len(tensor) != n for tensor in tensors):
        raise ValueError(f'data: got a batch {batch[0]} whose tensors differ in length, '
                         'expected one entry a sample in each')
    for i in range(n): yield tree_map_only(torch.Tensor, partial(_sample, i), batch)


def _sample(i, tensor): return tensor[i:i + 1] if tensor.ndim else tensor


@contextmanager
def learning(
    weights: list,  # parameters
):
    "Let weights have gradients inside a `with` block, frozen ones too."
    frozen = [weight for weight in weights if not weight.requires_grad]
    try:
        for weight in frozen: weight.requires_grad_(True)
        yield
    finally:
        for weight in frozen: weight.requires_grad_(False)
