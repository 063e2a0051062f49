"Tables of strings, the first row being the head: as text, and as HTML."
from html import escape


def as_text(
    rows: list,  # of tuples of strings, all as long
    left: int = 1,  # columns that are aligned to the left, the others to the right
    foot: int = 0,  # rows at the end that a rule sets apart
) -> str:
    "With a rule below the head."
    rows = list(rows)
    wide = [max(map(len, column)) for column in zip(*rows)]
    lines = ['  '.join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, wide))).rstrip() for row in rows]
    rule = '─' * max(map(len, lines))
    lines.insert(1, rule)
    if foot: lines.insert(-foot, rule)
    return '\n'.join(lines)


def as_html(
    rows: list,  # of tuples of strings
    left: int = 1,  # columns that are aligned to the left
) -> str:
    "A table as a notebook shows it."
    def line(row, tag):
        cells = (f'<{tag} style="text-align:{"left" if i < left else "right"}">{escape(c)}</{tag}>' for i, c in enumerate(row))
        return f'<tr>{"".join(cells)}</tr>'
    head, *body = rows
    return f'<table><thead>{line(head, "th")}</thead><tbody>{"".join(line(row, "td") for row in body)}</tbody></table>'
