"Models of which each of several processes has a part are pruned to the bit like whole ones. `shards.py` has the cases."
import pytest
import shards
import torch
from torch import multiprocessing


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('shards')


@pytest.fixture(scope='module')
def came(folder):
    "What came of each case: {number of processes: {name: [of rank 0, …]}}. Four processes are first: two load what they save."
    found = {}
    for n in (4, 2):
        multiprocessing.spawn(shards.run, (n, folder), nprocs=n)
        of_ranks = [torch.load(folder / f'{n}.{rank}.pt', weights_only=False) for rank in range(n)]
        found[n] = {name: [of_rank[name] for of_rank in of_ranks] for name in of_ranks[0]}
    return found


def of_each(cases): return [(n, name) for n in cases for name in cases[n]]


@pytest.mark.parametrize('n, name', of_each(shards.CASES))
def test_parts_are_pruned_like_the_whole(came, n, name): assert came[n][name] == ['equal'] * n


@pytest.mark.parametrize('n, name', of_each(shards.TRAINED))
def test_zeros_stay_in_training(came, n, name):
    first, *others = [of_rank[name] for of_rank in came[n]['trained']]
    assert others == [first] * (n - 1) and 55 < first['sparsity'] < 65


@pytest.mark.parametrize('n, name', of_each(shards.FAILING))
def test_all_ranks_raise_and_change_nothing(came, n, name):
    of_ranks = [of_rank[name] for of_rank in came[n]['failed']]
    assert all(got['raised'] and got['unchanged'] and 49 < got['later'] < 51 for got in of_ranks)
    said = {got['raised'][1] for got in of_ranks}
    assert any(text.startswith('ranks: ') for text in said) and len(said) == (1 if name == 'copies that differ' else 2)


def test_a_rank_that_dies_leaves_the_others_as_they_were(came):
    assert came[2]['death'][0]['said'].startswith('ranks: one cannot be reached') and came[2]['death'][0]['unchanged']


def test_as_many_exchanges_for_few_layers_as_for_many(came):
    few, many, of_all, of_many = came[2]['exchanges'][0]
    assert few == many <= 10 and of_all == of_many <= 16


def test_what_four_processes_save_two_and_one_load(came, folder):
    saved, = {str(of_rank): of_rank for of_rank in came[4]['saved']}.values()
    for of_rank in (*came[2]['loaded'], shards.loaded(folder, lambda model: model)):
        for name, masks in saved.items():
            for found in of_rank[name]:
                assert list(found) == list(masks) and all(torch.equal(found[layer], mask) for layer, mask in masks.items())
