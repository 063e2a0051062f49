"Sparse kernels compute what torch does in float64, write nowhere else, and are built and refused as they should be."
import ctypes
import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fasterai.deploy import kernels
from fasterai.deploy.kernels import MaxPool, SparseConv, SparseLinearKernel, loading
from fasterai.deploy.kernels.layers import ACTIVATED, PLANS, TILINGS
from fasterai.deploy.kernels.loading import SOURCE
from fasterai.deploy.kernels.plans import ConvolutionPlan, MatrixPlan, PoolPlan, Weights, cuts
from fasterai.deploy.kernels.tiling import Geometry, panel_rows, tiles
from fasterai.native import build, prebuilt

needs_kernels = pytest.mark.skipif(kernels.library() is None, reason=str(kernels.why_not()))
cases = settings(max_examples=60, deadline=None, derandomize=True)
size, small = st.integers(1, 34), st.integers(1, 4)


@pytest.fixture(autouse=True)
def threads():
    yield
    torch.set_num_threads(1)


def zeroed(layer, share):
    with torch.no_grad(): layer.weight.mul_(torch.rand(layer.weight.shape) >= share)
    return layer.eval()


def expected(layer, x):
    with torch.no_grad(): return deepcopy(layer).double()(x.double())


def assert_close(found, exact):
    assert found.shape == exact.shape and found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@st.composite
def convolutions(draw):
    "A Conv2d of any kind with zeros in it, and an input."
    torch.manual_seed(draw(st.integers(0, 1000)))
    groups = draw(st.sampled_from([1, 1, 2, 3, 'depthwise']))
    if groups == 'depthwise': inputs = groups = draw(size)
    else: inputs = groups * draw(st.integers(1, 12))
    outputs = groups * draw(st.integers(1, 12))
    kernel, dilation, stride = ([draw(small), draw(small)] for _ in range(3))
    same = draw(st.booleans()) and draw(st.booleans())
    padding = 'same' if same else [draw(st.integers(0, 4)), draw(st.integers(0, 4))]
    layer = nn.Conv2d(inputs, outputs, kernel, 1 if same else stride, padding, dilation, groups, draw(st.booleans()))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel)]
    height, width = (draw(st.integers(r, r + 33)) for r in reach)
    return zeroed(layer, draw(st.sampled_from([0, .5, .9, 1]))), torch.randn(draw(st.sampled_from([1, 2, 5])), inputs, height, width)


@needs_kernels
@cases
@given(convolutions(), st.sampled_from(TILINGS), st.sampled_from([1, 2, 3, 8]), st.sampled_from(list(ACTIVATED)), st.booleans())
def test_a_convolution_computes_the_same(case, tiling, threads, activation, add):
    layer, x = case
    exact = expected(layer, x)
    added = torch.randn(exact.shape) if add else None
    if add: exact = exact + added
    torch.set_num_threads(threads)
    assert_close(SparseConv(layer, activation, tiling)(x, added), ACTIVATED[activation](exact))


@needs_kernels
@cases
@given(size, st.integers(1, 20), size, st.sampled_from([0, 1, 2, 3, 7, 64]), st.sampled_from([0, .5, .95, 1]),
       st.sampled_from(TILINGS), st.sampled_from([1, 2, 8]), st.booleans())
def test_a_linear_computes_the_same(inputs, outputs, seed, count, share, tiling, threads, bias):
    torch.manual_seed(seed)
    layer, x = zeroed(nn.Linear(inputs, outputs, bias), share), torch.randn(count, inputs)
    torch.set_num_threads(threads)
    assert_close(SparseLinearKernel(layer, tiling=tiling)(x), expected(layer, x))
    for activation, function in ACTIVATED.items():
        assert_close(SparseLinearKernel(layer, activation)(9 * x), function(expected(layer, 9 * x)))


