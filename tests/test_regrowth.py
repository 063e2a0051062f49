import torch

from fasterai.regrowth import LOWEST, by_position


def test_pruned_groups_are_alike_and_below_all_others():
    scores = torch.tensor([-3e38, 2, 5, 1])
    found = by_position(scores, torch.tensor([False, True, False, True]))
    assert found.tolist() == [scores[0].item(), LOWEST, 5, LOWEST]
    assert LOWEST < found[0]
    assert scores.tolist()[1:] == [2, 5, 1]  # those that were given are as they were
