"What C does to every weight in an event is what numpy and torch do, to the bit; it writes nowhere else, and refuses what it cannot do."
import copy
import ctypes
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import convnet, same, tensors_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fasterai import selection
from fasterai.criteria import CRITERIA
from fasterai.kinds import _divided, _saliency
from fasterai.masks import _zero
from fasterai.native import sweep as native
from fasterai.native.loading import chosen
from fasterai.native.sweep import Row, Terms, count_zeros, cut, mask, sweep
from fasterai.selection import LayerGroups, _numpy_sweep
from fasterai.sparsifier import Sparsifier
from fasterai.zeros import LowestWhere

needs_code = pytest.mark.skipif(native._library(chosen()) is None, reason='there is no C compiler here')
cases = settings(max_examples=400, deadline=None, derandomize=True)
INF = np.float32(np.inf)
LENGTHS = [0, 1, 7, 8, 63, 64, 65, 200, 4096, 32767, 32768, 32769, 70_001]


@pytest.fixture(autouse=True)
def code_for_all(monkeypatch):
    "Layers of any size are computed in C, in as many threads as a test asks for."
    monkeypatch.setattr(native, 'SMALL', 1)
    monkeypatch.setattr(native, 'SLAB', 1 << 16)  # as a large layer
    monkeypatch.setattr(native, 'LARGE', 1)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def off(monkeypatch):
    "Leave C out, where it is called."
    return lambda: monkeypatch.setenv('FASTERAI_KERNELS', 'off')


def values(rng, length, kind):
    "Weights of one kind, float32."
    if kind == 'equal': return np.full(length, rng.choice([0., -0., 1.5]), np.float32)
    if kind == 'ties': return rng.integers(-3, 4, length).astype(np.float32)
    found = rng.standard_normal(length).astype(np.float32)
    if kind == 'tiny': found *= np.float32(1e-42)  # below the smallest normal number
    if kind == 'huge': found *= np.float32(1e25)  # their squares and products are infinite
    if kind == 'sparse': found[rng.random(length) < .8] = rng.choice([0., -0.])
    if kind == 'wrong' and length: found[rng.integers(length)] = rng.choice([np.nan, np.inf, -np.inf])
    return found


KINDS = 'normal', 'equal', 'ties', 'tiny', 'huge', 'sparse', 'wrong'


def numpy_scores(terms):
    with np.errstate(all='ignore'):
        if terms.form == 'product': found = _saliency(terms.a, terms.b)
        elif terms.form == 'quotient': found = _divided(int(terms.divisor), terms.a)
        else: found = CRITERIA[{'plain': 'random', 'absolute': 'magnitude', 'square': 'squared'}[terms.form]].score(terms.a)
    if terms.weight is None: return found
    return LowestWhere(lambda where: found[where], lambda where: terms.weight[where] == 0, True)(slice(None))


