"What the user has chosen: one frozen value, read and checked once, printed as one types it."
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cached_property
from math import ceil
from numbers import Integral, Real

from fasterai.arguments import percent
from fasterai.context import CONTEXTS, Context, ContextInfo, read_context
from fasterai.criteria import Criterion, CriterionInfo, read_criterion
from fasterai.granularity import GRANULARITIES, read_granularity


@dataclass(frozen=True, repr=False)
class Rules:
    "Which weights take part, and by which rules they are pruned."
    granularity: str | tuple | Callable = 'weight'
    context: str | Context = 'global'
    criteria: str | Criterion = 'magnitude'
    layers: object = None  # as `layers.choose` takes it
    min_keep: int | float | None = None
    coupled: bool = False

    def __post_init__(self):
        read_granularity(self.granularity)
        self.context_info, self.criterion, self.floor  # read once, and refused where they cannot be meant
        if self.coupled: self._check_coupled()

    @cached_property
    def context_info(self) -> ContextInfo: return read_context(self.context)

    @cached_property
    def criterion(self) -> CriterionInfo: return read_criterion(self.criteria)

    @cached_property
    def floor(self) -> int | Fraction | None:  # weights, or a share of a layer's
        "The weights that stay in each layer at least."
        value = self.min_keep
        if value is None: return None
        if not _is_floor(value):
            raise ValueError(f'min_keep: got {value!r}, allowed is a whole number of weights, or a share between 0 and 1, as .05')
        if self.context_info.sparsity is not None:
            raise ValueError(f'min_keep: got {value!r}, allowed with context={self.context!r} is None: the pattern says what stays')
        return int(value) if isinstance(value, Integral) else Fraction(str(float(value)))

    def floor_of(self,
        weights: int,  # of a layer
    ) -> int | None:
        "The weights of a layer that stay at least; None for one group, unless all shall go."
        if not self.floor: return self.floor
        floor = ceil(self.floor * weights) if isinstance(self.floor, Fraction) else self.floor
        return min(floor, weights)

    def fraction(self,
        sparsity,  # percent
        argument: str = 'sparsity',  # how the error calls it
    ) -> Fraction:  # of zeros
        "The sparsity that is meant; `ValueError` where it is not the one that a pattern implies, which may be rounded: 66.7 for 1:3."
        asked, implied = percent(sparsity, argument), self.context_info.sparsity
        if implied is None: return asked
        if abs(asked - implied) > Fraction(1, 2000):
            raise ValueError(f'{argument}: got {sparsity!r}, allowed with context={self.context!r} is {float(100 * implied):.4g}, which it implies')
        return implied

    def check_sparsity(self,
        sparsity,  # percent, or {…: percent}
    ):
        "`TypeError` or `ValueError` where it cannot be meant."
        if sparsity == {}: raise ValueError('sparsity: got an empty dict, allowed is at least one entry')
        for value in sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]: self.fraction(value)

    def check_groupings(self,
        groupings: dict,  # layer's name: `Grouping`
    ):
        "`ValueError` where the context cannot work on such groups."
        if self.context_info.within_layers and any(g.one_layer for g in groupings.values()):
            raise ValueError(f'granularity: got {self.granularity!r}, allowed with this context are those with several groups a layer: '
                             'it compares within layers')
        if not self.context_info.single_weights: return
        if any(g.size > 1 for g in groupings.values()):
            raise ValueError(f"granularity: got {self.granularity!r}, allowed with context={self.context!r} is 'weight': "
                             'a pattern is one of single weights')
        for name, grouping in groupings.items():
            if 'I' in grouping.axes: continue
            raise ValueError(f'context: got {self.context!r}, and {name!r} has no input axis I along which it could run; leave it out by layers=')

    def _check_coupled(self):
        if not read_granularity(self.granularity).one_filter:
            names = [repr(name) for name, row in GRANULARITIES.items() if row.one_filter]
            raise ValueError(f'coupled: got True with granularity={self.granularity!r}, allowed is {" or ".join(names)}')
        if not self.context_info.by_shape: return
        others = [name for name, row in CONTEXTS.items() if not row.by_shape]
        raise ValueError(f'coupled: got True with context={self.context!r}, which goes by the shape of single layers; '
                         f'allowed is {", ".join(others)}, or a function')

    @property
    def given(self) -> dict:  # argument: value
        "What differs from the defaults."
        return {f.name: getattr(self, f.name) for f in fields(self) if not _same(getattr(self, f.name), f.default)}

    def __repr__(self): return f'Rules({as_arguments(self.given)})'

    def __reduce__(self): return type(self), tuple(getattr(self, f.name) for f in fields(self))  # what was read is read anew


def as_arguments(
    given: dict,  # name: value
) -> str:
    "Arguments as one types them."
    return ', '.join(f'{name}={value!r}' for name, value in given.items())


def _same(value, default):
    "Whether a value is the default; tensors are not compared."
    return value is default or isinstance(value, str) and value == default


def _is_floor(value):
    if isinstance(value, bool) or not isinstance(value, Real): return False
    return value >= 0 if isinstance(value, Integral) else 0 < value < 1
