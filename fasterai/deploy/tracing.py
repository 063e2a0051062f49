"Run a model once, and note which positions of its parameters go together and which entries are zero."
import warnings
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, is_dataclass, replace

import torch
from torch import nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from fasterai.arguments import Inputs
from fasterai.deploy.aten import Call, follow
from fasterai.deploy.axes import MOST, Axes, narrow_down, nothing, plain
from fasterai.deploy.compare import agree, fresh, outputs
from fasterai.deploy.labels import Labels
from fasterai.deploy.why import IS_OUTPUT, NO_OUTPUTS, NOT_RUN
from fasterai.snapshot import undisturbed

LARGEST = 2 ** 28  # entries of a constant whose zeros are looked at


@dataclass(eq=False)
class Trace:
    "Hold what runs have shown of a model."
    labels: Labels
    owned: dict  # name of a parameter or buffer: for each of its axes the first label
    makers: set = field(default_factory=set)  # (name, axis): the axes of weights that are a layer's outputs
    resizes: list = field(default_factory=list)  # (module, number in its code, rows that it counts)
    training: Inputs | None = None  # a batch on which it ran in training mode
    ran: set = field(default_factory=set)  # names of the parameters that took part
    caches: list = field(default_factory=list)  # (name of a module, attribute): `_caches_of`


def trace(
    model: nn.Module,
    inputs: Inputs,
) -> Trace:
    """Run a model in eval mode, and once in training mode, in which other layers may run.

    What is zero is known from eval mode, what goes together from both. The model is left as it was."""
    labels, tensors = Labels(), _tensors_of(model)
    axes = {name: _owned(name, tensor, labels) for name, tensor in tensors.items()}
    owned = {name: [int(rows[0, 0]) if len(rows) else 0 for rows in x.rows] for name, x in axes.items()}
    found = Trace(labels, owned, caches=_caches_of(model, inputs))
    with _decomposed(), undisturbed(model), torch.no_grad():
        _run(model, inputs, found, tensors, axes)
        reads, stuck, lost = list(labels.read_at_all), list(labels.stuck), list(labels.lost)
        model.train()
        found.training = _first_that_runs(inputs, lambda batch: _run(model, batch, found, tensors, axes))
        labels.read_at_all, labels.lost = reads, lost
        labels.stuck = stuck + [entry for entry in labels.stuck[len(stuck):] if entry[1] == IS_OUTPUT]
    for name, x in axes.items():
        if name in found.ran: continue
        for rows in x.rows: labels.block(rows, NOT_RUN)
    return found


def _caches_of(model, inputs):
    "Find dicts of tensors that the model fills as it runs, without which it computes the same, as of tables."
    found = [(name, attr) for name, module in model.named_modules()
             for attr, value in vars(module).items() if attr not in OF_ALL and _has_tensors(value)]
    if not found: return []
    without = deepcopy(model)
    forget(without, found)
    try: return found if agree(outputs(without, inputs), outputs(model, inputs)) else []
    except ValueError: return []


OF_ALL = frozenset(vars(nn.Module()))


def _has_tensors(value):
    if not isinstance(value, dict) or not value: return False
    return all(isinstance(v, torch.Tensor) and not isinstance(v, nn.Parameter) for v in value.values())


def forget(
    model: nn.Module,
    caches: list,  # (name of a module, attribute)
):
    "Empty caches, so that the model fills them anew."
    for name, attr in caches: getattr(model.get_submodule(name), attr).clear()


def _first_that_runs(inputs, run):
    "Run the inputs, or two of their items, as BatchNorm needs; return which ran, None if neither."
    for batch in (inputs, *fresh(inputs, (2,))):
        try: run(batch)
        except Exception: continue
        return batch
    return None


def _run(model, inputs, found, tensors, axes):
    watcher = _Watcher(found, tensors, axes)
    forget(model, found.caches)  # what they are computed from is followed
    for t in tree_leaves(inputs):
        if isinstance(t, torch.Tensor): watcher.axes[t] = plain(t.shape)
    with watcher.following_modules(), watcher: out = inputs.call(model)
    results = tensors_in(out)
    for t in results:
        for rows in watcher.axes_of(t).rows: found.labels.block(rows, IS_OUTPUT)
    if results: return
    for x in axes.values():
        for rows in x.rows: found.labels.block(rows, NO_OUTPUTS)


def tensors_in(
    out,  # what a model returned
) -> list:
    "Return the tensors in lists, tuples, dicts and dataclasses."
    found = []
    for leaf in tree_leaves(out):
        if isinstance(leaf, torch.Tensor): found.append(leaf)
        elif is_dataclass(leaf): found += tensors_in(list(vars(leaf).values()))
    return found


def _tensors_of(model):
    "Return the parameters and buffers by name; what several modules share is there once."
    return dict([*model.named_parameters(), *model.named_buffers()])


def _owned(name, tensor, labels):
    rows = tuple(labels.new(n, owned=True) for n in tensor.shape)
    zero = (tensor == 0).detach().cpu().numpy()
    initial = bool(zero.all()) and isinstance(tensor, nn.Parameter) and not name.endswith('bias')
    return Axes(tuple(tensor.shape), rows, narrow_down(zero, LARGEST), True, initial)


