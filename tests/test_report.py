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
    assert html.count('<tr>') == 4 and '50.00 %' in html and 'left alone: 3: not chosen' in html


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


class Conv1D(nn.Module):
    "As transformers have it: a Linear with the inputs first."
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x): return x @ self.weight + self.bias


MOSTLY_LEFT_ALONE = 'most weights are left alone: 60 of 100 are in layers of unknown types: add_layer_type() or layers= includes them'


def test_a_model_of_mostly_unknown_layers_is_said_to_be_one():
    net = nn.Sequential(Conv1D(4, 10), Conv1D(10, 2), nn.Linear(2, 20), nn.BatchNorm1d(20))
    report = Sparsifier(net).report()
    assert str(report).splitlines()[-1] == MOSTLY_LEFT_ALONE and f'<div>{MOSTLY_LEFT_ALONE}</div>' in report._repr_html_()
    assert (report.unknown, report.matrices) == (60, 100)
    some = Sparsifier(net, layers=['1.weight', '2']).report()
    assert some.unknown == 40 and 'most weights' not in str(some)  # 40 of 100
    half = nn.Sequential(Conv1D(4, 10), nn.Linear(4, 10))
    assert 'most weights' not in str(Sparsifier(half).report())


def test_a_weight_that_is_tied_to_a_known_layer_is_known():
    net = nn.Sequential(nn.Linear(4, 10), Conv1D(4, 10), Conv1D(2, 3))
    net[1].weight = net[0].weight
    report = Sparsifier(net).report()
    assert (report.unknown, report.matrices) == (6, 46)
