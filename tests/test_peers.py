import numpy as np
import torch

from fasterai.peers import ALONE


def test_tensors_and_arrays_come_to_the_host_as_they_are():
    pieces = [torch.arange(3), np.arange(4.), torch.tensor([], dtype=torch.float32)]
    found = ALONE.fetched(pieces)
    assert all(isinstance(piece, np.ndarray) for piece in found)
    assert [piece.tolist() for piece in found] == [[0, 1, 2], [0, 1, 2, 3], []]


def test_what_is_far_is_fetched_in_one_piece_from_each_device(monkeypatch):
    "Tensors of the CPU are treated as a GPU's."
    monkeypatch.setattr(ALONE, 'on_host', lambda tensor: False)
    copies, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, 'cpu', lambda tensor: copies.append(len(tensor)) or cpu(tensor))
    found = ALONE.fetched([torch.arange(3), np.arange(2), torch.arange(5)])
    assert [piece.tolist() for piece in found] == [[0, 1, 2], [0, 1], [0, 1, 2, 3, 4]]
    assert copies == [8]


def test_arrays_are_sent_in_one_piece_to_each_device():
    meta = torch.device('meta')  # the only other device that every machine has
    here = torch.ones(2)
    found = ALONE.sent([np.ones(3), here, np.ones(4)], [meta, torch.device('cpu'), meta])
    assert found[1] is here
    assert [(piece.device.type, len(piece)) for piece in found] == [('meta', 3), ('cpu', 2), ('meta', 4)]


def test_counts():
    mask = torch.tensor([True, False, True])
    assert ALONE.count(mask) == ALONE.count(mask.numpy()) == 2
