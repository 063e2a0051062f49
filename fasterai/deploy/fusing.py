"Let sparse layers do what is done with their outputs: a sum and a ReLU, in the same pass over memory."
import operator
from inspect import signature

import torch
from torch import fx, nn
from torch.nn import functional as F

from fasterai.deploy.kernels.layers import FUSED, SparseConv, SparseLinearKernel
from fasterai.snapshot import attributes_kept

SPARSE = SparseConv, SparseLinearKernel
SUMS = operator.add, operator.iadd, torch.add, 'add', 'add_'  # functions, and names of methods
IN_PLACE = operator.iadd, 'add_'
ACTIVATIONS = {F.relu: 'relu', torch.relu: 'relu', torch.relu_: 'relu', 'relu': 'relu', 'relu_': 'relu',
               F.relu6: 'relu6'}


class Forward:
    """Call a block as its own code does, but for sums and ReLUs that sparse layers take over.

    It stands in the place of the method `forward` of one block. It pickles and copies with it."""

    def __init__(self, block): self.block, self._function = block, None

    def __call__(self, *args, **kwargs):
        if self._function is None: self._function = _compiled(_rewritten(self.block))
        return self._function(self.block, *args, **kwargs)

    def __getstate__(self): return {'block': self.block, '_function': None}


def fuse_blocks(
    model: nn.Module,  # with sparse layers; its blocks are changed
    names: list | None = None,  # of the blocks; None: all
) -> list:  # the names of the blocks that have another forward now
    "Let the sparse layers of each block add and activate, where torch.fx can read the block's code."
    blocks = {name: block for name, block in model.named_modules() if names is None or name in names}
    found = {name: block for name, block in blocks.items() if _is_block(block) and _can_be_fused(block)}
    for block in found.values(): block.forward = Forward(block)
    return list(found)


def fused_names(model: nn.Module) -> list:
    "Return the names of the blocks that `fuse_blocks` has changed."
    return [name for name, block in model.named_modules() if isinstance(vars(block).get('forward'), Forward)]


def unfuse(model: nn.Module):
    "Give all blocks their own forward back."
    for name in fused_names(model): del model.get_submodule(name).forward


def _is_block(module):
    "Tell whether a module has code of its own, and calls layers."
    is_own = not type(module).__module__.startswith('torch.nn') and 'forward' not in vars(module)
    return is_own and any(isinstance(m, SPARSE) for m in module.modules()) and _needs_all(module.forward)


def _needs_all(forward):
    "Tell whether a function needs all its arguments: torch.fx takes one that may be None for a tensor."
    arguments = signature(forward).parameters.values()
    return all(one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD for one in arguments)


def _can_be_fused(block):
    # code that depends on its inputs raises errors of all kinds
    try: return _rewritten(block) is not None
    except Exception: return False


class _Tracer(fx.Tracer):
    "Read the code of one block, and not that of the modules that it calls."

    def is_leaf_module(self, module, name): return True


def _rewritten(block):
    "Return the graph of a block in which sparse layers add and activate, or None if there is nothing to do."
    with attributes_kept(block): graph = _Tracer().trace(block)
    has_changed = False
    for node in list(graph.nodes):
        if _kind(block, node) is nn.Identity: _replace(graph, node, node.args[0])
    for node in list(graph.nodes):
        if _kind(block, node) in SPARSE: has_changed |= _absorb(graph, block, node)
    return graph if has_changed else None


def _kind(block, node):
    return type(block.get_submodule(node.target)) if node.op == 'call_module' else None


def _absorb(graph, block, node):
    "Let a layer do the sum and the ReLU that follow it; tell whether there were any."
    if block.get_submodule(node.target).activation is not None: return False
    start, reader = node, _only_reader(node)
    if _kind(block, node) is SparseConv and _is_sum(reader, node):
        other = next(term for term in reader.args if term is not node)
        node = _moved(graph, node, reader, {'add': other})
        reader = _only_reader(node)
    activation = _activation(block, reader)
    if activation: node = _moved(graph, node, reader, node.kwargs | {'activation': activation})
    return node is not start


def _only_reader(node):
    "Return the one node that reads another, or None if there are several."
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_sum(reader, node):
    if reader is None or reader.target not in SUMS or reader.kwargs or len(reader.args) != 2: return False
    first, second = reader.args
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first is second: return False
    return first is node or reader.target not in IN_PLACE  # what another value becomes may be read again


def _activation(block, reader):
    if reader is None: return None
    if reader.op == 'call_module': return FUSED.get(_kind(block, reader))
    return ACTIVATIONS.get(reader.target)


def _moved(graph, node, to, kwargs):
    "Call a layer in the place of the node that reads it."
    with graph.inserting_before(to): new = graph.call_module(node.target, node.args[:1], kwargs)
    to.replace_all_uses_with(new)
    graph.erase_node(to)
    graph.erase_node(node)
    return new


def _replace(graph, node, value):
    node.replace_all_uses_with(value)
    graph.erase_node(node)


def _compiled(graph):
    code = graph.python_code('self')
    namespace = dict(code.globals)
    exec(code.src, namespace)
    return namespace['forward']
