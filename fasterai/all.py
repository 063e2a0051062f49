"Import all that one needs: `from fasterai.all import *`."
from fasterai.callback import SparsifyCallback
from fasterai.context import within
from fasterai.distil import distillation
from fasterai.fit_to import fit_to
from fasterai.granularity import add_layer_type, block, head
from fasterai.keep import KeepSparse
from fasterai.plot import plot_kernels, plot_tradeoff, plot_weights
from fasterai.repair import recalibrate, refit
from fasterai.report import Report
from fasterai.schedule import (
    Due,
    acdc,
    cosine,
    dense_sparse_dense,
    epochs,
    exponential,
    gradual,
    iterative,
    linear,
    multi_step,
    one_cycle,
    one_shot,
    plot_schedule,
    rigl,
    steps,
)
from fasterai.sensitivity import sensitivity
from fasterai.snapshot import Snapshot
from fasterai.sparsifier import Sparsifier
from fasterai.tickets import find_ticket

__all__ = [
    'SparsifyCallback', 'KeepSparse', 'Sparsifier', 'Report', 'block', 'head', 'within', 'add_layer_type',
    'one_shot', 'iterative', 'gradual', 'linear', 'cosine', 'one_cycle', 'dense_sparse_dense',
    'exponential', 'multi_step', 'acdc', 'rigl', 'Due', 'steps', 'epochs', 'plot_schedule',
    'sensitivity', 'fit_to', 'refit', 'recalibrate', 'Snapshot', 'find_ticket', 'distillation',
    'plot_kernels', 'plot_weights', 'plot_tradeoff',
]
