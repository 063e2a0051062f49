"Solve for the weights that stay: least squares with a mask of its own for each output."
import torch

DAMPING = .01  # of the mean of the diagonal of the Gram matrix
MORE, TRIES = 10, 12  # so many times more damping, so often, where a matrix is singular in spite of it
PIECE = 2 ** 25  # bytes of the matrices that are solved at once
REFINED, STEPS = 1e-13, 8  # an error, as a share of the right side, that is none; how often it is made smaller


def solve_kept(
    start: torch.Tensor,  # (outputs, inputs), float64: w₀, the weights as they are; zeros stay zero
    gram: torch.Tensor,  # (inputs, inputs), float64: G = XᵀX of the inputs X
    wanted: torch.Tensor,  # (inputs, outputs), float64: b = Xᵀy of the wanted outputs y
) -> torch.Tensor:  # (outputs, inputs), float64
    """Solve min wᵀGw − 2wᵀb + λ‖w − w₀‖² for each output, over the weights that are not zero.

    λ is a hundredth of the mean of the diagonal of G, and more where a matrix is singular all the same. An
    input that is always zero keeps its weight; an output that cannot be solved stays as it is, and with a
    Gram matrix that is zero or not finite all do. Matrices are factored in single precision, and the
    solutions refined to double, which takes half of the time; where that does not do, in double."""
    mean, found = float(gram.diagonal().mean()), start.clone()
    if not 0 < mean < torch.inf: return found
    gram, wanted = gram / mean, wanted / mean
    for outputs, inputs, kept in _pieces(start != 0):
        at = outputs[:, None, :], inputs[:, :, None]  # (masks, inputs of a mask, outputs of a mask)
        old, system = start[at], _System(gram, inputs, kept)
        right = wanted[inputs[:, :, None], outputs[:, None, :]] * kept[..., None]
        new = _solve(system, right, old)
        found[at] = torch.where(new == 0, old, new)  # what stays must not become zero by chance
    return found


class _System:
    "Hold the equations of some masks: the rows and columns of the Gram matrix that each keeps."

    def __init__(self, gram, inputs, kept): self.gram, self.inputs, self.kept = gram, inputs, kept

    def of(self, some): return _System(self.gram, self.inputs[some], self.kept[some])

    def damped(self, ridge, dtype):
        "Return the matrices (masks, inputs of a mask, inputs of a mask), of which the lower triangle counts."
        gram, n = self.gram.to(dtype), self.inputs.shape[1]
        matrices = gram.new_empty(len(self.inputs), n, n)
        for inputs, matrix in zip(self.inputs, matrices):
            torch.index_select(gram.index_select(0, inputs), 1, inputs, out=matrix)
        masks, filled = (~self.kept).nonzero(as_tuple=True)  # at the end of each
        if len(masks): matrices[masks, filled] = 0
        matrices.diagonal(dim1=1, dim2=2).add_(ridge)
        return matrices

    def times(self, weights):
        "Return the product with weights (masks, inputs of a mask, outputs of a mask)."
        inputs = self.inputs[:, None].expand(-1, weights.shape[2], -1)
        rows = weights.new_zeros(*inputs.shape[:2], len(self.gram))
        rows.scatter_(2, inputs, weights.transpose(1, 2))
        return (rows @ self.gram).gather(2, inputs).transpose(1, 2) * self.kept[..., None]


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
            several = max(1, PIECE // (4 * longest ** 2))
            same, piece = same[:-several], same[-several:]
            outputs = by_kind[begins[piece][:, None] + torch.arange(n, device=of.device)]
            inputs = (~kinds[piece]).long().argsort(dim=1, stable=True)[:, :longest]
            yield outputs, inputs, kinds[piece].gather(1, inputs)


def _solve(system, right, old):
    "Solve (G + λ) w = b + λ w₀ for each mask."
    found = _solve_refined(system, right + DAMPING * old)
    far = ~found.isfinite().flatten(1).all(1)
    if far.any(): found[far] = _solve_damped(system.of(far), right[far], old[far], DAMPING, TRIES)
    return found


def _solve_refined(system, right):
    """Solve (G + λ) w = b by factors of single precision, again and again for what is missing.

    It is iterative refinement (Wilkinson 1963). What does not come near enough is NaN."""
    factors, failed = torch.linalg.cholesky_ex(system.damped(DAMPING, torch.float32))
    found, missing, enough = 0, right, REFINED * right.norm(dim=1)
    for _ in range(STEPS):
        half = torch.linalg.solve_triangular(factors, missing.float(), upper=False)
        found = found + torch.linalg.solve_triangular(factors.mT, half, upper=True).double()
        missing = right - system.times(found) - DAMPING * found
        far = ~(missing.norm(dim=1) <= enough).all(1)
        if not far.any(): break
    found[far | (failed != 0)] = torch.nan
    return found


def _solve_damped(system, right, old, ridge, tries):
    "Solve (G + λ) w = b + λ w₀ in double precision, with more damping where a matrix is singular."
    factors, failed = torch.linalg.cholesky_ex(system.damped(ridge, torch.float64))
    found = torch.cholesky_solve(right + ridge * old, factors)
    failed = (failed != 0) | ~found.isfinite().flatten(1).all(1)
    if not failed.any(): return found
    found[failed] = old[failed]
    if not tries: return found
    found[failed] = _solve_damped(system.of(failed), right[failed], old[failed], MORE * ridge, tries - 1)
    return found
