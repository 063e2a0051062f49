"The style of the house, as far as a machine can see it; `make lint` sees the rest."
import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / 'fasterai'
FILES = sorted(PACKAGE.rglob('*.py'))
WIDE = 110  # columns of code; a comment on an argument may be as wide as its meaning needs
every_file = pytest.mark.parametrize('file', FILES, ids=[str(f.relative_to(PACKAGE)) for f in FILES])


def without_docments(source):
    "The lines of a source, without the comments that follow code."
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row, column = token.start
        if token.type == tokenize.COMMENT and lines[row - 1][:column].strip(): lines[row - 1] = lines[row - 1][:column].rstrip()
    return lines


def nested(tree):
    "The lines of conditional expressions that have another one inside."
    outer = [node for node in ast.walk(tree) if isinstance(node, ast.IfExp)]
    return [node.lineno for node in outer if any(isinstance(n, ast.IfExp) for n in ast.walk(node) if n is not node)]


@every_file
def test_lines_are_not_wide(file):
    wide = [n for n, line in enumerate(without_docments(file.read_text(encoding='utf-8')), 1) if len(line) > WIDE]
    assert not wide


@every_file
def test_no_conditional_inside_another(file): assert not nested(ast.parse(file.read_text(encoding='utf-8')))


@every_file
def test_docstrings_stand_alone(file):
    "A noun clause, or one that leans on the line above, means nothing in a reference page."
    tree = ast.parse(file.read_text(encoding='utf-8'))
    kinds = ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef
    docs = {node.name: ast.get_docstring(node) or '' for node in ast.walk(tree) if isinstance(node, kinds)}
    leaning = ('What ', 'The same', 'Is it', 'Are ', 'Does ', 'Which ')
    assert not {name: doc for name, doc in docs.items() if doc.startswith(leaning)}


STALE = r'\b(quiet|silenc\w*|thin|outright)\b|lives? and dies?|live and die'  # words that only the house had


@every_file
def test_words_are_those_of_the_field(file): assert not re.findall(STALE, file.read_text(encoding='utf-8'))


@every_file
def test_errors_say_what_is_expected(file):
    text = file.read_text(encoding='utf-8')
    assert 'allowed is' not in text
    assert 'allowed are' not in text


def test_the_checks_see_what_they_are_for():
    assert len(without_docments('x = 1  # ' + 'y' * 200)[0]) == 5
    assert without_docments('# alone') == ['# alone']
    assert nested(ast.parse('a if b else (c if d else e)')) == [1]
    assert nested(ast.parse('(a if b else c), (d if e else f)')) == []
