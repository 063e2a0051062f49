"What comes in at the door: one clear error for what cannot be meant."
from difflib import get_close_matches
from fractions import Fraction
from math import isnan
from numbers import Real


def percent(
    value,  # what the user wrote, 0 to 100
    argument: str = 'sparsity',  # how the error calls it
) -> Fraction:  # the share, 0 to 1, exactly as written: 33.3 is 333/1000
    "Read a sparsity in percent; `TypeError` or `ValueError` if it cannot be one."
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f'{argument}: got {value!r}, allowed is a number from 0 to 100, the percentage of zeros')
    number = float(value)
    if isnan(number) or not 0 <= number <= 100:
        raise ValueError(f'{argument}: got {value!r}, allowed is 0 to 100, the percentage of zeros')
    if 0 < number < 1:
        raise ValueError(f'{argument}: got {value!r}, allowed is 0, or 1 to 100 percent: write {number * 100:g} for {number * 100:g} %')
    return Fraction(str(number)) / 100


def nearest(
    name: str,  # what was written
    names,  # what there is
) -> str:  # "; did you mean 'x'?", or nothing where no name is near
    "The end of an error message that offers the closest name."
    close = get_close_matches(str(name), [str(n) for n in names], n=1)
    return f'; did you mean {close[0]!r}?' if close else ''


def one_of(
    argument: str,  # the argument's name, for the error
    value,  # a name, or an object that serves itself
    table: dict,  # what there is by name
    otherwise: str = 'or a function',  # what else is allowed, in words
):
    "Look a name up in `table`; what is callable serves as it is."
    if isinstance(value, str):
        if value in table: return table[value]
        raise ValueError(f'{argument}: got {value!r}, allowed is one of {", ".join(table)}, {otherwise}{nearest(value, table)}')
    if callable(value) and (not isinstance(value, type) or value in table.values()): return value
    raise TypeError(f'{argument}: got {value!r}, allowed is one of {", ".join(table)}, {otherwise}')


def name_of(thing) -> str:
    "What to call a criterion, context or schedule in a message."
    return getattr(thing, '__name__', None) or repr(thing)
