"Prune any PyTorch model: zero its least important weights, and keep them zero."
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from html import escape

import torch
from torch import nn

from fasterai.allocation import entries, fractions
from fasterai.arguments import flag, known_arguments, method_hint, nearest, percent, whole
from fasterai.attached import Attached
from fasterai.calibration import Calibration
from fasterai.data import check_batches
from fasterai.event import Budget, Change, decide
from fasterai.evidence import Evidence
from fasterai.kinds import EVIDENCE
from fasterai.masks import Masks
from fasterai.names import Named, bare
from fasterai.parts import EvidenceOfParts, check, cut, seen
from fasterai.peers import ALONE, digest, peers_of
from fasterai.progress import progress
from fasterai.repair import read_repairs
from fasterai.repairing import Repairs, repairs_of
from fasterai.report import Report, measure, zeros_in
from fasterai.rounds import in_rounds
from fasterai.rules import Rules, as_arguments, takes_rules
from fasterai.schedule import Time, check_initial, read_share
from fasterai.selected import Selected
from fasterai.snapshot import Snapshot

TRAINING = '.training'  # in a state, beside the layers: the name of none ends or begins with a dot


class Sparsifier:
    """Prune a model, structured or unstructured: score its weights, zero the least important, keep them zero.

    The model stays an ordinary one: the same classes, parameters, `state_dict` keys and hooks. What is zero
    already may learn until it is pruned, or is held with `keep_zeros=True`. A wrong argument raises
    `TypeError` or `ValueError`, which names it."""

    @takes_rules
    def __init__(self,
        model: nn.Module,  # any model; it is changed in place, and only in its zeros
        granularity: str | tuple | Callable = 'weight',  # which weights are pruned as one: a name, axes as `('I', 'kh')`, `block(4, 4)`, `head(8)`
        context: str | Callable = 'global',  # who competes with whom (the scope): a name, an N:M pattern as `'2:4'`, or a function
        criteria: str | Callable = 'magnitude',  # the importance of a weight: a name, or a function of `weight` and `grad`
        layers=None,  # a type, name, glob, module, parameter, or a list of these; None: all but embeddings
        example=None,  # a batch as the model takes it: a tuple for several inputs, a dict for keywords; or a function that returns one when needed
        data=None,  # batches for evidence and `repair`: a DataLoader, fastai's DataLoaders, an iterable of batches, or a tensor
        loss_func: Callable | None = None,  # of output and label, for criteria that need gradients of `data`; no other use of labels is made
        repair=None,  # what each event repairs by the data: 'refit', 'batchnorm', a function of model, dense and data, or a list of these
        **kwargs,  # the other rules, as in `Rules`
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f'model: got {type(model).__name__}, expected a torch.nn.Module')
        self.model, self.rules = model, Rules(granularity, context, criteria, layers, **kwargs)
        if isinstance(data, Iterator): data = list(data)  # it is read several times
        _check_data(self.rules, repair, data, loss_func)
        self.repairs = Repairs(repairs_of(self.rules, repair), data)
        self._attached, self._progress = [], None  # `Attached` optimizers, and how far a training was that a state is of
        self._in_event = False
        self.peers = peers_of(model)  # the processes with which events are agreed upon
        if self.peers.splits: check(self.rules, {'example': example, 'data': data, 'repair': repair})
        self._of_parts.agreed(lambda: self._build(data, loss_func, example))

    def _build(self, data, loss_func, example):
        self.selected = Selected(self.model, self.rules, example)
        self.masks = Masks(self.selected, self.rules.keep_zeros, self._of_parts)
        if self.peers.splits:
            self.evidence = EvidenceOfParts(self.rules.evidence, self.selected, self.peers)
            return
        calibration = Calibration(bare(self.model), data, loss_func, example)
        self.evidence = Evidence(self.rules.evidence, self.selected, calibration)

    @property
    def _of_parts(self):
        "Return the processes each of which has a part of the model; this one alone where each has all."
        return self.peers if self.peers.splits else ALONE

    def __repr__(self):
        given = as_arguments(self.rules.given)
        return f'Sparsifier(model, {given})' if given else 'Sparsifier(model)'

    def _repr_html_(self): return f'<div>{escape(repr(self))}</div>{self.report()._repr_html_()}'

    def to_frame(self):
        "Return the report as a pandas DataFrame with one row for each selected layer."
        return self.report().to_frame()

    def plot(self,
        ax=None,  # matplotlib axes to draw on; new ones if None
    ):
        "Draw the sparsity of each layer in percent, that of all as a dashed line; return the axes."
        return self.report().plot(ax)

    def __getattr__(self, name):  # called where an attribute is not found, or a property raises AttributeError
        if hasattr(type(self), name): return object.__getattribute__(self, name)  # the property's own error
        raise AttributeError(f'{type(self).__name__} has no {name!r}{method_hint(name, dir(type(self)))}')

    def __getstate__(self):  # neither an attached optimizer goes along nor other processes
        if self.peers.splits:
            raise TypeError('copy: got a Sparsifier of a model that is split over processes, '
                            'expected one of a whole model; save its state_dict()')
        return self.__dict__ | {'_attached': [], 'peers': ALONE}

    @property
    def layers(self) -> dict:  # name: `selected.Layer`, with its `weight`, `module` and `grouping`
        "Return the selected layers."
        return self.selected.layers

    @property
    def skipped(self) -> dict:  # name: reason
        "Return the layers that were left out, and why."
        return self.selected.skipped

    # Pruning

    def sparsify_model(self,
        sparsity,  # percent of the selected weights that shall be zero; or {name, glob, type or module: percent}, whose layers compete among themselves
        share: float = 1.,  # how much of that sparsity is wanted now, 0 to 1, as a schedule returns it
        regrow: bool = False,  # let weights come back, from zero, where the sparsity falls
        initial: float = 0.,  # the sparsity that a share of 0 stands for, percent, 0 to 100: each goes from it to its own
        rounds: int | None = None,  # in how many steps of rising sparsity, each with evidence and repair anew; None: one, or what the criterion needs
        swap: float = 0.,  # share of the weights of each layer that live to be exchanged for others, 0 to 1: the lowest go, and as many come back, from zero, by `regrow=` of the Sparsifier
    ) -> Change:  # its `masks`, and which weights `died` or were `born`
        """Prune the model to a sparsity: zero the least important weights until it is reached.

        Weights that are zero already count, and are the first to be pruned. Pruned ones stay zero without
        `regrow` or `swap`. Each round keeps the same share of what is left. An error leaves the model as it
        was."""
        return self._prune(lambda: self._asked(sparsity, share, regrow, initial, rounds, swap))

    def _asked(self, sparsity, share, regrow, initial, rounds, swap):
        "Read what `sparsify_model` is asked for."
        share, regrow, begin = read_share(share), flag('regrow', regrow), percent(initial, 'initial')
        swap = read_share(swap, 'swap')
        if rounds is not None: whole('rounds', rounds)
        if rounds not in (None, 1): self._refuse_shards('rounds', rounds)
        if (regrow or swap) and rounds not in (None, 1):
            moves = 'regrow=True' if regrow else f'swap={float(swap):.4g}'
            raise ValueError(f'rounds: got {rounds!r} with {moves}, expected None or 1')
        self.selected.refresh()
        wanted = entries(sparsity, self.rules, self.selected)
        check_initial(initial, [fraction for _, fraction in wanted], f'initial: got {initial!r}')
        return self._budgets(wanted, share, begin), regrow, rounds, swap

    def sparsify_layer(self,
        layer,  # a selected layer: its name, module or parameter; each weight within it to the same sparsity
        sparsity: float,  # percent of its weights that shall be zero
    ) -> Change:  # its `masks`, and which weights `died`
        """Prune one layer to a sparsity, whatever the others have.

        Weights that are zero already count, and are the first to be pruned. A frozen layer is pruned, too."""
        return self._prune(lambda: (self._asked_of(layer, sparsity), False, None, Fraction(0)))

    def _asked_of(self, layer, sparsity):
        "Read what `sparsify_layer` is asked for."
        if not isinstance(layer, Hashable):
            raise TypeError(f'layer: got {layer!r}, expected the name of a layer, a module or a parameter')
        self.selected.refresh()
        if isinstance(layer, str) and layer not in {*Named(self.model).modules, *self.layers}:
            raise ValueError(f'layer: got {layer!r}, '
                             f'expected one of {", ".join(self.layers)}{nearest(layer, self.layers)}')
        wanted = fractions({layer: sparsity}, self.rules, self.selected, 'layer')
        each = [([name], fraction) for name, fraction in wanted.items()]
        return self._budgets(each, Fraction(1))

    def _budgets(self, entries, share, initial=Fraction(0)):
        """Return a budget for each entry; what is pruned as one goes into the first entry that has a part
        of it."""
        wanted = {name: fraction for names, fraction in entries for name in names}
        budgets, done = [], set()
        for names, fraction in entries:
            together = dict.fromkeys(other for name in names for other in self._tied_alike(name, wanted))
            tied = self.selected.tied([name for name in together if name not in done])
            done.update(together)
            if tied: budgets.append(Budget(tied, fraction, share, initial))
        return budgets

    def _tied_alike(self, name, wanted):
        """Return what is pruned as one with a layer; `ValueError` where another sparsity is wanted of a
        part of it."""
        tied = self.selected.tied_to(name)
        if all(wanted.get(other) == wanted[name] for other in tied): return tied
        raise ValueError(f'sparsity: got one for {name!r} alone, expected the same for all of '
                         f'{", ".join(map(repr, tied))}, which coupled=True prunes together')

    def _prune(self, asked):
        """Prune in one event or in rounds, all or nothing, and say what is worth a warning.

        `asked` returns the budgets, and whether weights come back, in how many rounds, how many are
        exchanged."""
        if self._in_event:
            raise ValueError('sparsity: asked for within an event of the same Sparsifier, by its criterion, '
                             'context or regrowth; expected after it')
        with self.peers.alike():
            budgets, regrow, rounds, swap = self.peers.agreed(asked)
            if self.rules.needs_data or self.repairs: self.peers.share_buffers()
            if regrow or swap: rounds = 1
            steps = in_rounds(budgets, rounds, self.rules.criterion.round_keeps)
            change = self._event(budgets, regrow, swap) if len(steps) == 1 else self._rounds(steps)
        _warn_waiting(change)
        _warn_nearly_empty(budgets, change)
        _warn_floor(self.rules, budgets, change)
        return change

    def _rounds(self, steps):
        "Make an event for each round; where one fails none has been."
        snapshot, masks, states = Snapshot(self.model), self.masks.of, dict(self.evidence.states)
        try:
            with _each_warning_once(): changes = [self._event(budgets) for budgets in progress(steps)]
        except BaseException:
            self.masks.put_back(masks)
            snapshot.restore()
            self.evidence.states = states
            raise
        repaired = tuple(one for change in changes for one in change.repaired)
        before, after = changes[0].before, {}
        for change in changes:  # a layer may wait in some of them
            before = change.before | before
            after |= change.after
        waiting = changes[-1].waiting
        return Change(before, after, waiting, changes[-1].weights, repaired)

    def _event(self, budgets, regrow=False, swap=Fraction(0)):
        "Decide, and change the model: both, or, where something fails, nothing."
        self._in_event = True
        try:
            change = self.peers.agreed(lambda: self._decided(budgets, regrow, swap),
                                       lambda change: self._digests(change.after, change.weights), 'masks')
        finally: self._in_event = False
        if self.peers.splits: change = cut(self.peers, change, self.selected.candidates)
        change = self._apply(change)
        self.evidence.end(change.after)
        return change

    def _decided(self, budgets, regrow, swap):
        "Return the change that an event makes."
        layers = [layer for budget in budgets for layer in budget.layers]
        needed = self.rules.evidence if regrow or swap else self.rules.criterion.evidence
        masks = self.masks.of
        moves = bool(regrow or swap)
        if self.peers.splits: budgets, masks = seen(self.peers, self.rules, budgets, masks, moves)
        with self.evidence.gathered(layers, needed, self.peers):
            change = decide(self.rules, budgets, masks, self.evidence, regrow, swap)
            return self._adjusted(change, layers)

    def _digests(self, masks, weights):
        "Return a digest of what is here of each layer's mask and new weights, after an event."
        after = self.masks.of | masks
        return {_name_here(name, mask): digest(mask.keep, weights.get(name)) for name, mask in after.items()}

    def _adjusted(self, change, layers):
        "Return the change with what the criterion makes of the weights that stay."
        adjust = self.rules.criterion.adjust
        if adjust is None or not any(died.any() for died in change.died.values()): return change
        layers = [layer for layer in layers if layer.name in change.after]
        return replace(change, weights=adjust(layers, change.masks, self.evidence.calibration))

    def _apply(self, change):
        "Change the masks and repair the network: both, or, where a repair fails, nothing."
        if not self.repairs:
            self.masks.apply(change)
            return change
        snapshot, masks, model = Snapshot(self.model), self.masks.of, bare(self.model)

        def repair():
            self.masks.apply(change)
            return self.repairs.run(model)

        def digests(_): return {name: digest(p) for name, p in model.named_parameters()}
        try:
            with self.repairs.of(model): repaired = self.peers.agreed(repair, digests, 'repaired values')
        except BaseException:
            self.masks.put_back(masks)
            snapshot.restore()
            raise
        self.masks.mask_weights()  # a repair may have moved what is masked along
        return replace(change, repaired=repaired)

    # Keeping

    def _agree(self, check):
        "Check something, and that all processes that hold the model hold the same zeros."
        self.peers.agreed(check, lambda _: self._digests({}, {}), 'masks')

    def compare_masks(self,
        model: nn.Module,  # the model, perhaps in another wrapper than before
    ):
        """Compare the masks with those of the other ranks, where a model is in DistributedDataParallel.

        Later events are agreed upon with them, too. `RuntimeError`, and nothing changed, where they
        differ."""
        if not self.peers.splits: self.peers = peers_of(model)
        self._agree(self.selected.refresh)

    def apply_masks(self):
        "Zero the masked weights again, after something has moved them."
        self.repairs.trained()
        self.masks.mask_weights()

    def mask_gradients(self):
        "Zero the gradients of masked weights, so that neither gradient clipping nor the optimizer sees them."
        self.masks.mask_gradients()

    def mask_optimizer_state(self,
        state: Mapping,  # parameter: {name: tensor or anything}, as `optimizer.state`
    ):
        """Zero an optimizer's momentum, second moments and the like for masked weights: each tensor of the
        weight's shape."""
        if not isinstance(state, Mapping):
            raise TypeError(f'state: got {type(state).__name__}, '
                            'expected the state of an optimizer, as optimizer.state')
        self.masks.mask_state(state)

    def rewind(self,
        snapshot: Snapshot,  # `Snapshot(model, optimizer)`, taken earlier
        optimizer=None,  # gets back the state that the snapshot holds; None: the one it was taken of, where the model has the same tensors
    ):
        """Put all values back to those of a snapshot; what is pruned stays zero (rewinding; Frankle 2020).

        The masks stay those of the Sparsifier: a weight that is zero in the snapshot learns, where it is not
        pruned. What training has gathered for the criterion begins anew. `TypeError` where it is no snapshot;
        `ValueError`, and nothing changed, where names or shapes of the model are others."""
        if not isinstance(snapshot, Snapshot):
            raise TypeError(f'snapshot: got {type(snapshot).__name__}, expected Snapshot(model, optimizer)')
        self._refuse_shards('snapshot', 'one')
        self.selected.refresh()
        model = self.model if snapshot.fits(self.model) else bare(self.model)
        states = snapshot.write_into(model, optimizer)
        self.apply_masks()
        for state in states: self.masks.mask_state(state)
        self.evidence.load({})

    @known_arguments
    def attach(self,
        optimizer: torch.optim.Optimizer,  # the one that steps the model in your own loop, what wraps one, or a list; of several the first one's steps are counted
        sparsity=None,  # prune while it steps to this, as in `sparsify_model`; None: only keep what is zero
        schedule: str | Callable = 'gradual',  # how much, and when: a name, `gradual(start=.2, end=.8)` and its like, or a function of progress
        steps: int | None = None,  # with `sparsity`, of the whole training: how often the optimizer steps; accumulated batches are one step, a step that GradScaler skips is none
        steps_per_epoch: int | None = None,  # for a schedule with `epochs(n)`
        rewind_to: float | Time | None = None,  # after the last event all weights that are left, and the optimizer's state, go back to this time, as in `SparsifyCallback`
        distil=None,  # share of the loss, 0 to 1, that comes from the network as it was before the first event, or `distillation(...)`; the loop makes its loss by `Attached.loss`
        recipe: str | None = None,  # other defaults for `schedule` and `distil`, as in `SparsifyCallback`
    ) -> Attached:  # a context manager, which lets go of the optimizer at its end
        """Keep masked weights zero at every step of an optimizer, until `detach`, and prune by a schedule.

        Each attached optimizer masks the parameters that it steps. An event is made within `step()`, when the
        gradients are there and unscaled. `repair=` of the Sparsifier repairs the last one. `state_dict` has
        the progress. `TypeError` where it is no optimizer and has none inside, `ValueError` where it steps
        none of the selected weights, or, with `sparsity`, not all of them."""
        attached, others = Attached(self, optimizer), self._attached
        given = {'schedule': schedule, 'steps': steps, 'steps_per_epoch': steps_per_epoch,
                 'rewind_to': rewind_to, 'distil': distil, 'recipe': recipe}

        def check():
            attached.check(others)
            if sparsity is not None: attached.drive(others, sparsity, **given)
            else: _check_only_kept(given)
            if rewind_to is not None: self._refuse_shards('rewind_to', rewind_to)
            if attached.teacher.choice is not None: self._refuse_shards('distil', attached.teacher.choice)
        self._agree(check)
        if attached.driver is not None: self._go_on(attached, self._progress)
        attached.begin()
        self._attached = [*others, attached]
        return attached

    def _go_on(self, attached, progress):
        "Go on with a training where a state that was loaded has left it."
        if progress is None: return
        if attached.goes_on(progress): attached.load_state_dict(progress)
        self._progress = None

    def let_go(self,
        attached: Attached,
    ):
        "Forget an attached optimizer."
        self._attached = [one for one in self._attached if one is not attached]

    def move_to(self,
        model: nn.Module,  # a copy, or what wraps it
        example=None,  # as when it was made; needed only at filter granularity
    ):
        """Go over to another model: its layers are found by their names, and have the masks from then on.

        Layers that are not found are named. Call `apply_masks` to zero what is masked."""
        if not isinstance(model, nn.Module):
            raise TypeError(f'model: got {type(model).__name__}, expected a torch.nn.Module')
        self._refuse_shards('model', 'another one')
        self.masks.move_to(model, example)
        self.peers = peers_of(model)
        self.model, self.evidence.calibration.model = model, bare(model)
        if example is not None: self.evidence.calibration.example = example

    def _refuse_shards(self, argument, came):
        if not self.peers.splits: return
        raise ValueError(f'{argument}: got {came} with a model that is split over processes (fully_shard, '
                         'tensor parallel), expected a model that is whole in each')

    def detach(self):
        "Let go of all attached optimizers. Their next step may move the zeros."
        for attached in self._attached: attached.detach()

    # Looking, saving

    def _warn_if_moved(self):
        """Say so where an optimizer is attached and its hooks did not run: it may have been stepped in
        another way."""
        moved = self.masks.moved() if self._attached else []
        if not moved: return
        names = ', '.join(map(repr, moved))
        warnings.warn(f'optimizer: masked weights of {names} have moved although an optimizer is attached: '
                      'attach the one whose step() runs, or call apply_masks() after each step', stacklevel=3)

    @property
    def sparsity(self) -> float:
        """Count the zeros: return the percentage of the selected weights that are zero now.

        Where each process has a part of the model, all have to ask."""
        self._warn_if_moved()
        weights = [layer.weight for layer in self.layers.values()]
        zeros = sum(self._of_parts.totals([zeros_in(weight, self._of_parts) for weight in weights]))
        return 100 * zeros / sum(weight.numel() for weight in weights)

    def report(self) -> Report:
        "Count the zeros of each layer now. Where each process has a part of the model, all have to ask."
        self._warn_if_moved()
        rows = [(name, layer.at, layer.own) for name, layer in self.layers.items()]
        uses = {name: layer.uses for name, layer in self.layers.items()}
        return measure(self.model, rows, self.skipped, uses, self._of_parts)

    def state_dict(self,
        packed: bool = True,  # masks as bits; False: as bool tensors, and zeros for what is not gathered yet, into which torch.distributed.checkpoint loads what parts have saved
    ) -> dict:  # layer's name: {'shape': of its weight, 'bits': the mask, uint8 (weights / 8 rounded up,), or 'keep': bool, of its shape}
        """Return the masks, packed to bits, and as 'evidence' what training has gathered for the criterion.

        While an attached optimizer prunes by a schedule, '.training' has the progress. Where each process has
        a part, 'keep' has the mask: a bool DTensor, split like the weight."""
        state = self.masks.state_dict(packed)
        self.evidence.add_to(state, complete=not packed)
        for attached in self._driven: state[TRAINING] = attached.state_dict()
        return state

    @property
    def _driven(self): return [attached for attached in self._attached if attached.driver is not None]

    def load_state_dict(self,
        state: dict,  # of `state_dict`
    ):
        """Take over masks and apply them, and what training had gathered for the criterion.

        Where that is missing it begins anew, which a warning says. A training that was under way goes on,
        before or after its optimizer is attached. `TypeError` or `ValueError`, and nothing changed, where a
        state does not fit."""
        progress = state.get(TRAINING) if isinstance(state, Mapping) else None
        if progress is not None: state = {name: of for name, of in state.items() if name != TRAINING}
        masks, states = self._of_parts.agreed(
            lambda: (self.masks.read_state(state), self.evidence.read_from(state)))
        self._progress = progress
        for attached in self._driven: self._go_on(attached, progress)
        self.masks.load(masks)
        self.evidence.load(states)


