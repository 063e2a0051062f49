import inspect
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import convnet
from torch import nn

from fasterai.arguments import Inputs, nearest, one_of, percent, read_example
from fasterai.callback import SparsifyCallback
from fasterai.context import CONTEXTS, within
from fasterai.criteria import CRITERIA
from fasterai.granularity import GRANULARITIES, block, head
from fasterai.repair import REPAIRS
from fasterai.schedule import SCHEDULES, gradual, steps
from fasterai.sparsifier import Sparsifier
from fasterai.synonyms import ARGUMENTS, METHODS, VALUES


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
    with pytest.raises(ValueError, match=r"context: got 'globl', expected one of local, global, or a function; did you mean 'global'\?"):
        one_of('context', 'globl', table)
    with pytest.raises(TypeError, match='context: got 3, expected one of local, global'): one_of('context', 3, table)
    assert nearest('xyz', table) == ''


# What people type in a first hour, and what they are told to write

def new(**arguments): return Sparsifier(convnet(), **arguments)
def cut(sparsity): return Sparsifier(convnet()).sparsify_model(sparsity)


TYPED = [
    (lambda: new(criteria='l1'), "criteria: got 'l1', expected one of magnitude, gradient, .*; did you mean 'magnitude'?"),
    (lambda: new(criteria='L1-norm'), "did you mean 'magnitude'?"),
    (lambda: new(criteria='l2'), "did you mean 'magnitude'?"),
    (lambda: new(criteria='large_final'), "did you mean 'magnitude'?"),
    (lambda: new(criteria='saliency'), "did you mean 'gradient'?"),
    (lambda: new(criteria='taylor_fo'), "did you mean 'taylor'?"),
    (lambda: new(criteria='movement_pruning'), "did you mean 'movement'?"),
    (lambda: new(criteria='mean_square'), "did you mean 'squared'?"),
    (lambda: new(criteria='mag_inc'), "did you mean 'magnitude_increase'?"),
    (lambda: new(criteria='snip'), "did you mean 'gradient'?"),
    (lambda: new(criteria='rand'), "did you mean 'random'?"),
    (lambda: new(granularity='unstructured'), "granularity: got 'unstructured', .*; did you mean 'weight'?"),
    (lambda: new(granularity='fine-grained'), "did you mean 'weight'?"),
    (lambda: new(granularity='structured'), "did you mean 'filter'?"),
    (lambda: new(granularity='neuron'), "did you mean 'filter'?"),
    (lambda: new(granularity='filters'), "did you mean 'filter'?"),
    (lambda: new(granularity='out_channels'), "did you mean 'filter'?"),
    (lambda: new(granularity='channel', coupled=True), "granularity='channel', expected 'filter', which prunes output channels"),
    (lambda: new(granularity='2:4'), "did you mean context='2:4'?"),
    (lambda: new(granularity='block'), r"did you mean block\(4, 4\)?"),
    (lambda: new(context='layerwise'), "context: got 'layerwise', .*; did you mean 'local'?"),
    (lambda: new(context='layer-wise'), "did you mean 'local'?"),
    (lambda: new(context='uniform'), "did you mean 'local'?"),
    (lambda: new(context='network'), "did you mean 'global'?"),
    (lambda: new(context='erdos_renyi'), "did you mean 'er'?"),
    (lambda: new(context='row-wise'), r"did you mean within\('O'\)?"),
    (lambda: new(context='2-4'), "did you mean '2:4'?"),
    (lambda: SparsifyCallback(50, schedule='agp'), "schedule: got 'agp', .*; did you mean 'gradual'?"),
    (lambda: SparsifyCallback(50, schedule='cubic'), "did you mean 'gradual'?"),
    (lambda: SparsifyCallback(50, schedule='polynomial'), "did you mean 'gradual'?"),
    (lambda: SparsifyCallback(50, schedule='one-shot'), "did you mean 'one_shot'?"),
    (lambda: SparsifyCallback(50, schedule='dsd'), "did you mean 'dense_sparse_dense'?"),
    (lambda: new(criterion='magnitude'), 'criterion: got an argument of this name, expected one of model, .*; did you mean criteria=?'),
    (lambda: SparsifyCallback(50, criterion='l1'), 'did you mean criteria=?'),
    (lambda: SparsifyCallback(amount=50), 'did you mean sparsity=?'),
    (lambda: SparsifyCallback(50, sched_func='agp'), 'did you mean schedule=?'),
    (lambda: SparsifyCallback(50, start=.2), r'did you mean schedule=gradual\(start=.1, end=.75\)?'),
    (lambda: SparsifyCallback(50, start_epoch=2), r'did you mean schedule=gradual\(start=epochs\(2\), end=epochs\(8\)\)?'),
    (lambda: SparsifyCallback(50, frequency=100), r'did you mean schedule=gradual\(every=steps\(100\)\)?'),
    (lambda: SparsifyCallback(50, initial_sparsity=20), r'did you mean schedule=gradual\(initial=50\)?'),
    (lambda: new(example_inputs=1), 'did you mean example=?'),
    (lambda: new(granularty='filter'), "did you mean 'granularity'?"),
    (lambda: new().prune(50), r"Sparsifier has no 'prune'; did you mean sparsify_model\(50\)?"),
    (lambda: new().sparsify(50), r'did you mean sparsify_model\(50\)?'),
    (lambda: new().get_sparsity(), r'did you mean report\(\)?'),
    (lambda: new().remove(), r'did you mean detach\(\)'),
    (lambda: new().sparsify_modell(50), "did you mean 'sparsify_model'?"),
    (lambda: cut(.5), 'sparsity: got 0.5, expected 0, or 1 to 100 percent: write 50 for 50 %'),
    (lambda: cut('50%'), "sparsity: got '50%', expected a number from 0 to 100, the percentage of zeros; did you mean 50?"),
    (lambda: cut(-1), 'expected a number from 0 to 100'),
]


