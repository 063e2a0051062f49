import pytest
import torch
from conftest import same, tensors_of

from fasterai.regrowth import LOWEST, by_position
from fasterai.sparsifier import Sparsifier


def test_pruned_groups_are_alike_and_below_all_others():
    scores = torch.tensor([-3e38, 2, 5, 1])
    found = by_position(scores, torch.tensor([False, True, False, True]))
    assert found.tolist() == [scores[0].item(), LOWEST, 5, LOWEST]
    assert LOWEST < found[0]
    assert scores.tolist()[1:] == [2, 5, 1]  # those that were given are as they were


@pytest.mark.parametrize('regrow', [lambda: 1, lambda scores: scores, 7, None])
def test_what_is_no_regrowth_is_refused(net, regrow):
    with pytest.raises(TypeError, match='regrow: got .*function of scores and pruned'): Sparsifier(net, regrow=regrow)


@pytest.mark.parametrize('regrow', [lambda scores, pruned: None, lambda scores, pruned: 7, lambda scores, pruned: scores[:1]])
def test_a_regrowth_that_returns_something_else_is_refused(net, regrow):
    sparsifier = Sparsifier(net, regrow=regrow)
    sparsifier.sparsify_model(50)
    before = tensors_of(sparsifier)
    with pytest.raises(ValueError, match='regrow: <lambda> returned .*expected scores'): sparsifier.sparsify_model(20, regrow=True)
    assert same(before, tensors_of(sparsifier))


@pytest.mark.parametrize('regrow', ['no', 'position', 1, None, float('nan')])
def test_only_a_bool_lets_weights_come_back(net, regrow):
    sparsifier = Sparsifier(net)
    sparsifier.sparsify_model(50)
    before = tensors_of(sparsifier)
    with pytest.raises(TypeError, match='regrow: got .*expected True or False'): sparsifier.sparsify_model(20, regrow=regrow)
    assert same(before, tensors_of(sparsifier))
