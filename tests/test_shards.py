"Models of which each of several processes has a part are pruned to the bit like whole ones. `shards.py` has the cases."
import pytest
import shards
import torch
from torch import multiprocessing


@pytest.fixture(scope='module')
def came(tmp_path_factory):
    "What came of each case: {number of processes: {name: [of rank 0, …]}}."
    folder, found = tmp_path_factory.mktemp('shards'), {}
    for n in shards.CASES:
        multiprocessing.spawn(shards.run, (n, folder), nprocs=n)
        of_ranks = [torch.load(folder / f'{n}.{rank}.pt', weights_only=False) for rank in range(n)]
        found[n] = {name: [of_rank[name] for of_rank in of_ranks] for name in of_ranks[0]}
    return found


@pytest.mark.parametrize('n, name', [(n, name) for n, cases in shards.CASES.items() for name in cases])
def test_parts_are_pruned_like_the_whole(came, n, name): assert came[n][name] == ['equal'] * n
