"""Let sparse layers do what is done with their outputs, and run those that follow each other by one call.

torch.fx reads the code of a block, and of the blocks inside."""
import operator
from inspect import signature

import torch
from torch import fx, nn
from torch.nn import functional as F

from fasterai.deploy.kernels.chain import Chain, Link
from fasterai.deploy.kernels.layers import FUSED, MaxPool, SparseConv, SparseLinearKernel
from fasterai.snapshot import attributes_kept

SPARSE = SparseConv, SparseLinearKernel
LINKS = *SPARSE, MaxPool  # what a chain can run
DO_NOTHING = nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d  # in eval mode
SUMS = operator.add, operator.iadd, torch.add, 'add', 'add_'  # functions, and names of methods
IN_PLACE = operator.iadd, 'add_'
ACTIVATIONS = {F.relu: 'relu', torch.relu: 'relu', torch.relu_: 'relu', 'relu': 'relu', 'relu_': 'relu',
               F.relu6: 'relu6'}


class Forward:
    """Call a block as its own code does, but for what sparse layers take over, and for chains of them.

    It stands in the place of the method `forward` of one block. It pickles and copies with it. Modules inside
    are not called by themselves; where one has hooks, the block's own code runs."""

    def __init__(self, block): self.block, self._function = block, None

    def __call__(self, *args, **kwargs):
        if self._function is None: self.prepare()
        if any(self._hooks): return type(self.block).forward(self.block, *args, **kwargs)
        return self._function(self.block, *args, **kwargs)

    def prepare(self):
        """Read the block's code.

        torch.fx changes for that time how all modules are called, so no other thread may call one."""
        inside = [module for module in self.block.modules() if module is not self.block]
        self._hooks = [hooks for m in inside for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._function = _compiled(_rewritten(self.block))

    def __getstate__(self): return {'block': self.block, '_function': None}


def fuse_blocks(
    model: nn.Module,  # with sparse layers; its blocks are changed
    names: list | None = None,  # of the blocks; None: all
) -> list:  # the names of the blocks that have another forward now
    """Let sparse layers add, activate and follow each other, where torch.fx can read a block's code.

    A block takes those inside along; where its code cannot be read, they are tried by themselves."""
    found, inside = [], set()
    for name, block in model.named_modules():
        if names is not None and name not in names or block in inside: continue
        if not _is_block(block) or not _can_be_fused(block): continue
        block.forward = Forward(block)
        block.forward.prepare()
        found.append(name)
        inside.update(block.modules())
    return found


def fused_names(model: nn.Module) -> list:
    "Return the names of the blocks that `fuse_blocks` has changed."
    return [name for name, block in model.named_modules() if isinstance(vars(block).get('forward'), Forward)]


def unfuse(model: nn.Module):
    "Give all blocks their own forward back."
    for name in fused_names(model): del model.get_submodule(name).forward


def _is_block(module):
    "Tell whether a module has code that calls sparse layers."
    if _is_leaf(module) or 'forward' in vars(module): return False
    return any(isinstance(m, SPARSE) for m in module.modules()) and _needs_all(module.forward)


def _is_leaf(module):
    "Tell whether a module is called as it is: one of torch's that is no row of others, or a sparse layer."
    is_of_torch = type(module).__module__.startswith('torch.nn')
    return isinstance(module, LINKS) or is_of_torch and type(module) is not nn.Sequential


def _needs_all(forward):
    "Tell whether a function needs all its arguments: torch.fx takes one that may be None for a tensor."
    arguments = signature(forward).parameters.values()
    return all(one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD for one in arguments)


def _can_be_fused(block):
    # code that depends on its inputs raises errors of all kinds
    try: return _rewritten(block) is not None
    except Exception: return False


class _Tracer(fx.Tracer):
    "Read the code of a block and of the blocks that it calls."

    def is_leaf_module(self, module, name): return _is_leaf(module)


def _rewritten(block):
    "Return the graph of a block in which sparse layers do more, or None if there is nothing for them to do."
    with attributes_kept(block): graph = _Tracer().trace(block)
    has_changed = False
    for node in list(graph.nodes):
        if node.op == 'get_attr' and not _is_tensor_of(block, node.target): return None
        if _kind(block, node) in DO_NOTHING: _replace(graph, node, node.args[0])
    for node in list(graph.nodes):
        if _kind(block, node) in SPARSE: has_changed |= _absorb(graph, block, node)
    for row in _rows(graph, block):
        has_changed = True
        _link(graph, block, row)
    return graph if has_changed else None


def _is_tensor_of(block, path):
    "Tell whether a path names a tensor of the block, and not one that its code made while it was read."
    names = {name for name, _ in (*block.named_parameters(remove_duplicate=False),
                                  *block.named_buffers(remove_duplicate=False))}
    return path in names


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


def _rows(graph, block):
    "Return the calls of layers that follow each other with no other call between, lists of two or more."
    rows = [[]]
    for node in graph.nodes:
        if _kind(block, node) in LINKS: rows[-1].append(node)
        elif rows[-1]: rows.append([])
    return [row for row in rows if len(row) > 1]


def _link(graph, block, row):
    "Let a chain take the place of a row of calls."
    reads = dict.fromkeys(read for node in row for read in node.all_input_nodes)
    inputs = [node for node in reads if node not in row]
    outputs = [node for node in row if node.users.keys() - {*row}]
    number = {node: i for i, node in enumerate([*inputs, *row])}
    links = [Link(block.get_submodule(node.target), number[node.args[0]],
                  number.get(node.kwargs.get('add')), node.kwargs.get('activation')) for node in row]
    chain = Chain(links, len(inputs), [number[node] for node in outputs])
    with graph.inserting_after(row[-1]): found = graph.call_function(chain.call, tuple(inputs))
    for node, result in zip(outputs, _parts(graph, found, len(outputs))):
        node.replace_all_uses_with(result, lambda user: user not in row)
    for node in reversed(row): graph.erase_node(node)


def _parts(graph, found, count):
    "Return the nodes of what a chain returns."
    if count == 1: return [found]
    with graph.inserting_after(found):  # the one that is inserted last comes first
        return [graph.call_function(operator.getitem, (found, i)) for i in range(count)]


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
