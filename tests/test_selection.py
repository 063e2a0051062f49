import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasterai import selection
from fasterai.selection import Cut, lowest

INF = torch.inf


def removed(chunks, budget):
    "What goes, chunk by chunk, as lists of 0 and 1."
    chunks = [(torch.tensor(s, dtype=torch.float32), c if isinstance(c, int) else torch.tensor(c)) for s, c in chunks]
    cut, tied, gone = lowest(lambda: iter(chunks), budget), 0, []
    for scores, _ in chunks:
        keep, tied = cut.keep(scores, tied)
        gone.append([int(not k) for k in keep])
    return gone


@pytest.mark.parametrize('chunks, budget, gone', [
    ([([3, 1, 2], 1)], 0, [[0, 0, 0]]),
    ([([3, 1, 2], 1)], 1, [[0, 1, 0]]),
    ([([3, 1, 2], 1)], 2, [[0, 1, 1]]),
    ([([3, 1, 2], 1)], 3, [[1, 1, 1]]),
    ([([3, 1, 2], 1)], 9, [[1, 1, 1]]),
    ([([5, 5, 5, 5], 1)], 3, [[1, 1, 1, 0]]),  # ties fall by position
    ([([5, 1, 5], 1), ([5, 0, 5], 1)], 4, [[1, 1, 1], [0, 1, 0]]),
    ([([1], 1)], 1, [[1]]),
    ([([1, 2, 3], 4)], 6, [[1, 1, 0]]),  # groups of 4: 6 is as far from 4 as from 8, halves go upward
    ([([1, 2, 3], 4)], 5, [[1, 0, 0]]),
    ([([1, 2, 3], 4)], 1, [[0, 0, 0]]),
    ([([1, 3], 2), ([2, 4], 10)], 11, [[1, 0], [1, 0]]),  # 2, then 12: nearest to 11
    ([([1, 2, 3], [1, 5, 1])], 3, [[1, 0, 0]]),
    ([([1, 2, 3], [1, 4, 1])], 3, [[1, 1, 0]]),
    ([([-INF, 2, -INF, 1], 1)], 3, [[1, 0, 1, 1]]),  # -inf is gone already
    ([([-INF, 2, -INF, 1], 1)], 1, [[1, 0, 0, 0]]),
    ([([-2, 0, -1], 1)], 1, [[1, 0, 0]]),  # scores may be negative
    ([([1, 2], 1), ([INF], 1)], 5, [[1, 1], [0]]),  # +inf is spared
])
def test_tables(chunks, budget, gone): assert removed(chunks, budget) == gone


def brute(scores, costs, budget):
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    sums = [0]
    for i in order: sums.append(sums[-1] + costs[i])
    take = min(range(len(sums)), key=lambda k: (abs(sums[k] - budget), -k))
    return {i for i in order[:take]}


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(1, 5)), min_size=1, max_size=5),
       st.floats(0, 1), st.sampled_from([1, 3, 4096]))
def test_as_a_plain_sort_would(chunks, share, sample):
    budget = round(share * sum(len(s) * c for s, c in chunks))
    before, selection.SAMPLE = selection.SAMPLE, sample
    try: gone = [g for part in removed(chunks, budget) for g in part]
    finally: selection.SAMPLE = before
    flat = [(v, c) for s, c in chunks for v in s]
    assert {i for i, g in enumerate(gone) if g} == brute([v for v, _ in flat], [c for _, c in flat], budget)


@pytest.mark.parametrize('scores', [
    torch.randn(300_000).abs(), torch.ones(300_000), torch.arange(300_000.), torch.randn(300_000).bfloat16().float(),
    torch.cat([torch.zeros(200_000), torch.rand(100_000)]), (torch.arange(300_000) % 9).float()], ids='normal equal rising bf16 zeros periodic'.split())
@pytest.mark.parametrize('budget', [1, 3, 149_999, 150_000, 270_000, 299_999, 300_000])
def test_exact_where_only_a_sample_was_sorted(scores, budget):
    parts = scores.split(70_001)
    cut, tied, keeps = lowest(lambda: ((s, 1) for s in parts), budget), 0, []
    for s in parts:
        keep, tied = cut.keep(s, tied)
        keeps.append(keep)
    expected = torch.ones_like(scores, dtype=torch.bool)
    expected[scores.sort(stable=True).indices[:budget]] = False
    assert torch.equal(torch.cat(keeps), expected)


def test_little_is_sorted(monkeypatch):
    "The promise that the scores of the network are never gathered: what is collected is a small part."
    seen = []
    cut = selection._cut
    monkeypatch.setattr(selection, '_cut', lambda below, scores, costs, budget: seen.append(len(scores)) or cut(below, scores, costs, budget))
    parts = [torch.rand(200_000) for _ in range(10)]
    lowest(lambda: ((p, 1) for p in parts), 1_800_000)
    assert len(seen) == 1 and seen[0] < 100_000


def test_a_cut_at_nothing_keeps_all():
    keep, _ = Cut(-INF, 0).keep(torch.tensor([1., -INF]), 0)
    assert keep.tolist() == [True, True]
