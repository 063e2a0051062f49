
import inspect
import pickle
from copy import deepcopy
from dataclasses import FrozenInstanceError, fields

import pytest
from conftest import same, tensors_of
from fastcore.docments import docments
from torch import nn

from fasterai.callback import SparsifyCallback
from fasterai.granularity import block, head
from fasterai.rules import Rules
from fasterai.sparsifier import Sparsifier


@pytest.mark.parametrize('arguments, error, says', [
    (dict(granularity='filtr'), ValueError, "granularity: got 'filtr'.*did you mean 'filter'"),
    (dict(context='globl'), ValueError, "context: got 'globl', expected one of local, global.*did you mean 'global'"),
    (dict(criteria='magnitud'), ValueError, "criteria: got 'magnitud', expected one of magnitude, gradient.*did you mean 'magnitude'"),
    (dict(criteria=lambda hessian: hessian), ValueError, "asks for 'hessian'"),
    (dict(layers='conv9'), ValueError, "layers: got 'conv9'"),
    (dict(granularity=('I', 'kh')), ValueError, "granularity: got axis 'kh', expected for Linear '8'")])
def test_bad_arguments_are_refused_when_built(net, arguments, error, says):
    with pytest.raises(error, match=says): Sparsifier(net, **arguments)


@pytest.mark.parametrize('sparsity, error, says', [
    (-1, ValueError, 'expected a number from 0 to 100'), (101, ValueError, 'expected a number from 0 to 100'), (.9, ValueError, 'write 90 for 90 %'),
    (True, TypeError, 'got True'), ('90', TypeError, "got '90'"), (float('nan'), ValueError, 'got nan'), (None, TypeError, 'got None'),
    ({}, ValueError, 'got an empty dict'), ({'3': .5}, ValueError, r"sparsity\['3'\]: got 0.5"),
    ({'conv9': 50}, ValueError, "sparsity: got 'conv9', which means none of the layers")])
def test_bad_sparsities_are_refused(net, sparsity, error, says):
    sparsifier = Sparsifier(net)
    before = tensors_of(sparsifier)
    with pytest.raises(error, match=says): sparsifier.sparsify_model(sparsity)
    with pytest.raises(ValueError, match='share: got 1.5, expected a number from 0 to 1'): sparsifier.sparsify_model(50, share=1.5)
    assert same(before, tensors_of(sparsifier))


def test_min_keep_is_a_floor_for_each_layer(net):
    Sparsifier(net, layers=['0', '3', '8'], min_keep=.3).sparsify_model(60)
    for i in (0, 3, 8): assert int((net[i].weight != 0).sum()) >= .3 * net[i].weight.numel()
    assert sum(int((net[i].weight == 0).sum()) for i in (0, 3, 8)) == round(.6 * sum(net[i].weight.numel() for i in (0, 3, 8)))
    Sparsifier(net, layers='8', min_keep=5).sparsify_model(100)
    assert int((net[8].weight != 0).sum()) == 5
    Sparsifier(net, layers='8', min_keep=0).sparsify_model(99)
    assert int((net[8].weight != 0).sum()) == 1


@pytest.mark.parametrize('arguments, sparsity, says', [
    (dict(context='2:4'), 75, "sparsity: got 75, expected 50, which context='2:4' implies"),
    (dict(context='1:4'), {'0': 75, '8': 50}, r"sparsity\['8'\]: got 50, expected 75, which context='1:4' implies"),
    (dict(context='2:4', granularity='kernel'), 50, "granularity: got 'kernel', expected 'weight' with context='2:4'"),
    (dict(context='2:4', layers='1.bias'), 50, "got '2:4', but '1.bias' has no axis I, only d0"),
    (dict(context='2:4', min_keep=3), 50, "min_keep: got 3, expected None with context='2:4'"),
    (dict(min_keep=1.5), 50, 'min_keep: got 1.5, expected a whole number of weights, or a share between 0 and 1'),
    (dict(min_keep=True), 50, 'min_keep: got True'), (dict(min_keep=-1), 50, 'min_keep: got -1')])
def test_what_does_not_go_together_is_refused(net, arguments, sparsity, says):
    with pytest.raises(ValueError, match=says): Sparsifier(net, **arguments).sparsify_model(sparsity)
    assert not any((p == 0).all() for n, p in net.named_parameters() if n.endswith('weight'))


def test_a_pattern_takes_its_sparsity_rounded():
    model = nn.Sequential(nn.Linear(48, 4))
    for sparsity in (200 / 3, 66.67, 66.7): Sparsifier(model, context='1:3').sparsify_model(sparsity)
    assert int((model[0].weight != 0).sum()) == 64
    with pytest.raises(ValueError, match="got 66, expected 66.67, which context='1:3' implies"): Sparsifier(model, context='1:3').sparsify_model(66)


def test_min_keep_is_counted_as_it_was_written():
    model = nn.Sequential(nn.Linear(10, 10))
    Sparsifier(model, context='local', min_keep=.07).sparsify_model(95)
    assert int((model[0].weight != 0).sum()) == 7


# One frozen value

CHOSEN = [{}, dict(granularity='filter', coupled=True), dict(granularity=('I', 'kh'), context='2:4'),
          dict(granularity=block(4, 4), layers=['0', 'conv*'], min_keep=.05), dict(context='erk', criteria='gradient')]


