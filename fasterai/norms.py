"Find the BatchNorms whose channels are zero with pruned filters, in the model as it is now."
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fasterai.dataflow import Flow
from fasterai.layers import why_not_zeroed
from fasterai.names import named_modules, warn_lost


class Known:
    """Hold a data flow by names: a `Flow` knows tensors and modules as the objects that they were.

    So it stays right where they are replaced later."""

    def __init__(self,
        flow: Flow,
        layers: dict,  # name: `Layer`
        model: nn.Module,
    ):
        self.flow, self.lost = flow, set()  # names of norms that were lost, and said to be
        self.weights = {name: layer.weight for name, layer in layers.items()}
        modules = named_modules(model).items()
        self.norms = {module: name for name, module in modules if isinstance(module, _BatchNorm)}
        flow.shifts = {i: shift for i, shift in flow.shifts.items() if not why_not_zeroed(shift)}
        self.shifts = {id(tensor): (path, name) for path, module in modules
                       for name, tensor in module._parameters.items() if id(tensor) in flow.shifts}
        self.biases = {(path, name): tensor for path, module in modules
                       for name, tensor in module._parameters.items() if 'bias' in name}

    def zero_channels(self,
        dead: dict,  # name of a layer: bool (filters,), True where the filter is zero
        biases: dict,  # module: {name: bool (channels,)}, those that are zero with filters
        model: nn.Module,
    ) -> dict:  # BatchNorm: {name: bool (channels,)}, with the modules that the model has now
        "Find what is masked of each BatchNorm that receives channels of zeros."
        modules = named_modules(model)
        paths = {module: path for path, module in modules.items()}
        zero_biases = {}  # id of a bias: bool (channels,)
        for module, tensors in biases.items():
            for name, zero in tensors.items():
                before = self.biases.get((paths[module], name))
                zero_biases |= {id(before): zero, id(getattr(module, name)): zero}
        by_id = {id(self.weights[name]): filters for name, filters in dead.items()}
        found = {}
        for norm, channels in self.flow.zero_channels(by_id, zero_biases).items():
            if isinstance(norm, nn.Parameter):
                self._add_shift(norm, channels, modules, found)
                continue
            now = self._again(norm, modules, paths)
            if now is None: continue
            names = [name for name in ('running_mean', 'bias') if getattr(now, name) is not None]
            found[now] = dict.fromkeys(names, channels)
        return found

    def _add_shift(self, shift, channels, modules, found):
        "Add the mask of a learned shift to what is found, where the model still has it."
        path, name = self.shifts.get(id(shift), (None, None))
        tensor = modules[path]._parameters.get(name) if path in modules else None
        if tensor is None or tensor.shape != shift.shape: return
        found.setdefault(modules[path], {})[name] = channels.reshape(shift.shape)

    def _again(self, norm, modules, paths):
        "Return the BatchNorm that is in the place of one now, None where it is lost or fused."
        if norm in paths: return norm
        alike = [m for m in paths if isinstance(m, _BatchNorm) and m.num_features == norm.num_features]
        same = [m for m in alike if norm.bias is not None and m.bias is norm.bias]
        if same: return same[0]
        path = self.norms[norm]
        if modules.get(path) in alike: return modules[path]
        fused = isinstance(modules.get(path), nn.Identity)  # its bias is that of the layer before
        if not fused and path not in self.lost: warn_lost([path])
        self.lost.add(path)
        return None