@contextmanager
def _decomposed():
    "Let torch compute by its plain operations: recurrent layers and attention without fused forms."
    fast = torch.backends.mha.get_fastpath_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.backends.mkldnn.flags(enabled=False): yield
        finally: torch.backends.mha.set_fastpath_enabled(fast)


class _Watcher(TorchDispatchMode):
    "Follow each operation of ATen."

    def __init__(self, found, tensors, axes):
        super().__init__()
        self.found, self.labels = found, found.labels
        self.names = {id(t): name for name, t in tensors.items()}
        self.owned = {id(t): axes[name] for name, t in tensors.items()}
        self.memory = {}
        for t in tensors.values(): self.memory.setdefault(_memory(t), []).append(id(t))
        self.axes = WeakTensorKeyDictionary()
        self.modules = []

    @contextmanager
    def following_modules(self):
        "Know which module runs."
        def enter(module, args): self.modules.append(module)
        def leave(module, args, out): self.modules.pop()
        handles = [hooks.register_module_forward_pre_hook(enter), hooks.register_module_forward_hook(leave)]
        try: yield
        finally:
            for handle in handles: handle.remove()

    def axes_of(self, tensor):
        "Return what is known of a tensor; one that nobody has made is of the model's own, and stays."
        if id(tensor) in self.owned:
            self.found.ran.add(self.names[id(tensor)])
            return self.owned[id(tensor)]
        if tensor not in self.axes: self.axes[tensor] = _constant(plain(tensor.shape, True), tensor)
        return self.axes[tensor]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        schema = func._schema
        given = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        given |= {a.name: value for a, value in zip(schema.arguments, args)} | kwargs
        name = schema.name.split('::')[1]
        changes = schema.is_mutable and name.endswith('_')
        taken = [t for t in tree_leaves(given) if isinstance(t, torch.Tensor)]
        before = [self.axes_of(t) for t in taken]
        call = Call(func, name.removesuffix('_'), given, self.axes_of, self.labels, self._resize)
        if changes: call = replace(call, shape=tuple(args[0].shape))
        if changes: known = follow(call)
        out = func(*args, **kwargs)
        results = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if not changes and results: known = follow(replace(call, shape=tuple(results[0].shape)))
        if not results: return out
        self._note_maker(call)
        for i, t in enumerate(results):
            if id(t) in self.owned: continue
            fits = i < len(known) and known[i].shape == tuple(t.shape)
            x = known[i] if fits else plain(t.shape)
            if x.constant and not any(_memory(t) == _memory(b) for b in taken): x = _constant(x, t)
            initial = x.constant and bool(x.zero.all()) and any(b.initial for b in before)
            self.axes[t] = replace(x, initial=initial)
        for t in _written(schema, args, kwargs): self._forget_aliases(t, changes and t is args[0])
        return out

    def _resize(self, number, rows):
        if self.modules and rows.any(): self.found.resizes.append((self.modules[-1], int(number), rows))

    def _note_maker(self, call):
        "Note which axes of parameters are the outputs of a layer."
        if call.name == 'convolution': axis, x = int(call['transposed']), call.axes('weight')
        elif call.name in ('addmm', 'mm'): axis, x = -1, call.axes('mat2')
        elif call.name == 'embedding': axis, x = 1, call.axes('weight')
        else: return
        rows = x.rows[axis]
        if rows.shape[1] == 1 and len(rows): self.found.makers.add(int(rows[0, 0]))

    def _forget_aliases(self, tensor, is_known):
        "Know nothing more of the zeros of tensors that share memory with one that was changed."
        memory = _memory(tensor)
        for t in [t for t in self.axes.keys() if _memory(t) == memory]:
            if is_known and (t is tensor or _apart(t, tensor)): continue
            self.axes[t] = _unknown(self.axes[t])
        for i in self.memory.get(memory, ()): self.owned[i] = _unknown(self.owned[i])


def _unknown(x): return replace(x, zero=nothing(len(x.shape)), constant=False, initial=False)


def _written(schema, args, kwargs):
    "Return the tensors that a call changes."
    given = {a.name: value for a, value in zip(schema.arguments, args)} | kwargs
    changed = [given.get(a.name) for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    return [t for t in tree_leaves(changed) if isinstance(t, torch.Tensor)]


def _apart(a, b):
    "Tell whether two views of one memory have no entry in common, as the parts of a split."
    size = max(_last(a), _last(b)) + 1
    if size > MOST: return False
    places = torch.zeros(size, dtype=torch.bool)
    places.as_strided(a.shape, a.stride(), a.storage_offset()).fill_(True)
    return not places.as_strided(b.shape, b.stride(), b.storage_offset()).any()


def _last(t): return t.storage_offset() + sum((n - 1) * step for n, step in zip(t.shape, t.stride()))


def _memory(tensor): return tensor.untyped_storage().data_ptr()


def _constant(x, tensor):
    "Return a constant with all its zeros."
    if tensor.numel() > LARGEST: return x
    return replace(x, zero=narrow_down((tensor == 0).detach().cpu().numpy(), LARGEST))