@pytest.mark.parametrize('chosen', CHOSEN)
def test_it_prints_as_one_types_it(chosen):
    rules = Rules(**chosen)
    assert rules.given == chosen
    assert eval(repr(rules), {'Rules': Rules, 'block': block}) == rules


@pytest.mark.parametrize('chosen', CHOSEN)
def test_copies_are_equal(chosen):
    rules = Rules(**chosen)
    for copy in (deepcopy(rules), pickle.loads(pickle.dumps(rules))):
        assert copy == rules
        assert copy.criterion == rules.criterion


def test_it_is_frozen():
    with pytest.raises(FrozenInstanceError): Rules().context = 'local'


def test_the_sparsifier_prints_as_one_types_it(net):
    assert repr(Sparsifier(net)) == 'Sparsifier(model)'
    assert repr(Sparsifier(net, 'filter', min_keep=3, layers='0')) == "Sparsifier(model, granularity='filter', layers='0', min_keep=3)"


def test_sparsifier_and_callback_take_the_same_rules():
    "Each rule is an argument of both, with the same default and, but for `layers`, the same words."
    ours, theirs = inspect.signature(Sparsifier).parameters, inspect.signature(SparsifyCallback).parameters
    words, other_words = docments(Sparsifier), docments(SparsifyCallback)
    for field in fields(Rules):
        assert ours[field.name].default == theirs[field.name].default == field.default
        if field.name != 'layers': assert words[field.name] == other_words[field.name]


@pytest.mark.parametrize('wrong', [dict(granularity='filtr'), dict(context='globl'), dict(criteria='magnitud'), dict(regrow='positon'),
                                   dict(min_keep=-1), dict(coupled=True)])
def test_errors_come_when_rules_are_made(wrong):
    with pytest.raises(ValueError, match=f'{next(iter(wrong))}: got'): Rules(**wrong)


def test_layers_of_a_generator_are_kept():
    rules = Rules(layers=(name for name in ['0', '3']))
    assert rules.layers == ['0', '3']
    assert deepcopy(rules) == rules


def test_a_default_by_another_string_is_a_default():
    assert Rules(granularity=''.join(['wei', 'ght'])).given == {}


def test_a_new_rule_is_an_argument_of_both():
    "A field of `Rules` that neither names itself is added to both signatures, with its words."
    named = {'granularity', 'context', 'criteria', 'layers'}
    for name in {field.name for field in fields(Rules)} - named:
        for thing in (Sparsifier, SparsifyCallback):
            assert inspect.signature(thing).parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
            assert docments(thing)[name]


@pytest.mark.parametrize('coupled', ['yes', float('nan'), 1, None, 0])
def test_coupled_is_a_bool(coupled):
    for make in (Rules, lambda **given: SparsifyCallback(50, **given)):
        with pytest.raises(TypeError, match='coupled: got .*expected True or False'): make(granularity='filter', coupled=coupled)


@pytest.mark.parametrize('min_keep', [10 ** 9, 432, .9999999])
def test_a_floor_under_which_nothing_can_be_pruned_is_refused(net, min_keep):
    with pytest.raises(ValueError, match='min_keep: got .*expected fewer than the 432 weights of the largest layer'): Sparsifier(net, min_keep=min_keep)


def test_a_layer_below_the_floor_stays_whole(net):
    sizes = {i: net[i].weight.numel() for i in (0, 3, 8)}
    Sparsifier(net, min_keep=sizes[8], layers=['0', '3', '8']).sparsify_model(20)
    assert [int((net[i].weight == 0).sum()) for i in (0, 3, 8)] == [0, round(.2 * sum(sizes.values())), 0]


@pytest.mark.parametrize('granularity', ['filter', 'channel', 'layer', 'horizontal_slice', 'vertical_slice', block(4, 4), head(2)])
def test_what_never_goes_with_a_pattern_is_said_when_built(granularity):
    for make in (Rules, lambda *given: SparsifyCallback(50, *given)):
        with pytest.raises(ValueError, match="granularity: got .*, expected 'weight' with context='2:4'"): make(granularity, '2:4')


def test_what_may_go_with_a_pattern_is_left_to_the_layers():
    for granularity in ('weight', 'kernel', 'vector', block(1, 1), ('kh',), lambda axes: ()): Rules(granularity, '2:4')
    Sparsifier(nn.Sequential(nn.Linear(8, 4)), 'kernel', '2:4').sparsify_model(50)


@pytest.mark.parametrize('context', ['lamp', 'normalized'])
def test_whole_layers_are_not_compared_within_themselves(context):
    for make in (Rules, lambda *given: SparsifyCallback(50, *given)):
        with pytest.raises(ValueError, match='granularity: got .layer., expected one with several groups a layer'): make('layer', context)


def test_a_dict_of_layers_is_refused_when_built():
    for make in (Rules, lambda layers: SparsifyCallback(50, layers=layers)):
        with pytest.raises(TypeError, match="layers: got {'0': 50}, .*sparsity="): make(layers={'0': 50})


@pytest.mark.parametrize('layers', [3, None, [3], ['0', None], [[]]])
def test_what_is_no_layer_is_refused_when_built(layers):
    wrong = layers if layers is not None else [None]
    for make in (Rules, lambda layers: SparsifyCallback(50, layers=layers)):
        with pytest.raises(TypeError, match='layers: got .*expected a type, a name or glob'): make(layers=wrong)
    with pytest.raises(TypeError, match='sparsity: got 3, expected a type, a name or glob'): SparsifyCallback({3: 50})
