import pytest
import torch
from matplotlib.image import imread
from torch import nn

from fasterai.demo import digits_learner, main, network, options
from fasterai.deploy import load_sparse


def test_a_short_run(tmp_path, capsys):
    main(['--epochs', '2', '--sparsity', '80', '--out', str(tmp_path / 'pictures'), '--seed', '3'])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split('  ')[0]: line for line in lines if ' of 5' in line and '%' in line}
    assert list(rows) == ['dense', 'weight, gradual', 'weight, one-shot', 'weight, iterative', 'filter, gradual']
    assert ' 0.00 %  56,224 of 56,224' in rows['dense']
    for name in list(rows)[1:4]: assert '80 %' in rows[name] and '80.00 %  11,245 of 56,224' in rows[name]
    assert '50.00 %  27,792 of 55,584' in rows['filter, gradual']
    widths = {'training': 650, 'schedules': 900, 'layers': 900, 'granularity': 900, 'payoff': 900}
    for name, width in widths.items():
        picture = imread(tmp_path / 'pictures' / f'{name}.png')
        assert picture.shape[1] == width and picture.std() > .1  # something is drawn
    assert 'shrink: 80 filters of 3 layers removed; 56,554 parameters became 14,458 (25.6 %)' in lines
    load_sparse(network(), tmp_path / 'pictures' / 'weights.safetensors')


@pytest.mark.parametrize('arguments, says', [
    (['--sparsity', '.9'], 'write 90 for 90 %'),
    (['--sparsity', '101'], '--sparsity: got 101.0, '),
    (['--epochs', '0'], '--epochs: got 0, expected an integer of 1 or more'),
    (['--seed', '-1'], '--seed: got -1, expected an integer from 0 to 4294967295'),
    (['--out', __file__], 'which cannot be made a folder')])
def test_bad_options_end_with_one_line(arguments, says, capsys):
    with pytest.raises(SystemExit): options(arguments)
    assert says in capsys.readouterr().err


def test_the_learner_of_the_notebooks_is_the_same_each_time():
    first, again, other = digits_learner(), digits_learner(), digits_learner(seed=1)
    for a, b in zip(first.model.parameters(), again.model.parameters()): assert torch.equal(a, b)
    assert not torch.equal(first.model.output.weight, other.model.output.weight)
    assert torch.equal(first.dls.valid_ds.tensors[0], other.dls.valid_ds.tensors[0])
    assert isinstance(digits_learner(nn.Flatten).model, nn.Flatten)