@needs_kernels
@cases
@given(st.data(), st.sampled_from([1, 2, 8]))
def test_max_pooling_is_equal_to_the_bit(data, threads):
    kernel, stride, dilation = ([data.draw(small), data.draw(small)] for _ in range(3))
    padding = [data.draw(st.integers(0, k // 2)) for k in kernel]
    layer = nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=data.draw(st.booleans()))
    height, width = (data.draw(st.integers(d * (k - 1) + 1, 40)) for d, k in zip(dilation, kernel))
    x = torch.randn(data.draw(small), data.draw(small), height, width)
    x[torch.rand(x.shape) < .02] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    torch.set_num_threads(threads)
    assert torch.equal(MaxPool(layer)(x).nan_to_num(nan=9e9), layer(x).nan_to_num(nan=9e9))


@needs_kernels
@pytest.mark.parametrize('layer, x', [
    (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)), (nn.Conv1d(4, 6, 3, stride=2), (4, 9)),
    (nn.Conv1d(4, 6, 4, padding='same', dilation=2), (1, 4, 9)), (nn.Conv2d(4, 6, 3), (4, 5, 7)),
    (nn.Conv2d(4, 6, 3, padding='valid'), (0, 4, 5, 7)), (nn.Conv2d(3, 5, (1, 7), padding=(0, 3)), (2, 3, 1, 300)),
    (nn.Conv2d(2, 3, 21, padding=10), (1, 2, 40, 40)), (nn.Conv2d(2, 2, 3, stride=5, padding=1), (3, 2, 40, 40)),
    (nn.Conv2d(600, 2, 1), (1, 600, 3, 3)), (nn.Conv2d(2, 600, 3), (17, 2, 3, 3)), (nn.Conv2d(3, 4, 3, dilation=20), (1, 3, 44, 44)),
    (nn.Linear(5, 3), (5,)), (nn.Linear(5, 3), (2, 3, 5)), (nn.Linear(70000, 3), (1, 70000)), (nn.Linear(70000, 3), (4, 70000))], ids=str)
def test_other_shapes(layer, x):
    layer, x = zeroed(layer, .7), torch.randn(x)
    kind = SparseLinearKernel if isinstance(layer, nn.Linear) else SparseConv
    assert_close(kind(layer)(x), expected(layer, x))
    if x.ndim == 4: assert_close(kind(layer)(x.to(memory_format=torch.channels_last)), expected(layer, x))


@needs_kernels
def test_every_tile_computes_the_same():
    layer, x = zeroed(nn.Conv2d(5, 7, 3, 2, 1), .5), torch.randn(5, 5, 21, 19)
    sparse, code, exact = SparseConv(layer), kernels.library(), expected(layer, x)
    registers = frozenset(n for n in range(1, 64) if code.has_tile(n))
    found = tiles(sparse.geometry, (5, 21, 19), 100, code.lanes(), registers)
    assert len(found) > 50 and {t.abreast for t in found} == {1, 2, 4}
    for tile in found:
        y = torch.full(exact.shape, torch.nan)
        ConvolutionPlan(code, sparse.geometry, (5, 21, 19), tile, sparse._weights()).run(x, y)
        assert_close(y, exact)


def test_a_panel_has_the_rows_of_a_phase_side_by_side():
    assert panel_rows(Geometry(1, 1, (3, 3)), 2) == ([0, 1, 2, 3], [0, 1, 2])
    assert panel_rows(Geometry(1, 1, (3, 3), stride=(2, 2)), 2) == ([0, 2, 4, 1, 3], [0, 3, 1])


def test_outputs_are_cut_by_their_weights():
    assert cuts(np.array([0, 100, 100, 100, 100]), 1).tolist() == [0, 4]
    assert cuts(np.array([0, 100, 100, 200, 200]), 2).tolist() == [0, 2, 4]
    assert cuts(np.array([0, 0, 0]), 8).tolist()[::8] == [0, 2]


@needs_kernels
def test_activations_that_are_not_finite():
    "Weights that are zero are skipped, so that infinity and NaN reach only what other weights read."
    layer = nn.Linear(2, 2, bias=False).eval()
    layer.weight.data = torch.tensor([[1., 0], [0, 2]])
    assert SparseLinearKernel(layer)(torch.tensor([[torch.inf, 1]])).tolist() == [[torch.inf, 2]]
    assert layer(torch.tensor([[torch.inf, 1]])).isnan().any()
    assert SparseLinearKernel(layer, 'relu')(torch.tensor([torch.nan, 1])).isnan().tolist() == [True, False]


# As a module

def example(): return SparseConv(zeroed(nn.Conv2d(3, 4, 3, padding=1), .5)), torch.randn(2, 3, 6, 6)


def in_child(layer, x): return layer(x)


@needs_kernels
def test_it_is_copied_pickled_and_runs_elsewhere():
    layer, x = example()
    torch.set_num_threads(2)
    y = layer(x)
    assert torch.equal(deepcopy(layer)(x), y) and torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    with torch.inference_mode(): assert torch.equal(layer(x), y) and torch.equal(deepcopy(layer)(x), y)
    with ThreadPoolExecutor(4) as pool: assert all(torch.equal(found, y) for found in pool.map(deepcopy(layer), [x] * 20))
    for way in ('fork', 'spawn'):
        with multiprocessing.get_context(way).Pool(1) as pool:
            assert torch.equal(pool.apply(in_child, (layer, x)), y), way


@needs_kernels
def test_its_state_saves_and_loads():
    layer, x = example()
    other = SparseConv(zeroed(nn.Conv2d(3, 4, 3, padding=1), .9))
    other(x)
    other.load_state_dict(layer.state_dict())  # another number of weights
    assert torch.equal(other(x), layer(x))
    with torch.no_grad(): other.values.mul_(2), other.bias.mul_(2)
    assert torch.equal(other(x), 2 * layer(x))  # a plan is made anew for other weights
    damaged = layer.state_dict() | {'columns': layer.columns + 27}
    with pytest.raises(ValueError, match='state_dict: got rows and columns that fit no weight'): other.load_state_dict(damaged), other(x)
    assert set(layer.state_dict()) == {'rows', 'columns', 'values', 'bias'} and 0 < layer.unstored < 1


@needs_kernels
def test_few_plans_are_kept():
    layer, _ = example()
    for side in range(3, 12): layer(torch.randn(1, 3, side, side))
    plan = layer._plans[(1, 3, 11, 11), None]
    layer(torch.randn(1, 3, 11, 11))
    assert len(layer._plans) == PLANS and layer._plans[(1, 3, 11, 11), None] is plan


@pytest.mark.parametrize('change, error, match', [
    (lambda m, x: m.train()(x), RuntimeError, 'got training mode, expected eval'),
    (lambda m, x: m(x.requires_grad_()), RuntimeError, 'got an input with gradients, expected none'),
    (lambda m, x: m(x.double()), TypeError, 'got torch.float64 on cpu, expected a dense torch.float32'),
    (lambda m, x: m(x.to('meta')), TypeError, 'got torch.float32 on meta'),
    (lambda m, x: m.double()(x), TypeError, 'got weights of torch.float64'),
    (lambda m, x: m(x[:, :2]), ValueError, 'expected 3 channels'),
    (lambda m, x: m(x[0, 0]), ValueError, 'expected 3 channels'),
    (lambda m, x: m(x, x), ValueError, 'add: got the shape'),
    (lambda m, x: SparseConv(nn.Conv2d(3, 4, 3))(x[..., :2]), ValueError, 'expected more than the kernel'),
    (lambda m, x: SparseConv(nn.Conv2d(3, 4, 3, padding=1, padding_mode='reflect')), ValueError, 'padding_mode'),
    (lambda m, x: SparseConv(nn.ConvTranspose2d(3, 4, 3)), TypeError, 'expected a Conv1d or Conv2d'),
    (lambda m, x: SparseConv(nn.Conv2d(3, 4, 3).half()), TypeError, 'layer: got weights of torch.float16'),
    (lambda m, x: SparseConv(nn.Conv2d(3, 4, 3), 'gelu'), ValueError, "activation: got 'gelu'"),
    (lambda m, x: SparseConv(nn.Conv2d(3, 4, 3), tiling='x'), ValueError, "tiling: got 'x'"),
    (lambda m, x: SparseLinearKernel(nn.Linear(3, 4))(x), ValueError, r'expected \(..., 3\)'),
    (lambda m, x: SparseLinearKernel(nn.Conv2d(3, 4, 3)), TypeError, 'expected a Linear'),
    (lambda m, x: MaxPool(nn.MaxPool2d(2, return_indices=True)), ValueError, 'return_indices'),
    (lambda m, x: MaxPool(nn.AvgPool2d(2)), TypeError, 'expected a MaxPool2d')])
def test_what_it_does_not_compute_is_refused(change, error, match):
    with pytest.raises(error, match=match): change(*example())


def test_without_kernels_torch_computes(monkeypatch):
    monkeypatch.setenv('FASTERAI_KERNELS', 'off')
    conv, linear = zeroed(nn.Conv2d(3, 4, 3, 2, 'valid', groups=1), .5), zeroed(nn.Linear(5, 3), .5)
    x = torch.randn(2, 3, 6, 6)
    with pytest.warns(UserWarning, match='layers are computed dense: FASTERAI_KERNELS is off'):
        loading.warn_once.cache_clear()
        assert_close(SparseConv(conv)(x), expected(conv, x))
    assert_close(SparseConv(conv)(x, torch.ones(2, 4, 2, 2)), expected(conv, x) + 1)
    assert_close(SparseLinearKernel(linear)(torch.ones(2, 5)), expected(linear, torch.ones(2, 5)))
    assert torch.equal(MaxPool(nn.MaxPool2d(2))(x), nn.MaxPool2d(2)(x))
    monkeypatch.setenv('FASTERAI_KERNELS', 'x')
    assert kernels.library() is None and "got 'x', expected 'native'" in kernels.why_not()


# Memory

GUARD = 64  # floats
MARK = 12345.


class Guarded:
    "Memory with marks around it."

    def __init__(self, floats):
        self.all = torch.full((floats + 2 * GUARD,), MARK)
        self.inside = self.all[GUARD:GUARD + floats]
        self.pointer = self.inside.data_ptr()

    def untouched(self): return bool((self.all[:GUARD] == MARK).all() and (self.all[-GUARD:] == MARK).all())


@needs_kernels
@cases
@given(convolutions(), st.integers(0, 10 ** 6), st.sampled_from([1, 3]))
def test_a_convolution_writes_only_its_outputs(case, which, pieces):
    layer, x = case
    sparse, code = SparseConv(layer), kernels.library()
    shape, exact = (len(x), *x.shape[2:]), expected(layer, x)
    found = tiles(sparse.geometry, shape, 10, code.lanes(), frozenset(n for n in range(1, 64) if code.has_tile(n)))
    plan = ConvolutionPlan(code, sparse.geometry, shape, found[which % len(found)], sparse._weights())
    y, scratch = Guarded(exact.numel()), Guarded(plan.scratch // 4)
    place = cuts(sparse._weights().begin, pieces)
    arguments = [plan.pointer, x.data_ptr(), x.numel(), y.pointer, exact.numel(), None, place.ctypes.data, pieces,
                 scratch.pointer, plan.scratch, 1, None]
    assert code.convolve(*arguments) == 0 and y.untouched() and scratch.untouched()
    assert_close(y.inside.view(exact.shape), exact)
    for at, change in ((2, 1), (2, -1), (4, 1), (4, -1), (9, -1), (10, 1), (10, -1), (7, 1)):
        wrong = list(arguments)
        wrong[at] += change
        y.all.fill_(MARK)
        place_after = np.append(place, 10 ** 6)  # one piece more ends behind the outputs
        wrong[6] = place_after.ctypes.data
        assert code.convolve(*wrong) != 0 and (y.all == MARK).all()


@needs_kernels
@cases
@given(size, st.integers(1, 40), st.integers(1, 140), st.sampled_from(TILINGS))
def test_a_linear_writes_only_its_outputs(inputs, outputs, count, tiling):
    torch.manual_seed(count)
    layer, x, code = zeroed(nn.Linear(inputs, outputs), .5), torch.randn(count, inputs), kernels.library()
    sparse, exact = SparseLinearKernel(layer, tiling=tiling), expected(layer, x)
    plan = sparse._packed(code, count, None)
    y, scratch = Guarded(exact.numel()), Guarded(plan.scratch // 4)
    place = cuts(sparse._weights().begin, 1)
    arguments = [plan.pointer, x.data_ptr(), x.numel(), y.pointer, exact.numel(), None, place.ctypes.data, 1, scratch.pointer, plan.scratch, 1, None]
    assert code.convolve(*arguments) == 0 and y.untouched() and scratch.untouched()
    assert_close(y.inside.view(exact.shape), exact)
    y = Guarded(outputs)
    plan = MatrixPlan(code, inputs, 1, sparse._weights())
    assert code.multiply(plan.pointer, x.data_ptr(), inputs, y.pointer, outputs, 1, place.ctypes.data, 1, 1, None) == 0
    assert y.untouched()
    assert_close(y.inside, exact[0])


@needs_kernels
def test_a_plan_that_does_not_fit_is_refused():
    sparse, code = SparseConv(zeroed(nn.Conv2d(8, 4, 3, padding=1), .5)), kernels.library()
    plan = sparse._packed(code, (1, 8, 9, 9), None)
    assert code.check_convolution(plan.pointer) == 0
    huge, fields = 2 ** 62, {name for name, kind in plan.arguments._fields_ if kind is ctypes.c_int64}
    for name in sorted(fields - {'activation', 'transposed', 'nonzeros', 'begins'}):
        for value in (-1, huge, 2 ** 31):
            before = getattr(plan.arguments, name)
            setattr(plan.arguments, name, value)
            # more chunks or rows than there are would be read before they can be checked
            if not (name in ('chunks', 'panel_rows') and value > 0): assert code.check_convolution(plan.pointer) != 0, (name, value)
            setattr(plan.arguments, name, before)
    for name, at, value in (('chunk', (0, 0), -1), ('chunk', (0, 1), 9), ('chunk', (0, 2), -1), ('chunk', (0, 3), 5),
                            ('chunk', (0, 4), 10 ** 9), ('begin', 1, 10 ** 6), ('begin', 0, -1), ('offset', 0, 65535)):
        array = plan._arrays[name]
        before, array[at] = array[at].copy(), value
        assert code.check_convolution(plan.pointer) != 0, (name, at, value)
        array[at] = before
    assert code.check_convolution(plan.pointer) == 0


@needs_kernels
def test_a_matrix_and_a_pool_that_do_not_fit_are_refused():
    code = kernels.library()
    begin, value = np.array([0, 1, 2], dtype=np.int32), np.ones(2, dtype=np.float32)
    with pytest.raises(RuntimeError, match='got wrong offsets'):
        MatrixPlan(code, 5, 1, Weights(begin, np.array([0, 5], dtype=np.int32), value, None))
    plan = MatrixPlan(code, 5, 1, Weights(begin, np.array([0, 4], dtype=np.int32), value, None))
    with pytest.raises(RuntimeError, match='got wrong lengths'): plan.run(torch.ones(1, 6), torch.ones(1, 2))
    with pytest.raises(RuntimeError, match='got wrong lengths'): plan.run(torch.ones(1, 5), torch.ones(1, 3))
    pool = PoolPlan(code, loading.Pool(2, 6, 6, 3, 3, 2, 2, 2, 2, 1, 1, 0, 0))
    x, y, scratch = torch.randn(2, 6, 6), Guarded(18), Guarded(pool.scratch // 4)
    assert code.max_pool(pool.pointer, x.data_ptr(), 72, y.pointer, 18, scratch.pointer, pool.scratch, 1, None) == 0
    assert y.untouched() and scratch.untouched()
    for wrong in ((71, 18, pool.scratch), (72, 17, pool.scratch), (72, 18, pool.scratch - 1)):
        assert code.max_pool(pool.pointer, x.data_ptr(), wrong[0], y.pointer, wrong[1], scratch.pointer, wrong[2], 1, None) != 0
    pool.arguments.kernel_x = 0
    assert code.pool_scratch(pool.pointer) == 0


# How it is built

@pytest.fixture
def cache(tmp_path, monkeypatch):
    "A cache folder of its own, and a compiler that hurries."
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(build, 'FLAGS', tuple('-O0' if flag == '-O3' else flag for flag in build.FLAGS))
    return tmp_path / 'cache' / 'fasterai' / 'kernels'


needs_compiler = needs_kernels


@needs_compiler
def test_a_library_is_built_once_and_again_if_it_is_damaged(cache):
    path = build.built(SOURCE)
    assert path.parent == cache and cache.stat().st_mode & 0o777 == 0o700
    first = path.stat().st_mtime_ns
    assert build.built(SOURCE) == path and path.stat().st_mtime_ns == first
    whole = path.read_bytes()
    for damage in (whole[:1000], whole[:-1] + b'x', b''):
        path.write_bytes(damage)
        assert build.built(SOURCE) == path and path.read_bytes() != damage and build._is_whole(path)
    path.with_suffix('.sha256').unlink()
    assert build.built(SOURCE) == path and ctypes.CDLL(str(path)).lanes() > 0
    assert {p.name for p in cache.iterdir()} == {path.name, path.with_suffix('.sha256').name, 'lock'}  # nothing half made


@needs_compiler
def test_another_source_compiler_or_processor_is_another_library(cache, tmp_path, monkeypatch):
    found = {build._key(SOURCE, ['cc'], build.FLAGS), build._key(SOURCE, ['cc', '-g'], build.FLAGS), build._key(SOURCE, ['cc'], (*build.FLAGS, '-DLANES=4'))}
    monkeypatch.setattr(build, '_processor', lambda: 'another')
    found.add(build._key(SOURCE, ['cc'], build.FLAGS))
    (tmp_path / 'source.c').write_bytes(SOURCE.read_bytes() + b'\n')
    found.add(build._key(tmp_path / 'source.c', ['cc'], build.FLAGS))
    assert len(found) == 5


@pytest.mark.parametrize('compiler, match', [('nonsense', 'no C compiler: .*nonsense'), ('false', 'false --version failed')])
def test_without_a_compiler_the_reason_is_one_line(cache, monkeypatch, compiler, match):
    monkeypatch.setenv('CC', compiler)
    with pytest.raises(build.Unavailable, match=match) as error: build.built(SOURCE)
    assert '\n' not in str(error.value)


@needs_compiler
def test_without_a_compiler_what_came_with_the_wheel_is_taken(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(prebuilt, 'FOLDER', tmp_path / 'libraries')
    monkeypatch.setattr(prebuilt, 'FLAGS', build.FLAGS)
    if not prebuilt.compile_all(): pytest.skip('no class of processors is known for this kind of machine')
    monkeypatch.setenv('CC', 'nonsense')
    library, why = loading.loaded(SOURCE, loading.FUNCTIONS, 'native')
    assert library.lanes() == kernels.library().lanes() and why is None
    assert loading.loaded(SOURCE, loading.FUNCTIONS, 'plain')[1].startswith('no C compiler')
    (tmp_path / 'sparse.c').write_bytes(SOURCE.read_bytes() + b'\n')
    assert prebuilt.prebuilt(tmp_path / 'sparse.c') is None  # compiled from another source
    monkeypatch.setattr(prebuilt, 'processor_flags', set)
    assert prebuilt.prebuilt(SOURCE) is None


def test_a_processor_gets_the_best_that_it_can_run(tmp_path, monkeypatch):
    monkeypatch.setattr(prebuilt, 'FOLDER', tmp_path)
    monkeypatch.setattr(prebuilt.platform, 'machine', lambda: 'x86_64')
    classes = prebuilt.CLASSES['x86_64']
    for name in classes: prebuilt._path(SOURCE, name).touch()
    best, next_best = classes
    for has, variant, expected in ((classes[best] | classes[next_best], 'native', best), (classes[next_best], 'native', next_best),
                                   (classes[best] | classes[next_best], 'avx2', next_best), (classes[next_best] - {'fma'}, 'native', None)):
        monkeypatch.setattr(prebuilt, 'processor_flags', lambda has=has: has)
        assert prebuilt.prebuilt(SOURCE, variant) == (expected and prebuilt._path(SOURCE, expected))


@needs_compiler
def test_a_compiler_that_fails_is_told(cache, tmp_path):
    (tmp_path / 'source.c').write_text('nonsense')
    with pytest.raises(build.Unavailable, match='^cc failed: .*source.c') as error: build.built(tmp_path / 'source.c')
    assert '\n' not in str(error.value)


def test_a_folder_that_others_can_write_to_is_refused(cache, tmp_path, monkeypatch):
    cache.mkdir(parents=True, mode=0o700)
    cache.chmod(0o777)
    with pytest.raises(build.Unavailable, match='kernels is open to other users, expected mode 700'): build.cache_folder()
    cache.chmod(0o700)
    (tmp_path / 'cache').chmod(0o777)
    with pytest.raises(build.Unavailable, match='cache can be written by other users'): build.cache_folder()
    (tmp_path / 'cache').chmod(0o1777)
    assert build.cache_folder() == cache.resolve()  # sticky
    other = type('', (), {'st_uid': os.geteuid() + 1, 'st_mode': 0o40700, 'st_gid': 0})()
    monkeypatch.setattr(type(cache), 'stat', lambda self, **more: other)
    with pytest.raises(build.Unavailable, match='belongs to another user'): build._check_owned(cache, own=True)


def test_a_link_to_elsewhere_is_followed_and_checked(cache, tmp_path):
    (tmp_path / 'open').mkdir()
    (tmp_path / 'open').chmod(0o777)
    cache.parent.mkdir(parents=True)
    cache.symlink_to(tmp_path / 'open')
    with pytest.raises(build.Unavailable, match='open is open to other users'): build.cache_folder()


@needs_compiler
def test_two_processes_build_at_once(tmp_path):
    code = 'from fasterai.deploy import kernels; print(kernels.library().lanes())'
    environment = os.environ | {'XDG_CACHE_HOME': str(tmp_path)}
    running = [subprocess.Popen([sys.executable, '-c', code], env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    assert {process.communicate()[0].strip() for process in running} == {str(kernels.library().lanes()).encode()}
    assert all(process.returncode == 0 for process in running)


@needs_compiler
@pytest.mark.parametrize('variant', ['avx2', 'plain'])
def test_other_vectors_compute_the_same(variant, monkeypatch):
    monkeypatch.setenv('FASTERAI_KERNELS', variant)
    if kernels.library() is None: pytest.skip(kernels.why_not())
    for layer, x in ((nn.Conv2d(5, 7, 3, 2, 1), (3, 5, 21, 19)), (nn.Conv2d(6, 6, 3, padding=1, groups=6), (1, 6, 13, 50)),
                     (nn.Conv2d(7, 9, 1), (2, 7, 9, 9))):
        layer, x = zeroed(layer, .5), torch.randn(x)
        for tiling in TILINGS: assert_close(SparseConv(layer, tiling=tiling)(x), expected(layer, x))
    layer, x = nn.MaxPool2d(3, 2, 1), torch.randn(2, 3, 21, 19)
    assert torch.equal(MaxPool(layer)(x), layer(x))
