"Take the Fisher information for the second derivative of the loss, and solve with it: Optimal Brain Surgeon."
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

WHOLE = 2048  # weights: so many together have one matrix, across layers; more are split into blocks
BLOCK = 128  # neighbouring weights that make a block
SAMPLES = 16  # whose products are added up at a time
MEMORY = 1 << 28  # bytes that the blocks of several layers may take together; a layer has what it needs
DAMPING = .01  # of the mean of the diagonal; with less, nets of few samples lose what they learned


class _Blocks(NamedTuple):
    "Hold blocks of the Fisher information of some layers: of all their weights, or of neighbouring ones."
    layers: list  # with a name and a weight
    fisher: torch.Tensor  # (blocks, b, b), damped

    def split(self,
        values: list,  # a tensor of the weight's shape for each layer
    ) -> torch.Tensor:  # (blocks, b); what pads the last block is 0
        "Return values of the weights block by block."
        return _split(values, self.fisher.shape[-1]).to(self.fisher.dtype)

    def joined(self,
        blocks: torch.Tensor,  # (blocks, b)
    ) -> dict:  # layer's name: tensor of the weight's shape
        "Return values of blocks layer by layer."
        found, flat = {}, blocks.flatten()
        for layer in self.layers:
            size = layer.weight.numel()
            found[layer.name] = flat[:size].reshape(layer.weight.shape)
            flat = flat[size:]
        return found


def inverse_diagonals(
    layers: list,  # with a name and a weight
    calibration,  # `Calibration`, with a loss
) -> dict:  # layer's name: (H⁻¹)qq for each weight, of the weight's shape
    "Return the diagonal of the inverse of the Fisher information, of the weights that are not zero."
    found = {}
    for blocks in _fisher(layers, calibration):
        alive = blocks.split([layer.weight.detach() != 0 for layer in blocks.layers])
        inverse = torch.linalg.inv(_restricted(blocks.fisher, alive))
        found |= blocks.joined(inverse.diagonal(dim1=1, dim2=2))
    return found


def adjusted(
    layers: list,  # with a name and a weight
    keeps: dict,  # layer's name: bool, of the weight's shape, True = keep
    calibration,  # `Calibration`, with a loss
) -> dict:  # layer's name: the new weight
    """Return the weights that make up best for those that are pruned: w_K + (H_KK)⁻¹ H_KS w_S.

    K stays, S is pruned. For one weight it is the update of Optimal Brain Surgeon (Hassibi & Stork 1993)."""
    found = {}
    for blocks in _fisher(layers, calibration):
        weights = blocks.split([layer.weight.detach() for layer in blocks.layers])
        stay = blocks.split([keeps[layer.name] & (layer.weight != 0) for layer in blocks.layers])
        gone = weights * (1 - stay)
        pull = (blocks.fisher @ gone[..., None])[..., 0] * stay
        change = torch.linalg.solve(_restricted(blocks.fisher, stay), pull)
        found |= blocks.joined(weights + change)
    return {layer.name: found[layer.name].to(layer.weight.dtype) for layer in layers}


def _restricted(fisher, stay):
    "Return matrices whose rows and columns of other weights are those of the identity."
    inside = fisher * stay[:, :, None] * stay[:, None, :]
    return inside + torch.diag_embed(1 - stay)


def _fisher(layers, calibration) -> Iterator[_Blocks]:
    "Yield the Fisher information of the layers, as many of them at a time as memory allows."
    together = sum(layer.weight.numel() for layer in layers)
    if together <= WHOLE:
        yield _gathered(layers, together, torch.float64, calibration)
        return
    for some in _portions(layers): yield _gathered(some, BLOCK, torch.float32, calibration)


def _portions(layers):
    "Yield lists of layers whose blocks fit into `MEMORY`, or of one layer."
    some, used = [], 0
    for layer in layers:
        needs = 4 * BLOCK * layer.weight.numel()
        if some and used + needs > MEMORY:
            yield some
            some, used = [], 0
        some.append(layer)
        used += needs
    yield some


def _gathered(layers, size, dtype, calibration):
    "Sum up the products of the gradients of single samples, block by block."
    weights = [layer.weight for layer in layers]
    fisher, rows = 0., []

    def add():
        nonlocal fisher
        piece = torch.stack(rows, -1)  # (blocks, b, samples)
        fisher = fisher + piece @ piece.transpose(1, 2)
        rows.clear()

    def report(grads):
        grads = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, grads)]
        rows.append(_split(grads, size).to(dtype))
        if len(rows) == SAMPLES: add()
    calibration.sample_gradients(weights, report)
    if rows: add()
    damping = DAMPING * float(fisher.diagonal(dim1=1, dim2=2).mean()) or 1.
    fisher.diagonal(dim1=1, dim2=2).add_(damping)
    return _Blocks(layers, fisher)


def _split(values, size):
    flat = torch.cat([value.flatten() for value in values])
    return F.pad(flat, [0, -len(flat) % size]).reshape(-1, size)
