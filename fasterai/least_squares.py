"Solve for the weights that stay: least squares with a mask of its own for each output."
import torch

DAMPING = .01  # of the mean of the diagonal of the Gram matrix
MORE, TRIES = 10, 12  # so many times more damping, so often, where a matrix is singular in spite of it
PIECE = 2 ** 26  # bytes of the matrices that are solved at once


def solve_kept(
    start: torch.Tensor,  # (outputs, inputs), float64: w₀, the weights as they are; zeros stay zero
    gram: torch.Tensor,  # (inputs, inputs), float64: G = XᵀX of the inputs X
    wanted: torch.Tensor,  # (inputs, outputs), float64: b = Xᵀy of the wanted outputs y
) -> torch.Tensor:  # (outputs, inputs), float64
    """Solve min wᵀGw − 2wᵀb + λ‖w − w₀‖² for each output, over the weights that are not zero.

    λ is a hundredth of the mean of the diagonal of G, and more where a matrix is singular all the same. An
    input that is always zero keeps its weight; an output that cannot be solved stays as it is, and with a
    Gram matrix that is zero or not finite all do."""
    ridge = DAMPING * float(gram.diagonal().mean())
    found = start.clone()
    if not 0 < ridge < torch.inf: return found
    for outputs, inputs, kept in _pieces(start != 0):
        at = outputs[:, None, :], inputs[:, :, None]  # (masks, inputs of a mask, outputs of a mask)
        old = start[at]
        right = wanted[inputs[:, :, None], outputs[:, None, :]] * kept[..., None]
        matrices = gram[inputs[:, :, None], inputs[:, None, :]]
        matrices[~kept] = 0  # what fills up is at the end, and only the lower triangle is read
        new = _solve(matrices, right, old, ridge)
        found[at] = torch.where(new == 0, old, new)  # what stays must not become zero by chance
    return found


def _pieces(masks):
    """Yield outputs that are solved at once: masks that as many outputs share, with about as many inputs.

    A piece is positions of outputs (masks, outputs of a mask), positions of inputs (masks, inputs), and the
    inputs of these that are kept: a mask of fewer inputs is filled up with others, that are zero and stay."""
    kinds, of, n_outputs = masks.unique(dim=0, return_inverse=True, return_counts=True)
    by_kind = of.argsort(stable=True)
    begins = n_outputs.cumsum(0) - n_outputs
    n_inputs = kinds.sum(1)
    for n in n_outputs.unique().tolist():
        same = ((n_outputs == n) & (n_inputs > 0)).nonzero()[:, 0]
        same = same[n_inputs[same].argsort(stable=True)]
        while len(same):
            longest = int(n_inputs[same[-1]])
            several = max(1, PIECE // (8 * longest ** 2))
            same, piece = same[:-several], same[-several:]
            outputs = by_kind[begins[piece][:, None] + torch.arange(n, device=of.device)]
            inputs = (~kinds[piece]).long().argsort(dim=1, stable=True)[:, :longest]
            yield outputs, inputs, kinds[piece].gather(1, inputs)


def _solve(matrices, right, old, ridge, tries=TRIES):
    "Solve (G + λ) w = b + λ w₀ for each matrix, with more damping where it is singular."
    diagonals = matrices.diagonal(dim1=1, dim2=2)
    diagonals += ridge
    factors, failed = torch.linalg.cholesky_ex(matrices)
    found = torch.cholesky_solve(right + ridge * old, factors)
    failed = (failed != 0) | ~found.isfinite().flatten(1).all(1)
    if not failed.any(): return found
    found[failed] = old[failed]
    if not tries: return found
    diagonals -= ridge
    found[failed] = _solve(matrices[failed], right[failed], old[failed], MORE * ridge, tries - 1)
    return found
