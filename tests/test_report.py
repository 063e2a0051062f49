import torch
from torch import nn

from fasterai.deploy.packing import pack
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
    assert len({len(line) for line in text.splitlines()[2:5]}) <= 2  # a table, below two sentences


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


def test_first_comes_what_is_zero_and_what_that_brings():
    net = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))  # 2,304 weights, 40 biases
    sparsifier = Sparsifier(net)
    sparsifier.sparsify_model(75)
    report = sparsifier.report()
    # (2048 + 256) / 8 bytes of masks, 576 weights that are left and 40 biases of 4 bytes
    assert (report.dense_bytes, report.sparse_bytes) == (9376, 288 + 4 * 576 + 160)
    assert str(report).splitlines()[:2] == [
        '75.00 % of 2,304 weights are zero.',
        'All parameters take 9,376 bytes, packed by save_sparse 2,752 (29.4 %).']
    assert report._repr_html_().startswith('<div>75.00 % of 2,304 weights are zero.\n')


def test_multiply_adds_are_said_where_they_are_known():
    net = nn.Sequential(nn.Conv2d(1, 4, 2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    sparsifier = Sparsifier(net, context='work', example=torch.zeros(1, 1, 3, 3))
    sparsifier.sparsify_model(50)
    report = sparsifier.report()
    assert report.multiply_adds == 4 * 16 + 32
    assert str(report).splitlines()[2] == f'{96 - report.saved:,} of 96 multiply-adds are left.'


def test_the_bytes_are_those_that_a_file_has():
    net = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 7, bias=False).half())
    with torch.no_grad():
        net[0].weight[:20] = -0.  # zeros with a sign, whose signs a file has
        net[0].bias[0] = 0  # smaller as it is
        net[1].weight[:, ::2] = 0
    parts = {}
    for name, value in net.state_dict().items(): pack(name, value, parts)
    report = Sparsifier(net).report()
    assert report.sparse_bytes == sum(part.nbytes for part in parts.values()) < report.dense_bytes == 30 * 164 + 420
