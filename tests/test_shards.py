"Models of which each of several processes has a part are pruned to the bit like whole ones. `shards.py` has the cases."
import signal

import pytest
import shards
import torch
from torch import multiprocessing


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('shards')


def of_rank(folder, name, rank): return torch.load(folder / f'{name}.{rank}.pt', weights_only=False)


@pytest.fixture(scope='module')
def came(folder):
    "What came of each case: {number of processes: {name: [of rank 0, …]}}. Four processes are first: others load what they save."
    found = {}
    for n, function in ((4, shards.run), (2, shards.run), (3, shards.load)):
        multiprocessing.spawn(function, (n, folder), nprocs=n)
        of_ranks = [of_rank(folder, n, rank) for rank in range(n)]
        found[n] = {name: [of_one[name] for of_one in of_ranks] for name in of_ranks[0]}
    return found


def of_each(cases): return [(n, name) for n in cases for name in cases[n]]


@pytest.mark.parametrize('n, name', of_each(shards.CASES))
def test_parts_are_pruned_like_the_whole(came, n, name): assert came[n][name] == ['equal'] * n


@pytest.mark.parametrize('n, name', of_each(shards.TRAINED))
def test_zeros_stay_in_training(came, n, name):
    first, *others = [of_one[name] for of_one in came[n]['trained']]
    assert others == [first] * (n - 1) and 55 < first['sparsity'] < 65


@pytest.mark.parametrize('n, name', of_each(shards.FAILING))
def test_all_ranks_raise_and_change_nothing(came, n, name):
    of_ranks = [of_one[name] for of_one in came[n]['failed']]
    assert all(got['raised'] and got['unchanged'] and 49 < got['later'] < 51 for got in of_ranks)
    said = {got['raised'][1] for got in of_ranks}
    assert any(text.startswith('ranks: ') for text in said) and len(said) == (1 if name == 'copies that differ' else 2)


def test_a_job_of_which_a_rank_is_killed_goes_on_from_its_state(came, folder):
    started = multiprocessing.spawn(shards.run_job, (2, folder, 'killed', {'dies': True}), nprocs=2, join=False)
    for process in started.processes: process.join()
    assert [process.exitcode for process in started.processes] == [0, -signal.SIGKILL]
    of_other = of_rank(folder, 'killed', 0)
    assert of_other['said'].startswith('ranks: one cannot be reached') and of_other['unchanged']
    multiprocessing.spawn(shards.run_job, (2, folder, 'resumed', {'resumes': True}), nprocs=2)
    for rank, whole in enumerate(came[2]['undisturbed']):
        resumed = of_rank(folder, 'resumed', rank)
        assert (whole['begun'], resumed['begun']) == (0, shards.SAVED_AT)
        assert resumed['bits'] == whole['bits'] and resumed['sparsity'] == whole['sparsity'] and 79.9 < whole['sparsity'] < 80.1


def test_as_many_exchanges_for_few_layers_as_for_many(came):
    few, many, of_all, of_many = came[2]['exchanges'][0]
    assert few == many <= 10 and of_all == of_many <= 16


def test_what_four_processes_save_one_two_and_three_load(came, folder):
    for name, (masks, gathered) in came[4]['saved'][0].items():
        steps = {'movement': 3, 'gradient': -1}.get(name)  # since the event none: -1
        assert {of[0] for of in gathered.values()} == ({steps} if steps else set())
        for of_one in (*came[2]['loaded'], *came[3]['loaded'], shards.loaded(folder, lambda model: model)):
            of_state, of_zeros, found = of_one[name]
            assert list(of_state) == list(of_zeros) == list(masks) and {*found} == {*gathered}
            assert all(torch.equal(of_state[layer], mask) and torch.equal(of_zeros[layer], mask) for layer, mask in masks.items())
            assert all(found[key][0] == n and torch.equal(found[key][1], total) for key, (n, total) in gathered.items())
