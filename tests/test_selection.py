import itertools
import random
import warnings
from dataclasses import replace
from fractions import Fraction
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasterai import ranking, selection
from fasterai.context import prune_together
from fasterai.peers import ALONE
from fasterai.selection import LayerGroups, Lowest
from fasterai.shards import Place

INF = torch.inf


def part(scores, cost=1, **more):
    "Groups with a score each; -inf is gone already; one cost for all or one each."
    scores = torch.as_tensor(scores, dtype=torch.float32)
    size, costs = (cost, None) if isinstance(cost, int) else (max(cost), torch.tensor(cost))
    return LayerGroups('', len(scores) * size, size, scores > -INF, lambda where: scores[where].nan_to_num(neginf=0.), costs, **more)


def cut_at(order, budget): return ALONE.in_step([order.cut(budget)])[0]


def removed(chunks, budget):
    "What is gone in the end, part by part, as lists of 0 and 1."
    parts = [part(*c) for c in chunks]
    if budget == 0: return [(~p.alive).int().tolist() for p in parts]
    order = Lowest(parts)
    cut = cut_at(order, budget)
    kept = order.remove(cut)
    costs = [p.costs if p.costs is not None else torch.full((len(p.alive),), p.group_size) for p in parts]
    assert [n for _, n in kept] == [int(c[p.alive & ~keep].sum()) for p, c, (keep, _) in zip(parts, costs, kept)]
    return [(~keep).int().tolist() for keep, _ in kept]


@pytest.mark.parametrize('chunks, budget, gone', [
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
    ([([-INF, 2, -INF, 1], 1)], 1, [[1, 0, 1, 1]]),  # -inf is gone already
    ([([-INF, 2, -INF, 1], 1), ([-INF, -INF], 3)], 1, [[1, 0, 1, 1], [1, 1]]),
    ([([-2, 0, -1], 1)], 1, [[1, 0, 0]]),  # scores may be negative
])
def test_tables(chunks, budget, gone): assert removed(chunks, budget) == gone


def brute(scores, costs, budget):
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    sums = [0]
    for i in order: sums.append(sums[-1] + costs[i])
    take = min(range(len(sums)), key=lambda k: (abs(sums[k] - budget), -k))
    return set(order[:take])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(1, 5), st.booleans()), min_size=1, max_size=5),
       st.floats(0, 1), st.sampled_from([1, 3, 1 << 16]), st.sampled_from([1, 7, 1 << 19]), st.sampled_from([1, 8, 1 << 10]))
def test_as_a_plain_sort_would(drawn, share, sample, chunk, few):
    chunks = [(scores, [1 + (3 * i + s) % c for i, s in enumerate(scores)] if mixed else c) for scores, c, mixed in drawn]
    flat = [(v, c) for s, cs in chunks for v, c in zip(s, cs if isinstance(cs, list) else [cs] * len(s))]
    budget = round(share * sum(c for _, c in flat))
    before = selection.SAMPLE, selection.CHUNK, ranking.FEW
    selection.SAMPLE, selection.CHUNK, ranking.FEW = sample, chunk, few
    try: gone = [g for one in removed(chunks, budget) for g in one]
    finally: selection.SAMPLE, selection.CHUNK, ranking.FEW = before
    assert {i for i, g in enumerate(gone) if g} == brute([v for v, _ in flat], [c for _, c in flat], budget)


@pytest.mark.parametrize('scores', [
    torch.randn(300_000).abs(), torch.ones(300_000), torch.arange(300_000.), torch.randn(300_000).bfloat16().float(),
    torch.cat([torch.zeros(200_000), torch.rand(100_000)]), (torch.arange(300_000) % 9).float()], ids='normal equal rising bf16 zeros periodic'.split())
@pytest.mark.parametrize('budget', [1, 3, 149_999, 150_000, 270_000, 299_999, 300_000])
@pytest.mark.parametrize('sample', [1000, 1 << 20])
def test_exact_where_only_a_sample_was_ranked(scores, budget, sample, monkeypatch):
    monkeypatch.setattr(selection, 'SAMPLE', sample)
    monkeypatch.setattr(selection, 'CHUNK', 10_000)
    parts = [part(s) for s in scores.split(70_001)]
    order, expected = Lowest(parts), torch.ones_like(scores, dtype=torch.bool)
    expected[scores.sort(stable=True).indices[:budget]] = False
    assert torch.equal(torch.cat([keep for keep, _ in order.remove(cut_at(order, budget))]), expected)