def check_sweep(seed, threads, only=None):
    "Compare one random case; return whether C did it."
    rng = np.random.default_rng(seed)
    torch.set_num_threads(threads)
    length, kind, form = int(rng.choice(LENGTHS)), str(rng.choice(KINDS)), only or str(rng.choice(native.FORMS))
    terms = Terms(form, values(rng, length, kind))
    if form == 'product': terms = terms._replace(b=values(rng, length, rng.choice(KINDS)))
    if form == 'quotient': terms = terms._replace(divisor=float(rng.integers(1, 100)))
    if rng.random() < .3: terms = terms._replace(weight=values(rng, length, rng.choice(KINDS)))
    alive = None if rng.random() < .5 else rng.random(length) < rng.random()
    scores = numpy_scores(terms)
    some = np.append(scores[~np.isnan(scores)], np.float32(0))
    low, high = sorted(float(x) for x in rng.choice(some, 2))
    if rng.random() < .7: high = float(np.sort(some)[min(len(some) - 1, np.searchsorted(np.sort(some), low) + length // 20)])
    if rng.random() < .2: low = -np.inf
    keep = np.full(length, True)
    found = sweep(terms, alive, low, high, keep)
    if found is None: return False
    living = np.ones(length, bool) if alive is None else alive
    layer = LayerGroups('', length, 1, torch.from_numpy(living), scores.__getitem__)
    expected = torch.empty(length, dtype=torch.bool)
    at, inside, stay = _numpy_sweep(layer, low, high, expected)
    assert np.array_equal(keep, expected.numpy()) and found.above == stay
    assert np.array_equal(found.at, at) and np.array_equal(found.scores.view(np.int32), inside.view(np.int32))
    raw = numpy_scores(terms._replace(weight=None))
    assert not len(raw) or raw.max() < INF  # what numpy refuses is left to it
    return True


@needs_code
@cases
@given(st.integers(0, 1 << 30), st.integers(1, 4))
def test_a_sweep_is_that_of_numpy(seed, threads): check_sweep(seed, threads)


@needs_code
@pytest.mark.parametrize('form', native.FORMS)
def test_a_sweep_is_mostly_done(form): assert sum(check_sweep(seed, 1, form) for seed in range(60)) > 20


@needs_code
@pytest.mark.parametrize('wrong', [np.nan, np.inf])
@pytest.mark.parametrize('at', [0, 63, 64, 70_000])
def test_a_score_that_is_no_number_is_left_to_numpy(wrong, at):
    a, alive = np.ones(70_001, np.float32), np.zeros(70_001, bool)
    a[at] = wrong
    assert sweep(Terms('absolute', a), alive, 2., 3., alive.copy()) is None  # masked weights are looked at, too


@needs_code
def test_more_than_fits_is_left_to_numpy():
    a = np.ones(70_001, np.float32)
    assert sweep(Terms('plain', a), None, 1., 1., np.ones(70_001, bool)) is None


@needs_code
@pytest.mark.parametrize('change', [
    dict(terms=Terms('plain', np.ones(99, np.float32))), dict(terms=Terms('plain', np.ones(100))), dict(terms=Terms('plain', np.ones(200, np.float32)[::2])),
    dict(terms=Terms('product', np.ones(100, np.float32), np.ones(101, np.float32))), dict(terms=Terms('plain', torch.ones(100))),
    dict(terms=Terms('product', np.ones(100, np.float32))), dict(alive=np.ones(99, bool)), dict(alive=np.ones(100, np.int8)), dict(low=.1)])
def test_what_does_not_fit_is_left_to_numpy(change):
    fits = dict(terms=Terms('plain', np.ones(100, np.float32)), alive=None, low=2., high=3., keep=np.ones(100, bool))
    assert sweep(**fits) is not None and sweep(**fits | change) is None


@needs_code
def test_wrong_sizes_are_refused_before_anything_is_written():
    code, a, keep = native._library(chosen()), np.ones(40_000, np.float32), np.full(40_000, 7, np.uint8)
    at, inside, counts = np.full(8192, 7), np.full(8192, 7, np.float32), np.full(8192, 7)
    arrays = [array.ctypes.data for array in (keep, at, inside, counts)]

    def swept(form=0, length=40_000, a=a.ctypes.data, room=8192, counts=8192, threads=1):
        task = native._Sweep(form, length, a, None, None, None, 1, 1, 1, *arrays, room, counts)
        return code.sweep(ctypes.addressof(task), threads, None)

    for wrong in (dict(form=5), dict(form=-1), dict(form=3), dict(length=0), dict(length=-1), dict(length=1 << 60), dict(a=None),
                  dict(room=8191), dict(counts=3), dict(threads=0)):
        assert swept(**wrong) < 0
        assert all((array == 7).all() for array in (keep, at, inside, counts))
    assert code.sweep_room(40_000) == 8192 and code.sweep_room(-1) < 0 and code.sweep_room(1 << 60) < 0
    for wrong in ((-1, 1, 1), (1 << 60, 1, 1), (100, 0, 1), (100, 3, 1), (100, -1, 1), (100, 1, 0)):
        length, groups, threads = wrong
        assert code.mask(a.ctypes.data, length, keep.ctypes.data, groups, threads, None) < 0
        assert code.count_zeros(a.ctypes.data, length, keep.ctypes.data, groups, threads, None) < 0
    assert (a == 1).all()


# Cutting

def row_of(rng, length, kind, form):
    "A layer with scores of one form; where nothing is said of what is alive, all is."
    terms = Terms(form, values(rng, length, kind))
    if form == 'product': terms = terms._replace(b=values(rng, length, 'normal'))
    if form == 'quotient': terms = terms._replace(divisor=float(rng.integers(1, 9)))
    if rng.random() < .3: terms = terms._replace(weight=values(rng, length, 'sparse'))
    alive = rng.random(length) < rng.random() if rng.random() < .5 else None
    n_alive = length if alive is None else int(alive.sum())
    return Row(terms, alive, n_alive, rng.random(length) < .5)


def check_cut(seed, threads):
    torch.set_num_threads(threads)
    rng = np.random.default_rng(seed)
    lengths = rng.choice([n for n in LENGTHS if n], rng.integers(1, 5))
    rows = [row_of(rng, length, rng.choice(KINDS), rng.choice(native.FORMS)) for length in lengths]
    scores = np.concatenate([numpy_scores(row.terms) for row in rows])
    alive = np.concatenate([np.ones(len(row.keep), bool) if row.alive is None else row.alive for row in rows])
    n_alive = int(alive.sum())
    if not n_alive: return False
    budget = int(rng.integers(1, n_alive + 1))
    found = cut(rows, budget)
    if found is None: return False
    pruned = [of.n for of in found]
    at = np.flatnonzero(alive)
    expected = alive.copy()
    expected[at[scores[at].argsort(kind='stable')[:budget]]] = False  # ties by layer and position
    assert np.array_equal(np.concatenate([row.keep for row in rows]), expected)
    assert sum(pruned) == budget
    left = [int(row.keep.sum()) for row in rows]
    assert pruned == [row.n_alive - n for row, n in zip(rows, left)]
    for row, of in zip(rows, found):
        all_scores = numpy_scores(row.terms)
        assert np.array_equal(of.scores, all_scores[of.at])
        if len(of.at): assert of.below <= np.sum(all_scores[row.alive if row.alive is not None else slice(None)] < of.scores.min())
    return True


@needs_code
@settings(cases, max_examples=1500)
@given(st.integers(0, 1 << 30), st.integers(1, 4))
def test_a_cut_prunes_the_lowest(seed, threads): check_cut(seed, threads)


@needs_code
def test_a_cut_is_mostly_done(): assert sum(check_cut(seed, 1) for seed in range(200)) > 60


@needs_code
def test_a_cut_of_many_weights_is_that_of_numpy():
    rng = np.random.default_rng(0)
    for form in native.FORMS:
        rows = [row_of(rng, 300_000, 'normal', form) for _ in range(3)]
        rows = [row._replace(terms=row.terms._replace(weight=None)) for row in rows]  # of many zeros too many are near the cut
        scores = np.concatenate([numpy_scores(row.terms) for row in rows])
        living = np.concatenate([np.ones(len(row.keep), bool) if row.alive is None else row.alive for row in rows])
        at = np.flatnonzero(living)
        for share in (.01, .5, .99):
            budget = int(share * len(at))
            assert sum(of.n for of in cut(rows, budget)) == budget
            expected = living.copy()
            expected[at[scores[at].argsort(kind='stable')[:budget]]] = False
            assert np.array_equal(np.concatenate([row.keep for row in rows]), expected)


@needs_code
def test_a_cut_refuses_what_it_cannot_do():
    def row(**change):
        fits = dict(terms=Terms('absolute', np.arange(100, dtype=np.float32)), alive=None, n_alive=100, keep=np.ones(100, bool))
        return Row(**fits | change)
    assert [of.n for of in cut([row(), row()], 7)] == [4, 3]
    for budget in (0, -1, 201): assert cut([row(), row()], budget) is None
    wrong = (row(terms=Terms('plain', np.full(100, np.nan, np.float32))), row(terms=Terms('plain', np.ones(99, np.float32))),
             row(alive=np.ones(99, bool)), row(terms=Terms('product', np.ones(100, np.float32))))
    for one in wrong: assert cut([row(), one], 7) is None
    equal = row(terms=Terms('plain', np.ones(70_001, np.float32)), keep=np.ones(70_001, bool), n_alive=70_001)
    assert cut([equal], 7) is None  # all of them are near the cut


# Zeros

@needs_code
@cases
@given(st.integers(0, 1 << 30), st.integers(1, 4))
def test_zeros_are_counted(seed, threads):
    torch.set_num_threads(threads)
    rng = np.random.default_rng(seed)
    shape = int(rng.choice([1, 5, 64, 300])), int(rng.choice([1, 3, 64, 1000]))
    weight, keep = values(rng, shape[0] * shape[1], rng.choice(KINDS)).reshape(shape), rng.random(shape) < rng.random()
    tensor = torch.from_numpy(weight)
    assert count_zeros(tensor, None) == np.count_nonzero(weight == 0)
    assert count_zeros(tensor, torch.from_numpy(keep)) == np.count_nonzero((weight == 0) & keep)
    rows = torch.from_numpy(keep[:, :1].copy()).expand(shape)  # as the mask of filters
    assert count_zeros(tensor, rows) == np.count_nonzero((weight == 0) & keep[:, :1])


# Masking

@needs_code
@cases
@given(st.integers(0, 1 << 30), st.integers(1, 4))
def test_masking_is_that_of_torch(seed, threads):
    torch.set_num_threads(threads)
    rng = np.random.default_rng(seed)
    rows, columns = int(rng.choice([1, 2, 5, 64, 300])), int(rng.choice([1, 3, 64, 1000]))
    weight = values(rng, rows * columns, rng.choice(KINDS)).reshape(rows, columns)
    keep = rng.random((rows, columns if rng.random() < .5 else 1)) < rng.random()
    around = torch.full((rows * columns + 128,), 5.)
    tensor = around[64:-64].view(rows, columns).copy_(torch.from_numpy(weight))
    expected = np.where(keep, weight.view(np.int32), 0)
    assert mask(tensor, torch.from_numpy(keep)) and np.array_equal(tensor.numpy().view(np.int32), expected)
    assert (around[:64] == 5).all() and (around[-64:] == 5).all()
    assert mask(tensor, torch.from_numpy(keep)) and np.array_equal(tensor.numpy().view(np.int32), expected)


@needs_code
@pytest.mark.parametrize('weight, keep', [
    (torch.ones(4, 3, 2, 2).to(memory_format=torch.channels_last), torch.zeros(4, 3, 2, 2, dtype=torch.bool)),
    (torch.ones(4, 4), torch.zeros(1, 4, dtype=torch.bool)), (torch.ones(4, 4).T[1:], torch.zeros(3, 4, dtype=torch.bool)),
    (torch.ones(4, 4).double(), torch.zeros(4, 4, dtype=torch.bool)), (torch.ones(4, 4), torch.zeros(4, 4, dtype=torch.uint8)),
    (torch.ones(4, 4, device='meta'), torch.zeros(4, 4, dtype=torch.bool)), (torch.ones(4, 4).to_sparse(), torch.zeros(4, 4, dtype=torch.bool)),
    (torch.ones(4, 4), torch.zeros(8, 2, dtype=torch.bool)), (nn.Parameter(torch.ones(4, 4)), torch.zeros(4, 4, dtype=torch.bool))])
def test_what_c_cannot_mask_is_left_to_torch(weight, keep): assert not mask(weight, keep)


@needs_code
def test_autograd_sees_that_weights_were_masked():
    weight = nn.Parameter(torch.ones(64, 64))
    out = (weight * weight).sum()
    _zero(weight, torch.zeros(64, 64, dtype=torch.bool))
    assert not weight.any()
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): out.backward()


# Whole events

def events(granularity, context, criterion, regrow):
    "Masks and weights after several events, with zeros that nobody took before."
    torch.manual_seed(0)
    net = convnet()
    with torch.no_grad(): net[3].weight[:, :2] = 0
    sparsifier, found = Sparsifier(net, granularity, context, criterion, layers=[net[0], net[3], net[8]]), []
    for sparsity in (30, 60, 90, 50 if regrow else 95):
        out = net(torch.randn(4, 1, 8, 8))
        net.zero_grad()
        out.square().sum().backward()
        for _ in range(3): sparsifier.evidence.step()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            sparsifier.sparsify_model(sparsity, regrow=regrow and sparsity == 50)
        found += copy.deepcopy(tensors_of(sparsifier))
        with torch.no_grad():
            for p in net.parameters(): p.add_(.01 * torch.randn_like(p))
        sparsifier.apply_masks()
    return found


@needs_code
@pytest.mark.parametrize('regrow', [False, True])
@pytest.mark.parametrize('criterion', ['magnitude', 'squared', 'gradient', 'random', 'taylor'])
@pytest.mark.parametrize('context', ['global', 'local', 'erk', 'lamp', 'normalized'])
@pytest.mark.parametrize('granularity', ['weight', 'vector', 'kernel', 'filter'])
def test_events_are_those_of_numpy(granularity, context, criterion, regrow, monkeypatch, off):
    monkeypatch.setattr(selection, 'SAMPLE', 20)
    calls = []
    monkeypatch.setattr(selection, 'sweep', lambda *given: calls.append(sweep(*given)) or calls[-1])
    monkeypatch.setattr(selection, 'cut', lambda *given: calls.append(cut(*given)) or calls[-1])

    def compared(layer, low, high, keep, swept=selection._compiled_sweep):
        terms = selection.terms_of(layer.scores)
        if terms is not None:
            alive, scores = layer.alive.numpy(), np.asarray(layer.scores(slice(None)))
            assert np.array_equal(numpy_scores(terms)[alive], scores[alive])
        return swept(layer, low, high, keep)

    monkeypatch.setattr(selection, '_compiled_sweep', compared)
    found = events(granularity, context, criterion, regrow)
    done = [call for call in calls if call is not None]
    if granularity == 'weight' and criterion != 'taylor' and context in ('global', 'local'): assert done
    off()
    assert same(found, events(granularity, context, criterion, regrow))


@needs_code
def test_what_a_cut_has_found_serves_the_next_one(monkeypatch, off):
    def event():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(400, 400, bias=False), nn.Linear(400, 400, bias=False))
        with torch.no_grad(): net[1].weight.mul_(1e-3)
        with pytest.warns(UserWarning, match="'1' would have been left without weights"): Sparsifier(net).sparsify_model(75)
        return [layer.weight.detach() for layer in net]
    calls = []
    monkeypatch.setattr(selection, 'cut', lambda *given: calls.append(cut(*given)) or calls[-1])
    found = event()
    assert len(calls) == 1 and calls[0] is not None and int((found[1] != 0).sum()) == 1
    off()
    assert same(found, event())


@needs_code
def test_evidence_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setattr(selection, 'SAMPLE', 20)
    net = nn.Linear(100, 100)
    with torch.no_grad(): net.weight[50, 50] = torch.nan
    with pytest.raises(ValueError, match="weight of layer .* NaN or infinite"): Sparsifier(net).sparsify_model(50)


@needs_code
def test_other_scores_than_those_of_the_criterion_are_not_computed_in_c():
    layer = LayerGroups('', 9, 1, torch.ones(9, dtype=torch.bool), LowestWhere(lambda where: np.ones(9, np.float32)[where], None, True))
    assert selection.terms_of(replace(layer, scores=lambda where: None).scores) is None
    assert selection.terms_of(layer.scores) is None


# When it is compiled

CODE = """
import torch
from fasterai.sparsifier import Sparsifier
from fasterai.native import build, sweep
calls = []
build._compile, compile = lambda *given: calls.append(given) or compile(*given), build._compile
for inputs in (100, {inputs}):
    Sparsifier(torch.nn.Linear(inputs, 1024)).sparsify_model(90)
    print(len(calls))
"""


def compiled(tmp_path, inputs, **environment):
    "How often was compiled after an event of a small layer, and of one with so many inputs; what was printed beside."
    done = subprocess.run([sys.executable, '-W', 'error', '-c', CODE.format(inputs=inputs)], capture_output=True, text=True, check=True,
                          env=os.environ | {'XDG_CACHE_HOME': str(tmp_path)} | environment)
    return done.stdout.split(), done.stderr


@needs_code
def test_only_a_large_layer_has_it_compiled(tmp_path): assert compiled(tmp_path, 1024) == (['0', '1'], '')


@pytest.mark.parametrize('environment', [{'FASTERAI_KERNELS': 'off'}, {'CC': 'nonsense'}])
def test_without_code_nothing_is_said(tmp_path, environment): assert compiled(tmp_path, 1024, **environment) == (['0', '0'], '')
