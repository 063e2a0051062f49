"Train many small networks of one hidden layer at once, and hand them out as ordinary ones."
import torch
from torch import nn
from torch.nn import functional as F


def with_one() -> nn.Module:
    "Return a layer that appends an input that is always 1, so that a bias is a weight like the others."
    return nn.ConstantPad1d((0, 1), 1.)


def network(first, second) -> nn.Sequential:
    "Return a network with sigmoid hidden units, of these two weight matrices, in float64."
    layers = [nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype) for w in (first, second)]
    for layer, weight in zip(layers, (first, second)): layer.weight.data.copy_(weight)
    return nn.Sequential(with_one(), layers[0], nn.Sigmoid(), with_one(), layers[1])


def loss_func(output, y):
    "Return the loss that the networks are trained with."
    return F.binary_cross_entropy_with_logits(output.flatten(), y.flatten())


def n_right(net, x, y) -> int:
    "Count the cases that a network classifies as they are."
    with torch.no_grad(): return int(((net(x).flatten() > 0) == (y > .5)).sum())


def train(
    x: torch.Tensor,  # all cases, float64 (cases, inputs)
    y: torch.Tensor,  # 0 or 1, float64 (cases,)
    hidden: int,  # number of hidden units
    seeds: int,  # number of networks
    steps: int,
    rate: float,  # of Adam, which falls to 0 by a cosine
    decay: float,  # the loss has decay / 2 · |w|²
    scale: float,  # initial weights are between -scale and scale
) -> list:  # of networks
    "Train networks from several seeds, all cases in each step."
    shapes = (hidden, x.shape[1] + 1), (1, hidden + 1)
    pairs = [_initial(seed, shapes, scale) for seed in range(seeds)]
    first, second = (torch.stack(w).requires_grad_() for w in zip(*pairs))
    optimizer = torch.optim.Adam([first, second], rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    padded, wanted = F.pad(x, (0, 1), value=1.), y.expand(seeds, -1)
    for _ in range(steps):
        inside = torch.sigmoid(padded @ first.transpose(1, 2))
        output = (F.pad(inside, (0, 1), value=1.) @ second.transpose(1, 2))[..., 0]
        loss = F.binary_cross_entropy_with_logits(output, wanted, reduction='sum') / len(x)
        loss = loss + decay / 2 * (first.square().sum() + second.square().sum())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return [network(a, b) for a, b in zip(first.detach(), second.detach())]


def _initial(seed, shapes, scale):
    generator = torch.Generator().manual_seed(seed)
    return [scale * (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) for shape in shapes]
