from fasterai.tables import as_html, as_text

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
