"Two processes that hold the same model: their masks are equal, or all raise and change nothing. `ranks.py` has the cases."
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from torch import multiprocessing

EXAMPLES = Path(__file__).parent.parent / 'examples'


@pytest.fixture(scope='module')
def came(tmp_path_factory):
    "What came of each case: {name: [of rank 0, of rank 1]}."
    folder = tmp_path_factory.mktemp('ranks')
    multiprocessing.spawn(ranks.run, (folder,), nprocs=2)
    first, second = (torch.load(folder / f'{rank}.pt', weights_only=False) for rank in (0, 1))
    return {name: [first[name], second[name]] for name in first}


def test_all_ranks_come_to_the_same(came):
    cases = {name: came[name] for name in ranks.EQUAL}
    assert {name: a['error'] for name, (a, _) in cases.items() if 'error' in a} == {}
    assert len(cases) == 23 and [name for name, (a, b) in cases.items() if a != b] == []
    assert all(a['held'] for a, _ in cases.values())
    counted = {name: round(a['sparsity'], 2) for name, (a, _) in cases.items()}
    assert counted['random'] == counted['magnitude, global'] == 80 and counted['weights come back at random'] == 60
    assert cases['zero_redundancy'][0]['dead momenta'] == 0
    assert cases['driven_by_an_optimizer'][0]['sparsity'] == cases['driven_by_zero_redundancy'][0]['sparsity'] == 60


@pytest.mark.parametrize('name', ranks.RAISING)
def test_all_ranks_raise_and_change_nothing(came, name):
    for rank, got in enumerate(came[name]):
        assert 'error' not in got
        assert got['unchanged'] and got.get('masks unchanged', True)
        assert got['raised'] or name == 'event_of_one_rank' and rank == 1
    of_others = came[name][0]['raised']
    assert of_others[1].startswith('ranks: ')
    if 'later' in came[name][0]:
        a, b = (got['later'] for got in came[name])
        assert a == b and a['sparsity'] == 50


def test_the_error_names_what_differs_or_failed(came):
    said = {name: [got['raised'] for got in came[name]] for name in ranks.RAISING}
    assert said['other zeros at attach'][0] == said['other zeros at attach'][1]
    assert said['other zeros at attach'][0][0] == 'RuntimeError' and "masks of '7' on rank 1" in said['other zeros at attach'][0][1]
    assert "repaired values of '0.weight' (and of 2 more)" in said['repaired by other data'][0][1]
    assert said['a criterion fails'] == [('ValueError', 'ranks: rank 1 failed, so nothing was changed on any: ValueError: no luck'),
                                         ('ValueError', 'no luck')]
    assert said['a criterion fails by TypeError'][0][0] == 'RuntimeError'  # in a fit ValueError may be told at the end


def test_a_rank_that_dies_leaves_the_others_as_they_were(came):
    (kind, said), _ = came['death'][0]['raised'], came['death'][1]['left']
    assert kind == 'RuntimeError' and said.startswith('ranks: one cannot be reached') and came['death'][0]['unchanged']


def test_what_cannot_be_done_with_parts_of_a_model_is_refused(came):
    for got in came['shards']:
        assert len(got) == 17
        assert {name: error for name, error in got.items() if error[0] != ('TypeError' if name == 'a copy' else 'ValueError')} == {}
        assert [name for name, (_, said) in got.items() if 'split over processes' not in said] == []


def test_fits_in_distrib_ctx_come_to_the_same(came):
    "On a CPU: `indices` takes the place of a method of `DistributedDL` that calls `.cuda()`."
    pytest.importorskip('accelerate')
    of_0, of_1 = came['fastai']
    assert [name for name in of_0 if 'raised' not in of_0[name] and of_0[name] != of_1[name]] == []
    assert [of_0[name]['sparsity'] for name in ('magnitude', 'gradient', 'random', 'data')] == [80] * 4
    assert [name for name in of_0 if 'raised' in of_0[name]] == [name for name in of_1 if 'raised' in of_1[name]] == ['a rank fails', 'other zeros']
    assert 'rank 1 failed' in of_0['a rank fails']['raised'][1] and "masks of '0' on rank 1" in of_0['other zeros']['raised'][1]


def test_models_and_optimizers_that_accelerate_has_prepared(came):
    pytest.importorskip('accelerate')
    of_0, of_1 = came['accelerate']
    assert of_0 == of_1 and all(got['held'] and got['sparsity'] == 80 for got in of_0.values())


@pytest.mark.parametrize('script, needs', [('ddp.py', 'torch'), ('fsdp.py', 'torch'), ('fastai_ddp.py', 'accelerate')])
def test_the_examples_reach_their_sparsity(script, needs):
    pytest.importorskip(needs)
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    done = subprocess.run([*torchrun, EXAMPLES / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith(('selected weights', 'sparsity: '))]
    assert len(said) == 1 and '90.00 %' in said[0]  # the first process alone says it