def test_exact_among_many_groups_of_different_cost():
    torch.manual_seed(0)
    scores, costs = torch.randn(200_000), torch.randint(1, 50, (200_000,))
    costs[::1000] = 5000
    order = Lowest([part(scores[:120_000], costs[:120_000].tolist()), part(scores[120_000:], costs[120_000:].tolist())])
    sums = costs[scores.argsort()].cumsum(0)
    for budget in (1, 1_000_000, int(sums[-1]) // 2 + 7, int(sums[-1])):
        removed = order.remove(cut_at(order, budget))
        nearest = min((0, *sums.tolist()), key=lambda s: (abs(s - budget), -s))
        assert sum(n for _, n in removed) == nearest == int(costs[~torch.cat([keep for keep, _ in removed])].sum())


@pytest.mark.parametrize('scores, best', [([1, 3, 2], 1), ([3, 1, 3, 2], 2), ([-INF, -5, -7], 1), ([0, 0, -INF], 1), ([2] * 9, 8)])
@pytest.mark.parametrize('chunk', [1, 2, 1 << 19])
def test_the_best_group_is_the_one_that_would_go_last(scores, best, chunk, monkeypatch):
    monkeypatch.setattr(selection, 'CHUNK', chunk)
    one = part(scores)
    assert one.best()[1] == best
    order = Lowest([one])
    (keep, _), = order.remove(cut_at(order, one.n_alive - 1))
    assert keep.nonzero().flatten().tolist() == [best]


def test_little_is_collected():
    "The promise that the scores of the network are never gathered: what is collected is a small part."
    order = Lowest([part(torch.rand(400_000)) for _ in range(10)])
    cut_at(order, 3_600_000)
    assert sum(len(f.scores) for f in order.found) < 100_000


def test_a_bracket_that_hits_serves_again():
    asked = []
    one = part(torch.rand(100_000))
    scores = one.scores
    one.scores = lambda where: asked.append(where) or scores(where)
    order = Lowest([one])
    first = cut_at(order, 50_000)
    before = len(asked)
    second = cut_at(order, 50_003)
    assert len(asked) == before and second.score > first.score
    assert [int((~k).sum()) for k, _ in order.remove(second)] == [50_003]


def test_scores_may_be_minus_infinity():
    scores = torch.cat([torch.full((30,), -INF), torch.rand(70)])[torch.randperm(100)]
    one = LayerGroups('', 100, 1, torch.ones(100, dtype=torch.bool), lambda where: scores[where])
    order = Lowest([one])
    (keep, n), = order.remove(cut_at(order, 20))
    assert n == 20 and (scores[~keep] == -INF).all()


def test_nan_is_the_lowest_however_it_is_found(monkeypatch):
    "A context of one's own may make NaN of 0 / 0."
    scores = torch.cat([torch.full((50,), torch.nan), torch.rand(4000)])[torch.randperm(4050)]
    for sample in (1 << 16, 100):
        monkeypatch.setattr(selection, 'SAMPLE', sample)
        one = LayerGroups('', 4050, 1, torch.ones(4050, dtype=torch.bool), lambda where: scores[where])
        order = Lowest([one])
        (keep, n), = order.remove(cut_at(order, 1000))
        assert n == 1000 == int((~keep).sum()) and not keep[scores.isnan()].any()


@pytest.mark.parametrize('scores, best', [([torch.nan, 1, 2, torch.nan], 2), ([1, torch.nan], 0), ([torch.nan] * 3, 2), ([-INF, torch.nan, torch.nan], 2)])
@pytest.mark.parametrize('chunk', [1, 2, 1 << 19])
def test_nan_is_never_the_best(scores, best, chunk, monkeypatch):
    monkeypatch.setattr(selection, 'CHUNK', chunk)
    values = torch.tensor(scores)
    one = LayerGroups('', len(values), 1, values != -INF, lambda where: values[where].nan_to_num(torch.nan, neginf=9.))
    assert one.best()[1] == best
    assert not np.isnan(one.all_scores()).any() and not any(np.isnan(s).any() for s in one.living_scores())


def test_layers_on_the_host_beside_layers_that_are_not(monkeypatch):
    monkeypatch.setattr(selection, 'SAMPLE', 64)
    for seed in range(30):
        torch.manual_seed(seed)
        values = torch.rand(8).numpy(), torch.rand(9000)
        here, apart = (LayerGroups('', len(v), 1, torch.ones(len(v), dtype=torch.bool), lambda where, v=v: v[where]) for v in values)
        monkeypatch.setattr(ALONE, 'on_host', lambda tensor: tensor is not apart.alive)
        order = Lowest([here, apart])
        found = torch.cat([keep for keep, _ in order.remove(cut_at(order, 5000))])
        together = torch.cat([torch.from_numpy(values[0]), values[1]])
        assert torch.equal(~found, together <= together.sort().values[4999])


# ---- Layers of which each process has a part, joined within one process

def boxes(shape, draw):
    "Cut a weight into a grid of boxes, some of them empty, and give some to a second process too."
    cuts = [sorted(draw.choices(range(length + 1), k=draw.choice([0, 0, 1, 2]))) for length in shape]
    edges = [list(zip([0, *cut], [*cut, length])) for cut, length in zip(cuts, shape)]
    found = [Place(shape, tuple(b - a for a, b in box), tuple(a for a, _ in box)) for box in itertools.product(*edges)]
    return found + [replace(place, speaks=False) for place in found if draw.random() < .2]


def parts_of(values, n_ranks, draw):
    "The parts of one layer, by rank. Each rank has one, perhaps an empty one."
    values = values.reshape(draw.choice([(-1,), (1, -1), (-1, 2), (3, -1), (2, 2, -1)]) if not len(values) % 12 else (-1,))
    alive, cost = torch.rand(values.shape) < draw.choice([1, .5]), draw.choice([1, 1, 3])
    floor = draw.choice([None, None, 0, cost, 3 * cost])

    def groups(values, alive, known_alive, place=None):
        values = values.reshape(-1)
        return LayerGroups('', known_alive[0] * cost, cost, alive.reshape(-1), values.__getitem__, floor=floor, known_alive=known_alive[1], place=place)
    known = values.numel(), int(alive.sum())
    places = boxes(tuple(values.shape), draw)[:n_ranks] if draw.random() < .8 else []
    if len({p.offset for p in places if p.speaks and 0 not in p.sizes}) and sum(prod(p.sizes) for p in places if p.speaks) == values.numel():
        places += [replace(places[0], speaks=False)] * (n_ranks - len(places))
    else: places = [Place(tuple(values.shape), tuple(values.shape), (0,) * values.ndim, rank == 0) for rank in range(n_ranks)]  # all have all
    draw.shuffle(places)
    here = [tuple(slice(a, a + n) for a, n in zip(p.offset, p.sizes)) for p in places]
    whole = groups(values, alive, known)
    return whole, places, [groups(values[at], alive[at], known, p) for at, p in zip(here, places)]


def heard_by_all(coroutines):
    "Run the coroutines of several processes: each is sent what all of them yield. All end together."
    told, results = None, []
    while not results:
        asked = []
        for c in coroutines:
            try: asked.append(c.send(told))
            except StopIteration as end: results.append(end.value)
        told = asked
    assert len(results) == len(coroutines)
    return results


@pytest.mark.parametrize('seed', range(5))
def test_parts_of_layers_lose_what_the_whole_ones_would(seed, monkeypatch):
    "200 random cases each: cuts along any axis, empty parts, parts that several processes have, ties, floors."
    draw, split = random.Random(seed), 0
    torch.manual_seed(seed)
    for _ in range(200):
        monkeypatch.setattr(selection, 'SAMPLE', draw.choice([2, 1 << 16]))
        monkeypatch.setattr(selection, 'CHUNK', draw.choice([7, 1 << 19]))
        on_host = draw.random() < .7
        monkeypatch.setattr(ALONE, 'on_host', lambda tensor, on_host=on_host: on_host)  # else as on a GPU
        n_ranks, layers = draw.choice([2, 3, 5]), []
        for _ in range(draw.choice([1, 1, 2, 4])):
            values = torch.randn(draw.choice([1, 7, 12, 60, 120, 240]))
            if draw.random() < .6: values = (values * draw.choice([0, 1, 3])).round()
            layers.append(parts_of(values, n_ranks, draw))
        whole, of_ranks = [la for la, *_ in layers], list(zip(*(parts for *_, parts in layers)))
        zeros = Fraction(draw.randint(1, 100), 100) * sum(la.n_weights for la in whole)
        if draw.random() < .5: zeros = round(zeros)
        everything = draw.random() < .1
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            expected, = ALONE.in_step([prune_together(whole, zeros, everything)])
            found = heard_by_all([prune_together(list(parts), zeros, everything) for parts in of_ranks])
        for i, (one, places, parts) in enumerate(layers):
            keep = expected[i].view(places[0].shape)
            for rank, place in enumerate(places):
                here = keep[tuple(slice(a, a + n) for a, n in zip(place.offset, place.sizes))]
                assert torch.equal(found[rank][i], here.reshape(-1))
                assert parts[rank].outcome.left == one.outcome.left
            split += len({p.offset for p in places}) > 1
    assert split > 60  # layers of which no process has all
