"The weights that stay, solved for masks of any kind: by the normal equations of each output alone."
import pytest
import torch

from fasterai import least_squares
from fasterai.least_squares import DAMPING, solve_kept


def problem(masks, rows=200):
    "Weights with zeros, the Gram matrix of random inputs, and what is wanted of them."
    outputs, inputs = masks.shape
    x, y = torch.randn(rows, inputs).double(), torch.randn(rows, outputs).double()
    return torch.randn(outputs, inputs).double() * masks, x.T @ x, x.T @ y


def one_by_one(start, gram, wanted):
    "Return the solution, an output after the other."
    found, ridge = start.clone(), DAMPING * gram.diagonal().mean()
    for row, w0, b in zip(found, start, wanted.T):
        kept = w0 != 0
        matrix = gram[kept][:, kept] + ridge * torch.eye(int(kept.sum())).double()
        row[kept] = torch.linalg.solve(matrix, b[kept] + ridge * w0[kept])
    return found


MASKS = {'each its own': torch.rand(20, 12) < .5, 'all alike': (torch.rand(12) < .5).expand(20, 12), 'all': torch.ones(20, 12).bool(),
         'in blocks': (torch.rand(5, 12) < .5).repeat_interleave(4, 0), 'some empty': (torch.rand(20, 12) < .5) & (torch.arange(20) % 3 > 0)[:, None],
         'of all sizes': torch.arange(12) < torch.arange(20)[:, None]}


@pytest.mark.parametrize('piece', [8 * 12 ** 2, 8 * 12 ** 2 * 5, 2 ** 26])
@pytest.mark.parametrize('name', MASKS)
def test_each_output_is_solved_over_what_it_keeps(name, piece, monkeypatch):
    monkeypatch.setattr(least_squares, 'PIECE', piece)
    given = problem(MASKS[name])
    torch.testing.assert_close(solve_kept(*given), one_by_one(*given))


def test_inputs_that_are_always_zero_keep_their_weights():
    start, gram, wanted = problem(torch.rand(6, 8) < .7)
    gram[2], gram[:, 2], wanted[2] = 0, 0, 0
    found = solve_kept(start, gram, wanted)
    torch.testing.assert_close(found[:, 2], start[:, 2])
    torch.testing.assert_close(found, one_by_one(start, gram, wanted))


def test_a_matrix_that_is_singular_is_damped_until_it_can_be_solved():
    "Rounding has made it indefinite: no fixed damping is enough. What could be solved is not damped more."
    masks = torch.ones(4, 6).bool()
    masks[:2, :2] = False
    start, gram, wanted = problem(masks)
    gram[0, 1] = gram[1, 0] = gram.diagonal().mean() * 5
    found = solve_kept(start, gram, wanted)
    assert found.isfinite().all() and not torch.equal(found[2:], start[2:])
    torch.testing.assert_close(found[:2], one_by_one(start, gram, wanted)[:2])
    assert torch.linalg.cholesky_ex(gram + DAMPING * gram.diagonal().mean() * torch.eye(6))[1]


@pytest.mark.parametrize('apart, refined', [(1, True), (1e-3, False), (1e-5, False)])
def test_factors_of_single_precision_are_enough_or_are_not_used(apart, refined, monkeypatch):
    "Inputs that are almost the same, with almost no damping, have no factors of single precision that help."
    monkeypatch.setattr(least_squares, 'DAMPING', 1e-13)
    damped, solved = [], least_squares._solve_damped
    monkeypatch.setattr(least_squares, '_solve_damped', lambda *args: damped.append(1) or solved(*args))
    masks = torch.rand(6, 40) < .6
    x = torch.randn(200, 1).double() + apart * torch.randn(200, 40).double()
    y = torch.randn(200, 6).double()
    start, gram, wanted = torch.randn(6, 40).double() * masks, x.T @ x, x.T @ y
    found, ridge = solve_kept(start, gram, wanted), least_squares.DAMPING * gram.diagonal().mean()
    missing = (wanted.T + ridge * start - found @ gram - ridge * found) * masks
    assert missing.norm() < 1e-10 * wanted.norm() and bool(damped) == (not refined)


@pytest.mark.parametrize('value', [0., torch.inf, torch.nan])
def test_without_a_sensible_matrix_nothing_moves(value):
    start, gram, wanted = problem(torch.rand(6, 8) < .7)
    assert torch.equal(solve_kept(start, gram * 0 + value, wanted), start) and torch.equal(solve_kept(start, gram, wanted * 0 + torch.nan), start)
