"Read the training batches of a fastai Learner beside its fit, which goes on undisturbed."
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset, Subset

from fasterai.snapshot import random_numbers_kept

ITEMS = 512  # enough for statistics and Gram matrices of most layers, and read in seconds


class TrainingBatches:
    """Give some training batches of a Learner, read anew each time they are iterated, in a fit or outside.

    The items are spread evenly over the training data, in its order, with the transforms of the training
    loader: data that are sorted by class give items of all classes. No callback is called, and the random
    numbers are put back. Nothing is read before the first iteration."""

    def __init__(self,
        learn,  # a fastai Learner
        items: int = ITEMS,  # at most so many; a batch that is under way is read to its end
    ):
        self.learn, self.items = learn, items

    def __iter__(self) -> Iterator:
        """Yield a tuple for each batch: a tuple of inputs, as `model(*inputs)` takes them, and the target.

        The target is a tuple where there are several, and is missing where there is none."""
        devices = {p.device for p in self.learn.model.parameters() if p.is_cuda}
        with random_numbers_kept(*devices): return iter(self._read())

    def _read(self):
        found, n = [], 0
        for batch in _beside(self.learn.dls.train, self.items):
            found.append(self._split(self.learn._set_device(batch)))
            n += _items(batch)
            if n >= self.items: break
        return found

    def _split(self, batch):
        "Part inputs from targets where the Learner does."
        n_inputs = getattr(self.learn.dls, 'n_inp', max(1, len(batch) - 1))
        inputs, targets = tuple(batch[:n_inputs]), tuple(batch[n_inputs:])
        if len(targets) > 1: targets = (targets,)
        return inputs, *targets


def loss_of(
    learn,  # a fastai Learner
) -> Callable:  # of output and target; several targets come as one tuple
    "Return the loss of a Learner as a function that goes with its `TrainingBatches`."
    return partial(_loss, learn)


def _loss(learn, output, *target):
    if len(target) == 1 and isinstance(target[0], tuple): target, = target
    return learn.loss_func(output, *target)


def _beside(loader, items):
    "Return a loader of the same data, without shuffling, apart from the one that a fit reads."
    loader = getattr(loader, '__dict__', {}).get('dl', loader)  # of fastai's DistributedDL: each rank reads all
    if hasattr(loader, 'new'): return _of_fastai(loader, items)
    return _of_torch(loader, items) if isinstance(loader, DataLoader) else loader


def _of_fastai(loader, items):
    chosen = {} if loader.n is None else {'get_idxs': lambda: spread(loader.n, items)}
    return loader.new(shuffle=False, drop_last=False, num_workers=0, **chosen)


def _of_torch(loader, items):
    data, collate = loader.dataset, {'collate_fn': loader.collate_fn}
    own_batches = loader.batch_size is None and loader.batch_sampler is not None
    if own_batches: return DataLoader(data, batch_sampler=loader.batch_sampler, **collate)
    has_items = loader.batch_size is not None and hasattr(data, '__len__')
    if has_items and not isinstance(data, IterableDataset): data = Subset(data, spread(len(data), items))
    return DataLoader(data, loader.batch_size, **collate)


def spread(
    n: int,  # how many there are
    items: int,  # how many are taken, or all where there are fewer
) -> list:  # of positions
    "Return positions that are spread evenly, in their order."
    taken = min(n, items)
    return [i * n // taken for i in range(taken)]


def _items(batch):
    "Count the items of a batch: the first tensor of a batch has one row for each."
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.ndim]
    return len(tensors[0]) if tensors else 1
