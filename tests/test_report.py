import torch
from torch import nn

from fasterai.sparsifier import Sparsifier


def pruned():
    net = nn.Sequential(nn.Conv2d(1, 4, 2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight[:2] = 0  # 8 of 16 weights, 2 of 4 filters
        net[3].weight[0, 0] = 0
    return net


def test_the_numbers_are_counted_in_the_weights():
    report = Sparsifier(pruned(), 'filter', layers=['0', '3']).report()
    assert [(r.layer, r.kind, r.shape, r.weights, r.zeros, r.sparsity, r.groups, r.dead) for r in report.rows] == [
        ('0', 'Conv2d', (4, 1, 2, 2), 16, 8, 50., 4, 2), ('3', 'Linear', (2, 4), 8, 1, 12.5, 2, 0)]
    assert (report.weights, report.zeros, report.sparsity) == (24, 9, 37.5)
    assert (report.parameters, report.parameter_zeros) == (26, 9)


def test_a_report_is_a_value_and_the_next_one_is_new():
    sparsifier = Sparsifier(pruned())
    before = sparsifier.report()
    with torch.no_grad(): sparsifier.model[3].weight.zero_()
    assert before.zeros == 9 and sparsifier.report().zeros == 16


def test_text():
    text = str(Sparsifier(pruned(), 'filter').report())
    assert '4×1×2×2' in text and '50.00 %' in text and '2 of 4' in text
    assert "left alone: 3: makes the network's output" in text
    assert len({len(line) for line in text.splitlines()[:3]}) <= 2


def test_html_escapes_and_shows_every_cell():
    html = Sparsifier(pruned(), layers='0').report()._repr_html_()
    assert html.count('<tr>') == 4 and '50.00 %' in html and 'left alone: <code>3</code>: not chosen' in html


def test_frame():
    frame = Sparsifier(pruned()).report().to_frame()
    assert list(frame.columns) == ['layer', 'kind', 'shape', 'weights', 'zeros', 'sparsity', 'groups', 'dead']
    assert frame.zeros.tolist() == [8, 1] and frame.sparsity.tolist() == [50, 12.5]


def test_plot():
    ax = Sparsifier(pruned()).report().plot()
    assert [bar.get_width() for bar in ax.patches] == [50, 12.5]
    assert [t.get_text() for t in ax.get_yticklabels()] == ['0', '3']
    assert Sparsifier(pruned()).report().plot(ax=ax) is ax


def test_many_layers_left_alone_are_one_line():
    net = nn.Sequential(*[nn.Linear(2, 2) for _ in range(9)])
    assert str(Sparsifier(net, layers='0').report()).splitlines()[-1] == 'left alone: 1, 2, 3, 4 and 4 more: not chosen'