def _check_only_kept(given):
    "Refuse arguments of `attach` that mean nothing without a sparsity."
    said = {name: value for name, value in given.items() if value is not None and value != 'gradual'}
    if said: raise ValueError(f'sparsity: got None with {as_arguments(said)}, expected percent of zeros')


def _name_here(name, mask):
    "Return a name for what is here of a layer: of one part all ranks that have it hold the same."
    return name if mask.place is None else (name, mask.place.offset, mask.place.sizes)


def _check_data(rules, repair, data, loss_func):
    "Refuse a criterion, or a repair, without the data that it needs."
    given, criterion = f'criteria={rules.criteria!r}', rules.criterion
    if data is not None: check_batches(data)
    kinds = [EVIDENCE[name] for name in rules.evidence]
    needs_loss = any(kind.of_data and kind.of_loss for kind in kinds)
    if loss_func is not None and not callable(loss_func):
        raise TypeError(f'loss_func: got {loss_func!r}, expected a function of output and label')
    if data is None and (criterion.repairs or needs_loss):
        raise ValueError(f'data: got None, expected batches with {given}')
    if data is None and read_repairs(repair):
        raise ValueError(f'data: got None, expected batches with repair={repair!r}')
    if needs_loss and loss_func is None:
        raise ValueError(f'loss_func: got None, expected a function of output and label with {given}, '
                         'which needs gradients')


