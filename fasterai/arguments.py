"Check what the user gives: raise one clear error for what is wrong."
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from fractions import Fraction
from functools import wraps
from inspect import signature
from math import isfinite, isnan
from numbers import Integral, Real
from typing import NamedTuple

import torch

from fasterai.synonyms import ARGUMENTS, METHODS, VALUES


def percent(
    value,  # what the user wrote, 0 to 100
    argument: str = 'sparsity',  # its name, for the error
) -> Fraction:  # 0 to 1, exactly as written: 33.3 is 333/1000
    "Read a sparsity in percent; `TypeError` or `ValueError` if it cannot be one."
    expected = 'expected a number from 0 to 100, the percentage of zeros'
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f'{argument}: got {value!r}, {expected}{_as_number(value)}')
    number = float(value)
    if isnan(number) or not 0 <= number <= 100: raise ValueError(f'{argument}: got {value!r}, {expected}')
    if 0 < number < 1:
        raise ValueError(f'{argument}: got {value!r}, expected 0, or 1 to 100 percent: '
                         f'write {number * 100:g} for {number * 100:g} %')
    return Fraction(str(number)) / 100


def _as_number(value):
    "Offer the number that is in a text as '50%'."
    text = value.strip(' %') if isinstance(value, str) else ''
    return f'; did you mean {text}?' if text.isascii() and text.replace('.', '', 1).isdigit() else ''


def flag(
    argument: str,  # its name, for the error
    value,  # what the user gave
    or_none: bool = False,  # None may be given too
) -> bool | None:
    "Return True or False; `TypeError` for anything else that Python takes for one of them."
    if or_none and value is None: return None
    if type(value).__name__ in ('bool', 'bool_'): return bool(value)  # Python's and numpy's
    expected = 'True, False or None' if or_none else 'True or False'
    raise TypeError(f'{argument}: got {value!r}, expected {expected}')


def whole(
    argument: str,  # its name, for the error
    value,  # what the user gave
    least: int = 1,
) -> int:
    "Return a whole number as it is; `ValueError` where it is none, or too small."
    if is_whole(value, least): return value
    raise ValueError(f'{argument}: got {value!r}, expected an integer of {least} or more')


def is_whole(
    value,  # anything
    least: int = 1,
) -> bool:
    "Tell whether a value is a whole number, and not too small."
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least


def seconds_of(
    value,  # what the user gave
    argument: str = 'seconds',  # its name, for the error
) -> float:
    "Return a time in seconds; `TypeError` or `ValueError` where it cannot be one."
    expected = 'expected a number of seconds, 0 or more'
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f'{argument}: got {value!r}, {expected}')
    if not value >= 0: raise ValueError(f'{argument}: got {value!r}, {expected}')
    return float(value)


def finite_number(
    argument: str,  # its name, for the error
    value,  # a number, or a tensor or array of one
    where: str = '',  # where it came from, in words
) -> float:
    "Return what a function gave as a float; `TypeError` or `ValueError` where it is no finite number."
    said = f'{argument}: got {value!r}{where}, expected a number that is neither NaN nor infinite'
    if isinstance(value, (str, bytes, type(None))): raise TypeError(said)
    try: number = float(value)
    except (TypeError, ValueError, RuntimeError): raise TypeError(said) from None
    if not isfinite(number): raise ValueError(said)
    return number


def callable_with(
    argument: str,  # its name, for the error
    function,  # what the user gave
    count: int,  # how many arguments it is called with
    expected: str,  # in words, as 'a function of progress'
):
    "Raise `TypeError` for what is no function, or cannot be called with so many arguments."
    if callable(function) and takes(function, count): return
    raise TypeError(f'{argument}: got {name_of(function)}, expected {expected}')


def takes(
    function: Callable,
    count: int,  # of arguments
) -> bool:
    "Tell whether a function can be called with so many arguments, as far as they can be read."
    try: signature(function).bind(*[None] * count)
    except ValueError: return True  # its arguments cannot be read
    except TypeError: return False
    return True


