"Keep the zeros of a network zero in fastai's training loop."
from collections.abc import Mapping
from dataclasses import replace

from fastai.callback.core import Callback
from fastai.callback.training import GradientClip
from fastai.learner import SkipToEpoch
from fastai.text.models.awdlstm import WeightDropout

from fasterai.arguments import known_arguments
from fasterai.epochs import drop_columns
from fasterai.granularity import add_layer_type
from fasterai.held import Held, both, own_masks
from fasterai.layers import choose
from fasterai.masks import nonzero
from fasterai.names import bare
from fasterai.rules import Rules
from fasterai.shards import refuse_shards
from fasterai.sparsifier import Sparsifier

add_layer_type(WeightDropout, **{'weight_*_raw': 'O I'})  # fastai's AWD_LSTM makes the weights that it drops from these


class Keeper(Callback):
    """Keep masked weights zero in a fit: a Sparsifier does it, and this says when.

    `KeepSparse` only keeps, `SparsifyCallback` makes events, too."""
    order = GradientClip.order - .4  # by then MixedPrecision has unscaled the gradients, and nothing has clipped them
    _stateattrs = ('_sparsifier',)  # it is not exported with the Learner
    active, begun, _sparsifier = False, False, None  # whether it does anything in this fit, and had a batch

    @property
    def sparsifier(self) -> Sparsifier:
        "Return the Sparsifier of the last fit."
        if self._sparsifier is None: raise ValueError('sparsifier: there is none before the first fit')
        return self._sparsifier

    # When

    def before_batch(self):
        "Mask the weights with the first batch, with which the data flow is found."
        if not self.active or not self.training: return
        self._follow_model()
        if self.begun: return
        self.begun = True
        self.sparsifier.compare_masks(self.learn.model)  # with the first batch it is in its wrapper
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

    def before_validate(self):
        "Let `validate` see no column of a fit that did not begin."
        if self._only_validates(): drop_columns(self.learn)

    def end(self):
        "Mask once more behind all other callbacks: they may have put other weights, or a model, in place."
        if not self.active: return
        self._follow_model()
        if self.sparsifier.selected.candidates: self.sparsifier.apply_masks()

    def _prune(self): "Make an event. A callback that only keeps zeros makes none."

    def _only_validates(self):
        "Tell whether this is `validate` or `get_preds`, perhaps in the middle of a fit. They hold the lock."
        return self.learn.lock.locked()

    # What

    def _model(self): return bare(self.learn.model)

    def _build(self, rules, **more):
        "Make the Sparsifier, with the masks that others hold at the start of this fit."
        refuse_shards(self._model(), type(self).__name__)
        held = {}
        for keeper in self._others(KeepSparse):
            if not keeper.left: held = both(held, keeper.masks_for(self._model()))
        held = both(held, self._left_masks())
        if self._resumes_at(): rules = replace(rules, keep_zeros=True)
        self._sparsifier = Sparsifier(self._model(), **rules.given, **more, example=self._batch)
        self.sparsifier.masks.begin_with(held)
        self.state_masked, self.begun = False, False
        self._call_end_last()

    def _left_masks(self):
        """Return the masks that `SparsifyCallback`s have left with the Learner: {weight: mask}.

        Those of one fit hold together; a later fit may have let weights come back."""
        held, left = {}, [cb for cb in self.learn.cbs if isinstance(cb, KeepSparse) and cb.left]
        for fit in sorted({cb.left for cb in left}):
            of_one_fit = {}
            for cb in left:
                if cb.left == fit: of_one_fit = both(of_one_fit, cb.masks_for(self._model()))
            held |= of_one_fit
        return held

    def _resumes_at(self):
        "Return the `start_epoch` of the fit: above 0 the zeros that are there were pruned before."
        return max((cb._skip_to for cb in self.learn.cbs if isinstance(cb, SkipToEpoch)), default=0)

    def _follow_model(self):
        "Go over to another model, if a callback has put one in the Learner's place."
        if self._model() is self.sparsifier.model: return
        self.sparsifier.move_to(self._model(), self._batch)
        self.sparsifier.compare_masks(self.learn.model)
        self.state_masked = False

    def _others(self, kind): return [cb for cb in self.learn.cbs if isinstance(cb, kind) and cb is not self]

    def _call_end_last(self):
        "Have `end` called after the fit, behind all other callbacks."
        last = [cb for cb in self.learn.cbs if isinstance(cb, AfterAll)]
        for cb in last:
            if cb.owner not in self.learn.cbs: self.learn.remove_cb(cb)  # it is of a fit that broke off
        if not any(cb.owner is self for cb in last): self.learn.add_cb(AfterAll(self))

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


class KeepSparse(Keeper):
    """Keep the zeros of a network zero in a fit, `cbs=KeepSparse()`.

    `learn.add_cb(KeepSparse())` does so in all fits. `SparsifyCallback` leaves one with the Learner, which
    keeps its masks in every later fit, by the names of the layers. `learn.remove_cb(KeepSparse)` lets the
    next fit move the zeros."""
    left, held = 0, None  # the number of the fit that has left it, 0: the user made it; the `Held` masks of that fit

    @known_arguments
    def __init__(self,
        granularity: str | tuple = 'weight',  # at filter granularity the BatchNorm of a pruned filter is kept zero too
        layers=None,  # None for all but embeddings; else as in `Sparsifier`
        exclude=None,  # layers that take no part, in the same forms
        masks: Mapping | None = None,  # masks of one's own: {name of a layer: bool, of the weight's shape, True = keep}; None: the zeros that are there
    ):
        self.rules = Rules(granularity, layers=layers, exclude=exclude)
        if masks is not None and not isinstance(masks, Mapping):
            raise TypeError(f'masks: got {type(masks).__name__}, expected {{name of a layer: bool tensor}}')
        self.own_masks = masks

    def before_fit(self):
        if self.learn is None: return  # another callback has taken its place in this very event
        if self._only_validates(): return
        pruning = [cb for cb in self._others(Keeper) if cb.active and not isinstance(cb, KeepSparse)]
        drop_columns(self.learn, spare=pruning)
        taken = {layer.at for cb in pruning for layer in cb.sparsifier.selected.candidates.values()}
        masks = self.masks_for(self._model())
        masks = {weight: keep for weight, keep in masks.items() if weight not in taken}
        self.active = bool(masks) and not hasattr(self.learn, 'lr_finder')
        if not self.active: return
        self._build(replace(self.rules, layers=list(masks), exclude=None))
        if self.left: self.held = Held(self.sparsifier.masks)
        else: self.sparsifier.masks.begin_with(masks)

    def masks_for(self,
        model,
    ) -> dict:  # `Weight` in the model: bool, of its shape, True = keep
        "Return the masks that it holds from the beginning of a fit."
        if self.left: return self.held.found_in(model)
        weights = choose(model, self.rules.layers, self.rules.exclude).chosen
        if self.own_masks is None: return {weight: nonzero(weight.tensor) for weight in weights.values()}
        return own_masks(self.own_masks, weights)

    def leave(self,
        masks,  # `Masks` of a Sparsifier that prunes; they may change later
        fit: int,  # its number
    ):
        "Hold these masks in later fits."
        self.held, self.left = Held(masks), fit


class AfterAll(Callback):
    "Call the `end` of a `Keeper` after a fit, when all other callbacks are done."
    order = 1 << 30

    def __init__(self, owner): self.owner = owner

    def after_fit(self):
        if self.learn.lock.locked(): return
        if self.owner in self.learn.cbs: self.owner.end()
        self.learn.remove_cb(self)