@contextmanager
def _each_warning_once():
    "Show a warning that several rounds give once."
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        yield
    for one in {str(one.message): one for one in found}.values():
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def _warn_waiting(change):
    if not change.waiting: return
    names = ', '.join(map(repr, sorted(change.waiting)))
    warnings.warn(f'criteria: {names} took no part in the step, or is not seen in the data, so nothing is '
                  'known of it and it waits; the other layers are pruned', stacklevel=4)


def _warn_floor(rules, budgets, change):
    "Say where `min_keep` does not let a sparsity be reached; at 100 % the floor is what is asked for."
    if not rules.floor: return
    for budget in budgets:
        layers = [layer for layer in budget.layers if layer.name in change.after]
        sizes = [(change.after[layer.name].size, layer.uses) for layer in layers]
        total = sum(size * uses for size, uses in sizes)
        most = sum((size - rules.floor_of(size)) * uses for size, uses in sizes)
        in_reach = round(budget.fraction * total) <= most
        if in_reach or budget.share < 1 or budget.target == 1: continue
        asked = float(100 * budget.target)
        warnings.warn(f'sparsity: asked for {asked:.4g} %, but min_keep={rules.min_keep!r} '
                      f'lets at most {100 * most / total:.3g} % be zero', stacklevel=4)


def _warn_nearly_empty(budgets, change):
    "Name the layers that an event took below 1 % of their weights, where less than 99 % was asked for."
    layers = [layer for budget in budgets if budget.fraction < Fraction(99, 100) for layer in budget.layers]
    before, after = change.before, change.after
    names = [layer.name for layer in layers if layer.name in after]
    names = [name for name in names if after[name].nearly_empty and not before[name].nearly_empty]
    if not names: return
    have = 'have' if len(names) > 1 else 'has'
    warnings.warn(f'sparsity: {", ".join(map(repr, names))} {have} less than 1 % of the weights left, '
                  "so little signal passes: see report(); min_keep= sets a floor, "
                  "context='local' or 'erk' shares the zeros out", stacklevel=4)
