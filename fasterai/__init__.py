"Prune PyTorch and fastai networks: exactly, so that the zeros stay, and so that they pay."
__version__ = '0.2.0'
