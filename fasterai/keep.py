"Keep the zeros of a network zero in fastai's training loop."
from collections.abc import Mapping
from dataclasses import replace

from fastai.callback.core import Callback as FastaiCallback
from fastai.callback.training import GradientClip
from fastai.learner import SkipToEpoch
from fastai.text.models.awdlstm import WeightDropout

from fasterai.arguments import known_arguments
from fasterai.granularity import add_layer_type
from fasterai.layers import choose
from fasterai.names import Named, bare
from fasterai.rules import Rules
from fasterai.sparsifier import Sparsifier

add_layer_type(WeightDropout, **{'weight_*_raw': 'O I'})  # fastai's AWD_LSTM makes the weights that it drops from these


class KeepSparse(FastaiCallback):
    """Keep the zeros of a network zero in a fit.

    `SparsifyCallback` leaves one with the Learner, which keeps its masks in every later fit, by the names of
    the layers. `learn.remove_cb(KeepSparse)` lets the next fit move the zeros."""
    order = GradientClip.order - .4  # by then MixedPrecision has unscaled the gradients, and nothing has clipped them
    _stateattrs = ('_sparsifier',)  # it is not exported with the Learner: the zeros are in the weights
    prunes, active, begun = False, False, False  # whether it makes events, does anything in this fit, and had a batch
    _sparsifier, own_masks = None, {}  # {name of a layer: mask}
    handed = 0  # the number of the fit whose masks it keeps, 1 for the first; 0: none

    @known_arguments
    def __init__(self,
        granularity: str | tuple = 'weight',  # at filter granularity the BatchNorm of a pruned filter is kept zero too
        layers=None,  # None for all but embeddings; else as in `Sparsifier`
        exclude=None,  # layers that take no part, in the same forms
        masks: Mapping | None = None,  # masks of one's own: {name of a layer: bool, of the weight's shape, True = keep}; None: the zeros that are there
    ):
        self.rules = Rules(granularity, layers=layers, exclude=exclude, keep_zeros=masks is None)
        if masks is not None and not isinstance(masks, Mapping):
            raise TypeError(f'masks: got {type(masks).__name__}, expected {{name of a layer: bool tensor}}')
        self.own_masks = masks or {}

    @property
    def sparsifier(self) -> Sparsifier:
        "Return the Sparsifier of the last fit."
        if self._sparsifier is None: raise ValueError('sparsifier: there is none before the first fit')
        return self._sparsifier

    # When

    def before_fit(self):
        if self._only_validates(): return
        layers = self._layers_to_keep()
        self.active = bool(layers) and not hasattr(self.learn, 'lr_finder')
        if not self.active: return
        keep_zeros = self.rules.keep_zeros and not self._has_masks() or self._goes_on_from_a_file()
        self._build(replace(self.rules, layers=layers, exclude=None, keep_zeros=keep_zeros))
        self._end_behind_all()

    def before_batch(self):
        "Mask the weights with the first batch, with which the data flow is found."
        if not self.active or not self.training or self.begun: return
        self.begun = True
        self.sparsifier.apply_masks()

    def before_step(self):
        if not self.active: return
        self.sparsifier.evidence.step()  # from gradients as they are, before any is masked
        self._prune()
        if not self.state_masked: self._mask_optimizer_state()
        self.sparsifier.mask_gradients()

    def after_step(self):
        if self.active: self.sparsifier.apply_masks()

    def after_train(self):
        "Mask again: another callback may have moved weights, and they are validated and saved next."
        if self.active: self.sparsifier.apply_masks()

    def _end(self):
        "Mask once more, when all other callbacks are done: they may have put other weights in place."
        if not self.active: return
        if self._model() is not self.sparsifier.model: self._follow_model()
        self.sparsifier.apply_masks()

    def _end_behind_all(self):
        "Have `_end` called after the fit, behind all other callbacks."
        last = [cb for cb in self.learn.cbs if isinstance(cb, AfterAll)]
        for cb in last:
            if cb.owner not in self.learn.cbs: self.learn.remove_cb(cb)  # it is of a fit that broke off
        if not any(cb.owner is self for cb in last): self.learn.add_cb(AfterAll(self))

    def _prune(self): "Make an event. This callback only keeps zeros, and makes none."

    # What

    def _only_validates(self):
        "Tell whether this is `validate` or `get_preds`, perhaps in the middle of a fit. They hold the lock."
        return self.learn.lock.locked()

    def _model(self): return bare(self.learn.model)

    def _layers_to_keep(self):
        "Return the weights of layers that no `SparsifyCallback` has."
        pruning = [cb for cb in self.learn.cbs if isinstance(cb, KeepSparse) and cb.prunes and cb.active]
        taken = {layer.at for cb in pruning for layer in cb.sparsifier.selected.candidates.values()}
        return [weight for weight in self._weights() if weight not in taken]

    def _weights(self):
        "Return the weights that are meant."
        if self._has_masks(): return list(self.sparsifier.selected.found_in(self._model()).values())
        if self.handed:  # it was copied or exported with the Learner, without its masks
            every = Named(self._model()).every
            return [every[name] for name in self.rules.layers if name in every]
        return list(choose(self._model(), self.rules.layers, self.rules.exclude).chosen.values())

    def _has_masks(self): return bool(self.handed) and self._sparsifier is not None

    def _goes_on_from_a_file(self):
        "Tell whether the fit is resumed, by `start_epoch`: then the zeros that are there were pruned before."
        return any(isinstance(cb, SkipToEpoch) and cb._skip_to > 0 for cb in self.learn.cbs)

    def _build(self, rules):
        "Make the Sparsifier. It begins with the masks that earlier fits have left, and those of the user."
        held = self._held()
        self._sparsifier = Sparsifier(self._model(), **rules.given, example=self._batch)
        self.state_masked, self.begun = False, False
        self.sparsifier.masks.begin_with(held, self.own_masks)

    def _held(self):
        "Return the masks that callbacks of earlier fits left with the Learner: {weight: mask}."
        held, keepers = {}, [cb for cb in self.learn.cbs if isinstance(cb, KeepSparse) and cb._has_masks()]
        for fit in sorted({cb.handed for cb in keepers}):
            of_one_fit = {}
            for cb in [cb for cb in keepers if cb.handed == fit]:
                for weight, keep in cb.sparsifier.masks.found_in(self._model()).items():
                    of_one_fit[weight] = of_one_fit[weight] & keep if weight in of_one_fit else keep
            held |= of_one_fit  # a later fit may have let weights come back
        return held

    def _follow_model(self):
        "Go over to the model that is in the Learner now, with the masks of the one before."
        held = self.sparsifier.masks.found_in(self._model(), where_zero=False)
        rules = replace(self.sparsifier.rules, layers=list(held), exclude=None)
        self._sparsifier = Sparsifier(self._model(), **rules.given, example=self._batch)
        self.sparsifier.masks.begin_with(held)

    def _batch(self):
        "Return the inputs that are in the loop, None before the first."
        batch = getattr(self.learn, 'xb', (None,))
        return None if batch[0] is None else tuple(batch)  # a DataLoader of torch gives a list

    def _mask_optimizer_state(self):
        "Mask the optimizer's state. fastai's Lookahead and OptimWrapper hold another optimizer inside."
        opt, self.state_masked = self.learn.opt, True
        self.sparsifier.mask_optimizer_state(getattr(opt, 'opt', opt).state)
        for slow, fast in zip(getattr(opt, 'slow_weights', None) or [], opt.param_lists):
            self.sparsifier.mask_optimizer_state({p: {'slow': s} for p, s in zip(fast, slow)})


class AfterAll(FastaiCallback):
    "Call the `_end` of another callback after a fit, when all others are done."
    order = 1 << 30

    def __init__(self, owner): self.owner = owner

    def after_fit(self):
        if self.learn.lock.locked(): return
        if self.owner in self.learn.cbs: self.owner._end()
        self.learn.remove_cb(self)
