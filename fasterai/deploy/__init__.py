"Turn zeros into a smaller file, a smaller network or faster layers, for any dense PyTorch model."
from fasterai.deploy.export import export_onnx
from fasterai.deploy.fast import load_fast, save_fast
from fasterai.deploy.files import load_sparse, save_sparse
from fasterai.deploy.payoff import payoff
from fasterai.deploy.shrink import shrink
from fasterai.deploy.small import load_small, save_small
from fasterai.deploy.speed_up import speed_up

__all__ = ['save_sparse', 'load_sparse', 'shrink', 'save_small', 'load_small', 'speed_up', 'save_fast',
           'load_fast', 'export_onnx', 'payoff']
