"Zeros turned into something: a smaller file, a smaller network, faster layers. For any dense PyTorch model, whoever made its zeros."
from fasterai.deploy.account import payoff
from fasterai.deploy.export import export_onnx
from fasterai.deploy.files import load_sparse, save_sparse
from fasterai.deploy.faster import speed_up
from fasterai.deploy.smaller import shrink

__all__ = ['save_sparse', 'load_sparse', 'shrink', 'speed_up', 'export_onnx', 'payoff']
