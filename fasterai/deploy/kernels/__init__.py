"Sparse layers for inference on a CPU, by kernels in C that are compiled for this machine."
from fasterai.deploy.kernels.layers import MaxPool, SparseConv, SparseLinearKernel
from fasterai.deploy.kernels.loading import library, peak, why_not

__all__ = ['SparseConv', 'SparseLinearKernel', 'MaxPool', 'library', 'peak', 'why_not']
