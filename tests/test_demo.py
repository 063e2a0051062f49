import pytest
from matplotlib.image import imread

from fasterai.demo import main, options


def test_a_short_run(tmp_path, capsys):
    main(['--epochs', '2', '--sparsity', '80', '--out', str(tmp_path / 'pictures'), '--seed', '3'])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split('  ')[0]: line for line in lines if ' of ' in line and '%' in line}
    assert list(rows) == ['dense', 'weight, gradual', 'weight, one-shot', 'weight, iterative', 'filter, gradual']
    assert ' 0.00 %  56,224 of 56,224' in rows['dense']
    for name in list(rows)[1:4]: assert '80 %' in rows[name] and '80.00 %  11,245 of 56,224' in rows[name]
    assert '50.00 %  27,792 of 55,584' in rows['filter, gradual']
    for name in ('schedules', 'layers', 'granularity'):
        picture = imread(tmp_path / 'pictures' / f'{name}.png')
        assert picture.shape[1] == 900 and picture.std() > .1  # something is drawn


@pytest.mark.parametrize('arguments, says', [
    (['--sparsity', '.9'], 'write 90 for 90 %'), (['--sparsity', '101'], 'allowed is 0 to 100'), (['--epochs', '0'], '--epochs: got 0'),
    (['--seed', '-1'], '--seed: got -1'), (['--out', __file__], 'which cannot be made a folder')])
def test_bad_options_end_with_one_line(arguments, says, capsys):
    with pytest.raises(SystemExit): options(arguments)
    assert says in capsys.readouterr().err
