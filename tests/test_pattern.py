from fractions import Fraction

import pytest
import torch
from conftest import INF, layer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fasterai.context import read_context
from fasterai.pattern import pattern
from fasterai.sparsifier import Sparsifier


def lines(scores, sizes=None, **more):
    part = layer('a', scores, **more)
    part.axes = sizes or {'O': 1, 'I': len(scores)}
    return part


@pytest.mark.parametrize('context, scores, keep', [
    ('2:4', [1, 4, 3, 2, 9, 8, 7, 6], [0, 1, 1, 0, 1, 1, 0, 0]),
    ('1:4', [1, 4, 3, 2], [0, 1, 0, 0]),
    ('3:4', [1, 4, 3, 2], [0, 1, 1, 1]),
    ('2:4', [5, 5, 5, 5], [0, 0, 1, 1]),  # ties fall by position
    ('2:4', [1, 2, 3, 4, 5], [0, 0, 1, 1, 1]),  # of one left over, half a weight rounded up stays
    ('2:4', [1, 2, 3, 4, 7, 6, 5], [0, 0, 1, 1, 1, 1, 0]),
    ('2:4', [-INF, 4, 3, 2], [0, 1, 1, 0]),
    ('2:4', [-INF, -INF, -INF, 2], [0, 0, 0, 1]),
    ('1:2', [2, 1, 1, 2], [1, 0, 0, 1])])
def test_patterns(context, scores, keep):
    assert [k.int().tolist() for k in read_context(context)([lines(scores)], read_context(context).sparsity)] == [keep]


def test_patterns_run_along_the_input_axis():
    scores = [1, 9, 2, 9, 3, 9, 4, 9]  # I = 4, two kernel places
    assert read_context('2:4')([lines(scores, {'O': 1, 'I': 4, 'k': 2})], Fraction(1, 2))[0].int().tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 21), st.integers(1, 2), st.integers(0, 99))
def test_patterns_as_a_sort_would(n, more, inputs, kernel, seed):
    scores = torch.randint(0, 5, (3, inputs, kernel), generator=torch.Generator().manual_seed(seed)).float()
    context = pattern(n, n + more)
    keep, = context([lines(scores.flatten().tolist(), {'O': 3, 'I': inputs, 'k': kernel})], context.sparsity)
    expected = torch.ones_like(scores, dtype=torch.bool)
    for o in range(3):
        for k in range(kernel):
            for start in range(0, inputs, n + more):
                some = scores[o, start:start + n + more, k]
                expected[o, start + some.sort(stable=True).indices[:len(some) - -(-len(some) * n // (n + more))], k] = False
    assert torch.equal(keep, expected.flatten())


def test_half_a_pattern_is_half_of_its_zeros():
    context, scores = read_context('2:4'), [1, 4, 3, 2, 9, 8, 7, 6]
    quarter, = context([lines(scores)], Fraction(1, 4))
    assert quarter.int().tolist() == [0, 1, 1, 0, 1, 1, 1, 1]
    later = lines([-INF, 4, 3, -INF, 9, 8, 7, 6])
    assert context([later], Fraction(3, 8))[0].int().tolist() == [0, 1, 1, 0, 1, 1, 1, 0]
    assert context([later], Fraction(1, 8))[0].int().tolist() == [0, 1, 1, 0, 1, 1, 1, 1]


PATTERNED = {'Linear': lambda: nn.Linear(10, 6), 'Conv2d': lambda: nn.Conv2d(8, 6, 3), 'Conv2d grouped': lambda: nn.Conv2d(8, 6, 3, groups=2),
             'ConvTranspose2d': lambda: nn.ConvTranspose2d(8, 6, 3), 'LSTM': lambda: nn.LSTM(8, 6)}


@pytest.mark.parametrize('kind', PATTERNED)
@pytest.mark.parametrize('memory', [torch.contiguous_format, torch.channels_last], ids=['contiguous', 'channels_last'])
def test_patterns_hold_in_every_line(kind, memory):
    net = nn.Sequential(PATTERNED[kind]())
    if 'Conv' in kind: net = net.to(memory_format=memory)
    sparsifier = Sparsifier(net, context='2:4', layers='0')
    for share in (.3, .6, 1): sparsifier.sparsify_model(50, share)
    for selected in sparsifier.layers.values():
        lines = (selected.weight != 0).movedim(1 if 'Transpose' not in kind else 0, -1)
        for start in range(0, lines.shape[-1], 4):
            group = lines[..., start:start + 4]
            assert (group.sum(-1) == -(-group.shape[-1] // 2)).all()