@pytest.mark.parametrize('typed, says', TYPED, ids=[says[:40] for _, says in TYPED])
def test_what_people_type_is_answered_by_what_to_write(typed, says):
    with pytest.raises((ValueError, TypeError, AttributeError), match=says.replace('?', r'\?')): typed()


NAMES = {'block': block, 'head': lambda n: head(2), 'within': within, 'gradual': gradual, 'steps': steps}


@pytest.mark.parametrize('argument', VALUES)
def test_a_synonym_means_something_that_there_is(argument):
    "What the hint says can be written: it is tried."
    read = {'granularity': lambda v: new(granularity=v, layers='0'), 'context': lambda v: new(context=v, layers='3'),
            'criteria': lambda v: new(criteria=v, data=[], loss_func=print), 'repair': lambda v: new(repair=v, data=[]),
            'regrow': lambda v: new(regrow=v), 'schedule': lambda v: SparsifyCallback(50, schedule=v),
            'recipe': lambda v: SparsifyCallback(50, recipe=v)}[argument]
    for meant in VALUES[argument].values():
        if meant.startswith('context='): continue  # it belongs to another argument, and is tried there
        read(eval(meant.split(',')[0] if meant.startswith('head') else meant, NAMES))


def test_names_of_arguments_and_methods_mean_something_that_there_is():
    functions = Sparsifier, SparsifyCallback, Sparsifier.attach
    known = {name for function in functions for name in inspect.signature(function).parameters}
    assert {meant.split('=')[0] for meant in ARGUMENTS.values()} <= known
    for meant in METHODS.values(): assert hasattr(new(), re.match(r'\w+', meant)[0])


def test_an_argument_that_is_there_is_no_synonym():
    known = {*inspect.signature(Sparsifier).parameters, *inspect.signature(SparsifyCallback).parameters}
    assert known & set(ARGUMENTS) == {'ms', 'bytes'}  # of the callback, and not of attach
    assert not set(METHODS) & set(dir(new()))
    tables = {'granularity': GRANULARITIES, 'context': CONTEXTS, 'criteria': CRITERIA, 'schedule': SCHEDULES, 'repair': REPAIRS}
    for argument, table in tables.items(): assert not set(table) & set(VALUES[argument])


# What an example means

class Takes(nn.Module):
    def forward(self, first, /, a=None, *rest, b=None): return first


class TakesAny(nn.Module):
    def forward(self, **kwargs): return kwargs


class Unreadable: forward = max


@pytest.mark.parametrize('example, model, args, kwargs', [
    (1, Takes(), (1,), {}),
    ((1, 2), Takes(), (1, 2), {}),
    ((), Takes(), (), {}),
    ([1, 2], Takes(), ([1, 2],), {}),
    (([1, 2], 3), Takes(), ([1, 2], 3), {}),
    ({'a': 1, 'b': 2}, Takes(), (), {'a': 1, 'b': 2}),
    ({'a': 1, 'c': 2}, Takes(), ({'a': 1, 'c': 2},), {}),
    ({'first': 1}, Takes(), ({'first': 1},), {}),  # it takes no keyword
    ({'rest': 1}, Takes(), ({'rest': 1},), {}),
    (({'a': 1},), Takes(), ({'a': 1},), {}),
    ({'x': 1}, TakesAny(), (), {'x': 1}),
    ({0: 1}, TakesAny(), ({0: 1},), {}),
    ({'key': 1}, Unreadable(), ({'key': 1},), {})])
def test_what_an_example_means(example, model, args, kwargs): assert read_example(example, model) == Inputs(args, kwargs)


def test_inputs_call_a_model_and_show_their_shapes():
    inputs = Inputs((1, torch.ones(2, 3), []), {'b': torch.ones(4)})
    assert str(inputs) == "[int, (2, 3), list, b=(4,)]"
    assert Inputs((1,), {'a': 2}).call(Takes()) == 1