class Inputs(NamedTuple):
    "Hold the inputs of one call of a model. Its text has their shapes."
    args: tuple
    kwargs: dict = {}

    def call(self,
        model: Callable,
    ):
        "Run a model on the inputs, and return what it returns."
        return model(*self.args, **self.kwargs)

    def __str__(self):
        shapes = [_shape_of(value) for value in self.args]
        shapes += [f'{name}={_shape_of(value)}' for name, value in self.kwargs.items()]
        return f'[{", ".join(shapes)}]'


def _shape_of(value):
    "Return the shape of a tensor, else the name of a type, as a text."
    shape = getattr(value, 'shape', None)
    return type(value).__name__ if shape is None else str(tuple(shape))


def is_function(
    example,  # as the user gave it
) -> bool:
    "Tell whether an example is a function that returns one. Some tensors are callable."
    return callable(example) and not isinstance(example, torch.Tensor)


def read_example(
    example,  # a batch as the model takes it: a tuple for several inputs, a dict for keywords; anything else is one input
    model,  # whose `forward` says which keywords there are; a dict with other keys is one input
) -> Inputs:
    "Return an example as the inputs of one call."
    if isinstance(example, tuple): return Inputs(tuple(example))
    if isinstance(example, Mapping) and _takes_keywords(model, example): return Inputs((), dict(example))
    return Inputs((example,))


def _takes_keywords(model, names):
    "Tell whether the `forward` of a model takes arguments of these names."
    try: parameters = signature(model.forward).parameters.values()
    except (TypeError, ValueError): return False  # they cannot be read
    if not all(isinstance(name, str) for name in names): return False
    if any(p.kind is p.VAR_KEYWORD for p in parameters): return True
    known = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return known.issuperset(names)


def nearest(
    name: str,  # what was written
    names,  # what there is
) -> str:  # "; did you mean 'x'?", or nothing where no name is near
    "Return the end of an error message that offers the closest name."
    close = get_close_matches(str(name), [str(n) for n in names], n=1)
    return f'; did you mean {close[0]!r}?' if close else ''


def one_of(
    argument: str,  # its name, for the error
    value,  # a name, or a function
    table: dict,  # what there is by name
    otherwise: str = 'or a function',  # what else is expected, in words
):
    "Return what `table` has by that name, or a function as it is."
    expected = f'expected one of {", ".join(table)}, {otherwise}'
    if isinstance(value, str):
        if value in table: return table[value]
        hint = _synonym(VALUES.get(argument, {}), value) or nearest(value, table)
        raise ValueError(f'{argument}: got {value!r}, {expected}{hint}')
    usable = callable(value) and not isinstance(value, type)
    if usable or value in table.values(): return value
    raise TypeError(f'{argument}: got {value!r}, {expected}')


def known_arguments(function: Callable) -> Callable:
    "Make a function answer an argument that it does not have with the name of one that it has."
    names = [name for name in signature(function).parameters if name != 'self']

    @wraps(function)
    def checked(*args, **kwargs):
        for name in kwargs:
            if name in names: continue
            hint = _synonym(ARGUMENTS, name, names) or nearest(name, names)
            raise TypeError(f'{name}: got an argument of this name, expected one of {", ".join(names)}{hint}')
        return function(*args, **kwargs)
    return checked


def _synonym(table, word, names=None):
    "Offer what a word is called here. Where `names` are given, offer only an argument that is one of them."
    meant = table.get(word.lower().replace('-', '_').replace(' ', '_'))
    if meant is None: return ''
    if names is not None and meant.split('=')[0] not in names: return ''
    return f'; did you mean {meant}?'


def method_hint(
    name: str,  # an attribute that there is not
    names,  # what there is
) -> str:  # "; did you mean …?", or nothing
    "Return the end of an error message that offers a method of the Sparsifier."
    public = [n for n in names if not n.startswith('_')]
    return _synonym(METHODS, name) or nearest(name, public)


def name_of(thing) -> str:
    "Return what to call a criterion, context or schedule in a message."
    return getattr(thing, '__name__', None) or repr(thing)
