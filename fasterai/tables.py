"Lay out tables of strings, as text and as HTML; the first row is the head."
from html import escape


def as_text(
    rows: list,  # tuples of strings, all of the same length
    left: int = 1,  # how many columns are aligned to the left, the others to the right
    foot: int = 0,  # how many rows at the end stand below a rule of their own
) -> str:
    "Return a table as text, with a rule below the head."
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows)]

    def line(row):
        cells = [_aligned(cell, width, i < left) for i, (cell, width) in enumerate(zip(row, widths))]
        return '  '.join(cells).rstrip()

    head, *body = map(line, rows)
    rule = '─' * max(map(len, (head, *body)))
    lines = [head, rule, *body]
    if foot: lines.insert(-foot, rule)
    return '\n'.join(lines)


def _aligned(cell, width, left): return cell.ljust(width) if left else cell.rjust(width)


def as_html(
    rows: list,  # tuples of strings, all of the same length
    left: int = 1,  # how many columns are aligned to the left, the others to the right
) -> str:
    "Return a table as HTML, as a notebook shows it."
    def cell(text, tag, side): return f'<{tag} style="text-align:{side}">{escape(text)}</{tag}>'

    def line(row, tag):
        cells = [cell(text, tag, 'left' if i < left else 'right') for i, text in enumerate(row)]
        return f'<tr>{"".join(cells)}</tr>'

    head, *body = rows
    lines = ''.join(line(row, 'td') for row in body)
    return f'<table><thead>{line(head, "th")}</thead><tbody>{lines}</tbody></table>'


class Shown:
    """Show a result as a table: as text where it is printed or stands at a prompt, as HTML in a notebook.

    A result has `_cells()`, the rows with the head first, and may have a `title` above it and `_lines()`
    below."""
    title = ''
    left = 1  # how many columns are aligned to the left

    def _cells(self): raise NotImplementedError

    def _lines(self): return []

    def _foot(self): return 0  # how many rows at the end stand below a rule of their own

    def __repr__(self):
        table = as_text(self._cells(), self.left, self._foot())
        return '\n'.join([*([self.title] if self.title else []), table, *self._lines()])

    def _repr_html_(self):
        above = f'<div>{escape(self.title)}</div>' if self.title else ''
        below = ''.join(f'<div>{escape(line)}</div>' for line in self._lines())
        return above + as_html(self._cells(), self.left) + below
