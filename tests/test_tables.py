import pytest
from torch import nn

from fasterai.deploy.payoff import Payoff
from fasterai.fit_to import Fitted
from fasterai.report import Report
from fasterai.sensitivity import Sensitivity
from fasterai.sparsifier import Sparsifier
from fasterai.tables import Shown, as_html, as_text
from fasterai.tickets import Ticket

ROWS = [('layer', 'weights'), ('a', '1,000'), ('<b>', '2'), ('all', '1,002')]


def test_as_text():
    lines = as_text(iter(ROWS), foot=1).split('\n')
    assert lines == ['layer  weights', '─' * 14, 'a        1,000', '<b>          2', '─' * 14, 'all      1,002']


def test_columns_to_the_left():
    lines = as_text([('a', 'b'), ('1', '200'), ('20', '3')], left=2).split('\n')
    assert lines == ['a   b', '─' * 7, '1   200', '20  3']


def test_as_html():
    html = as_html(ROWS)
    assert html.count('<tr>') == 4 and html.count('<th ') == 2 and '&lt;b&gt;' in html
    assert '<td style="text-align:left">a</td><td style="text-align:right">1,000</td>' in html


class Result(Shown):
    title = 'a < b'
    def _cells(self): return [('layer', 'zeros'), ('conv', '5')]
    def _lines(self): return ['c & d']


def test_a_result_is_shown_alike_at_a_prompt_in_print_and_in_a_notebook():
    assert repr(Result()) == str(Result()) == 'a < b\nlayer  zeros\n────────────\nconv       5\nc & d'
    html = Result()._repr_html_()
    assert html.startswith('<div>a &lt; b</div><table>') and html.endswith('</table><div>c &amp; d</div>')


@pytest.mark.parametrize('kind', [Report, Sensitivity, Ticket, Fitted, Payoff], ids=lambda kind: kind.__name__)
def test_each_result_has_text_html_a_frame_and_a_picture(kind):
    assert kind.__repr__ is Shown.__repr__ and kind._repr_html_ is Shown._repr_html_
    assert callable(kind.to_frame) and callable(kind.plot)


def test_a_sparsifier_shows_its_arguments_and_its_report():
    sparsifier = Sparsifier(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3)), context='erk')
    sparsifier.sparsify_model(50)
    report = sparsifier.report()
    assert repr(sparsifier) == "Sparsifier(model, context='erk')"
    assert sparsifier._repr_html_() == f'<div>Sparsifier(model, context=&#x27;erk&#x27;)</div>{report._repr_html_()}'
    assert sparsifier.to_frame().equals(report.to_frame())
    assert [bar.get_width() for bar in sparsifier.plot().patches] == [r.sparsity for r in report.rows]
