from fractions import Fraction

import numpy as np
import pytest

from fasterai.arguments import nearest, one_of, percent


@pytest.mark.parametrize('written, share', [
    (0, Fraction(0)), (1, Fraction(1, 100)), (33.3, Fraction(333, 1000)), (90, Fraction(9, 10)), (100., Fraction(1)),
    (np.float32(50), Fraction(1, 2)), (np.int64(7), Fraction(7, 100))])
def test_percent_is_exactly_what_was_written(written, share): assert percent(written) == share


@pytest.mark.parametrize('value, error, says', [
    (-1, ValueError, 'sparsity: got -1, expected a number from 0 to 100'),
    (100.5, ValueError, 'sparsity: got 100.5, expected a number from 0 to 100'),
    (float('nan'), ValueError, 'sparsity: got nan'),
    (float('inf'), ValueError, 'sparsity: got inf'),
    (True, TypeError, 'sparsity: got True'),
    ('90', TypeError, "sparsity: got '90'"),
    (None, TypeError, 'sparsity: got None'),
    (.9, ValueError, 'write 90 for 90 %'),
    (.005, ValueError, 'write 0.5 for 0.5 %')])
def test_what_is_no_percentage_is_refused(value, error, says):
    with pytest.raises(error, match=says.replace('(', r'\(')): percent(value)


def test_names():
    table = {'local': 1, 'global': 2}
    assert one_of('context', 'local', table) == 1
    assert one_of('context', len, table) is len
    with pytest.raises(ValueError, match="context: got 'globl', expected one of local, global, or a function; did you mean 'global'?"):
        one_of('context', 'globl', table)
    with pytest.raises(TypeError, match='context: got 3, expected one of local, global'): one_of('context', 3, table)
    assert nearest('xyz', table) == ''
