"Hold what the user has chosen: one frozen value, read and checked once, printed as one types it."
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cached_property
from math import ceil, prod
from numbers import Integral, Real

from fastcore.meta import delegates

from fasterai.arguments import flag, known_arguments, percent, whole
from fasterai.context import CONTEXTS, Context, ContextInfo, read_context
from fasterai.criteria import Criterion, CriterionInfo, read_criterion
from fasterai.granularity import GRANULARITIES, GranularityInfo, read_granularity
from fasterai.layers import ONE_CHOICE, check_kinds
from fasterai.regrowth import read_regrowth

READ = 'granularity_info', 'context_info', 'criterion', 'regrowth', 'floor'  # when the rules are made


@dataclass(frozen=True, repr=False)
class Rules:
    """Say which weights take part and how they are pruned. The Sparsifier and the callback share it.

    Errors come when it is made: `TypeError` or `ValueError`, naming the argument."""
    granularity: str | tuple | Callable = 'weight'  # a name in `GRANULARITIES`, axes, or a function of axes
    context: str | Context = 'global'  # a name in `CONTEXTS`, an N:M pattern, or a function
    criteria: str | Criterion = 'magnitude'  # a name in `CRITERIA`, or a function of evidence
    layers: object = None  # as `layers.choose` takes it
    min_keep: int | float | None = None  # how many weights of each layer stay at least, or which share, as `.05`; None: one group. A layer with no more weights stays whole
    coupled: bool = False  # with groups of whole filters, as 'filter' and `head(n)`: prune filters together whose outputs are added (residual networks) or multiplied (gates), whole groups of grouped convolutions, and heads of attention, so that they can be removed
    round_to: int | None = None  # at filter granularity: round the number of filters that stay in a layer to the nearest multiple of it, as 8: kernels run best so
    exclude: object = None  # layers that take no part, in the forms of `layers`; the others compete as before
    keep_zeros: bool = False  # hold the zeros that are in the weights already, as of a sparse model that is trained on; False: they may learn until an event prunes them
    regrow: str | Criterion | None = None  # which pruned weights come back first where the sparsity falls, or weights are exchanged: a name, or a function of evidence; None: those of the largest gradient where there is one, else by the criterion. Ties fall at random

    def __post_init__(self):
        for name in ('layers', 'exclude'):
            given = getattr(self, name)
            is_several = isinstance(given, Iterable) and not isinstance(given, (*ONE_CHOICE, Mapping))
            if is_several: object.__setattr__(self, name, list(given))  # a generator gives its items once
            check_kinds(getattr(self, name), name)
        for read in READ: getattr(self, read)
        self._check_groups(self.granularity_info.one_layer, self.granularity_info.several)
        for name in ('coupled', 'keep_zeros'): flag(name, getattr(self, name))
        if self.coupled: self._check_coupled()
        if self.round_to is not None: self._check_one_filter('round_to', whole('round_to', self.round_to))

    @cached_property
    def granularity_info(self) -> GranularityInfo: return read_granularity(self.granularity)

    @cached_property
    def context_info(self) -> ContextInfo: return read_context(self.context)

    @cached_property
    def criterion(self) -> CriterionInfo: return read_criterion(self.criteria)

    @cached_property
    def regrowth(self) -> CriterionInfo | None: return read_regrowth(self.regrow, self.criterion)

    @property
    def evidence(self) -> tuple:  # names in `EVIDENCE`
        "Return what must be known of the layers."
        if self.regrowth is None: return self.criterion.evidence
        return tuple(dict.fromkeys(self.criterion.evidence + self.regrowth.evidence))

    @property
    def needs_data(self) -> bool:
        "Tell whether it takes more than the weights and the steps of a training."
        return self.criterion.needs_data or self.regrowth is not None and self.regrowth.needs_data

    @cached_property
    def floor(self) -> int | Fraction | None:  # number of weights, or share of a layer's
        "Return how many weights of each layer stay at least."
        given = self.min_keep
        if given is None: return None
        if not _is_floor(given):
            raise ValueError(f'min_keep: got {given!r}, '
                             'expected a whole number of weights, or a share between 0 and 1, as .05')
        if not self.context_info.has_floor:
            raise ValueError(f'min_keep: got {given!r}, expected None with context={self.context!r}: '
                             'it says itself how many stay')
        return int(given) if isinstance(given, Integral) else Fraction(str(float(given)))

    def floor_of(self,
        n_weights: int,  # of a layer
    ) -> int | None:  # None: one group, unless 100 % is asked
        "Return how many weights of a layer stay at least."
        if not self.floor: return self.floor  # None, or 0: a layer may be emptied
        floor = ceil(self.floor * n_weights) if isinstance(self.floor, Fraction) else self.floor
        return min(floor, n_weights)

    def fraction(self,
        sparsity,  # percent
        argument: str = 'sparsity',  # its name, for the error
    ) -> Fraction:  # of zeros
        """Read a sparsity.

        A pattern implies its sparsity, which may be given rounded: 66.7 for 1:3. `ValueError` where it is
        another."""
        asked, implied = percent(sparsity, argument), self.context_info.sparsity
        if implied is None: return asked
        if abs(asked - implied) > Fraction(1, 2000):
            raise ValueError(f'{argument}: got {sparsity!r}, '
                             f'expected {float(100 * implied):.4g}, which context={self.context!r} implies')
        return implied

    def check_sparsity(self,
        sparsity,  # percent, or {…: percent}
    ):
        "Raise `TypeError` or `ValueError` where a sparsity is wrong for any model."
        if not isinstance(sparsity, Mapping):
            self.fraction(sparsity)
            return
        if not sparsity: raise ValueError('sparsity: got an empty dict, expected at least one entry')
        for value in sparsity.values(): self.fraction(value)

    def check_groupings(self,
        groupings: dict,  # layer's name: `Grouping`
    ):
        "Raise `ValueError` where the context cannot prune such groups."
        one_layer = any(g.one_layer for g in groupings.values())
        self._check_groups(one_layer, several=any(g.size > 1 for g in groupings.values()))
        self._check_floor(max(prod(g.shape) for g in groupings.values()))
        context = self.context_info
        apart = [name for name, grouping in groupings.items() if not grouping.whole_filters]
        if self.coupled and apart:
            raise ValueError(f'coupled: got True with granularity={self.granularity!r}, of which a group in '
                             f"{apart[0]!r} is not a whole filter; expected one as 'filter' or head(n)")
        if not context.single_weights: return
        for name, grouping in groupings.items():
            if context.axis in grouping.axes: continue
            raise ValueError(f'context: got {self.context!r}, but {name!r} has no axis {context.axis}, only '
                             f'{", ".join(grouping.axes)}; leave it out by exclude=')

    def _check_groups(self, one_layer, several):
        "Refuse groups that are a layer, or have several weights, where the context cannot prune them."
        context, given = self.context_info, f'granularity: got {self.granularity!r}, expected'
        if context.within_layers and one_layer:
            raise ValueError(f'{given} one with several groups a layer: '
                             f'context={self.context!r} compares within layers')
        if context.single_weights and several:
            raise ValueError(f"{given} 'weight' with context={self.context!r}: "
                             'a pattern is one of single weights')

    def _check_floor(self, largest):
        "Refuse a floor under which nothing can be pruned; `largest` is the weights of the largest layer."
        if not self.floor or self.floor_of(largest) < largest: return
        raise ValueError(f'min_keep: got {self.min_keep!r}, '
                         f'expected fewer than the {largest:,} weights of the largest layer: '
                         'a layer with no more than that stays whole')

    def _check_one_filter(self, argument, given):
        "Refuse an argument that is about single filters where a group is something else."
        if self.granularity_info.one_filter: return
        names = [repr(name) for name, row in GRANULARITIES.items() if row.one_filter]
        raise ValueError(f'{argument}: got {given!r} with granularity={self.granularity!r}, '
                         f'expected {" or ".join(names)}, which prunes output channels')

    def _check_coupled(self):
        if isinstance(self.granularity, str): self._check_one_filter('coupled', True)
        if not self.context_info.by_shape: return
        others = [name for name, row in CONTEXTS.items() if not row.by_shape]
        raise ValueError(f'coupled: got True with context={self.context!r}, which goes by the shape of '
                         f'single layers; expected {", ".join(others)}, or a function')

    @property
    def given(self) -> dict:  # argument: value
        "Return what differs from the defaults."
        values = {field: getattr(self, field.name) for field in fields(self)}
        return {field.name: value for field, value in values.items() if not _same(value, field.default)}

    def __repr__(self): return f'Rules({as_arguments(self.given)})'

    def __reduce__(self):  # a copy gets what the user gave, and reads it anew: what was read may not be picklable
        return type(self), tuple(getattr(self, field.name) for field in fields(self))


def takes_rules(function: Callable) -> Callable:
    "Add the rules that a function does not name itself to its signature, and refuse other arguments."
    function = delegates(Rules)(function)
    function.__delwrap__ = Rules  # whoever reads the comments on arguments finds them at the fields
    return known_arguments(function)


def as_arguments(
    given: dict,  # name: value
) -> str:
    "Write arguments as one types them."
    return ', '.join(f'{name}={value!r}' for name, value in given.items())


def _same(value, default):
    "Tell whether a value is the default. Tensors are not compared."
    return value is default or isinstance(value, str) and value == default


def _is_floor(value):
    if isinstance(value, bool) or not isinstance(value, Real): return False
    return value >= 0 if isinstance(value, Integral) else 0 < value < 1
