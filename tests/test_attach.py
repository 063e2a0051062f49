"Optimizers of all kinds in a loop of one's own: what wraps one, several, and those whose step is not what is called."
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fasterai.kinds import EVIDENCE, Kind
from fasterai.sparsifier import Sparsifier

X, Y = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 4


def net(): return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def train(model, step, n=4):
    for _ in range(n):
        F.cross_entropy(model(X), Y).backward()
        step()
        model.zero_grad()


class Wrapper(torch.optim.Optimizer):
    "An optimizer by name only, as that of accelerate, which the Trainer of transformers hands to its callbacks."
    def __init__(self, inner): self.inner = inner
    param_groups = property(lambda self: self.inner.param_groups)
    state = property(lambda self: self.inner.state)
    def step(self, closure=None): return self.inner.step(closure)
    def zero_grad(self, set_to_none=True): self.inner.zero_grad(set_to_none)


class Other:
    "No optimizer of torch at all, with one inside, as fastai's OptimWrapper."
    def __init__(self, opt): self.opt = opt
    def step(self): self.opt.step()


class Lookahead(torch.optim.Optimizer):
    "Writes the weights after the one inside has stepped."
    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner, self.slow = inner, {p: p.detach().clone() for group in inner.param_groups for p in group['params']}

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step()
        for p, slow in self.slow.items(): p.copy_(slow.lerp_(p, .5))


class Sam(torch.optim.Optimizer):
    "Its two steps are not `step`; the second one steps the optimizer inside."
    def __init__(self, params, base):
        super().__init__(params, {})
        self.base = base

    @torch.no_grad()
    def first_step(self):
        for p in self.param_groups[0]['params']:
            self.state[p]['old'] = p.clone()
            p += .05 * p.grad / (p.grad.norm() + 1e-12)

    @torch.no_grad()
    def second_step(self):
        for p in self.param_groups[0]['params']: p.copy_(self.state[p]['old'])
        self.base.step()

    def step(self, closure): raise NotImplementedError


def adamw(model): return torch.optim.AdamW(model.parameters(), 1e-2)


@pytest.mark.parametrize('wrap', [Wrapper, lambda opt: Wrapper(Wrapper(opt)), Other, Lookahead], ids=['wrapper', 'two', 'other', 'lookahead'])
def test_what_wraps_an_optimizer(wrap):
    model = net()
    inner = adamw(model)
    optimizer, sparsifier = wrap(inner), Sparsifier(model)
    train(model, optimizer.step)
    sparsifier.sparsify_model(50)
    sparsifier.attach(optimizer)
    train(model, optimizer.step)
    assert sparsifier.sparsity == 50
    for name, layer in sparsifier.layers.items():
        assert not inner.state[layer.weight]['exp_avg'][~sparsifier.masks[name]].any()
    sparsifier.detach()
    train(model, optimizer.step)
    assert sparsifier.sparsity < 50


def test_sam():
    model = net()
    optimizer = Sam(model.parameters(), torch.optim.SGD(model.parameters(), .1))
    sparsifier = Sparsifier(model)
    sparsifier.sparsify_model(50)
    sparsifier.attach(optimizer)
    for _ in range(3):
        train(model, optimizer.first_step, 1)
        train(model, optimizer.second_step, 1)
    assert sparsifier.sparsity == 50


def test_each_optimizer_holds_its_own_parameters():
    "Of a GAN one steps the discriminator between the generator's forward and backward."
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
    discriminator = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    first, second = torch.optim.Adam(generator.parameters()), torch.optim.Adam(discriminator.parameters())
    sparsifier = Sparsifier(nn.ModuleList([generator, discriminator]))
    sparsifier.sparsify_model(50)
    for optimizer in (first, second): sparsifier.attach(optimizer)
    for _ in range(3):
        fake = generator(torch.randn(16, 4))
        second.zero_grad()
        (discriminator(fake.detach()).mean() - discriminator(torch.randn(16, 8)).mean()).backward()
        second.step()
        first.zero_grad()
        (-discriminator(fake).mean()).backward()
        first.step()
    assert sparsifier.sparsity == 50


def test_an_optimizer_in_backward():
    "One optimizer for each parameter steps it as soon as its gradient is there."
    model = net()
    sparsifier = Sparsifier(model)
    sparsifier.sparsify_model(50)
    optimizers = {p: torch.optim.Adam([p], 1e-2) for p in model.parameters()}
    for layer in sparsifier.layers.values(): sparsifier.attach(optimizers[layer.weight])

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad()
    for p in model.parameters(): p.register_post_accumulate_grad_hook(step)
    train(model, lambda: None)
    assert sparsifier.sparsity == 50


def test_steps_without_the_hooks_are_noticed():
    model = net()
    optimizer, sparsifier = adamw(model), Sparsifier(model)
    sparsifier.sparsify_model(50)
    sparsifier.attach(optimizer)

    @torch.no_grad()
    def by_hand():
        for p in model.parameters(): p -= .1 * p.grad
    train(model, by_hand)
    with pytest.warns(UserWarning, match=r"masked weights of '0', '2' have moved.*call apply_masks\(\) after each step"): assert sparsifier.sparsity < 50
    sparsifier.apply_masks()
    assert sparsifier.sparsity == 50


@pytest.mark.parametrize('wrap', [lambda opt: opt, Wrapper, Other, Lookahead], ids=['alone', 'wrapper', 'other', 'lookahead'])
def test_a_step_is_told_once_however_many_optimizers_are_hooked(wrap, monkeypatch):
    told = Kind(lambda layer, state: state, lambda layer: torch.zeros_like(layer.weight), lambda layer, state: state + 1)
    monkeypatch.setitem(EVIDENCE, 'told', told)
    model = net()
    optimizer, sparsifier = wrap(adamw(model)), Sparsifier(model, criteria=lambda told: told)
    sparsifier.attach(optimizer)
    train(model, optimizer.step, 3)
    for layer in sparsifier.layers.values(): assert (sparsifier.evidence.of(layer)['told'] == 3).all()


class Selective(torch.optim.Optimizer):
    "Keeps the momentum of some weights, chosen by a bool mask, and a code for others."
    def __init__(self, params): super().__init__(params, {})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]['params']:
            state = self.state[p]
            if not state:
                state['mask'] = torch.rand_like(p) < .5
                state['momentum'] = p.new_zeros(int(state['mask'].sum()))
                state['code'] = torch.full(p.shape, 200, dtype=torch.uint8)
            state['momentum'].mul_(.9).add_(p.grad[state['mask']])
            p[state['mask']] -= .01 * state['momentum']


def test_masks_and_codes_of_an_optimizer_are_left_alone():
    model = net()
    optimizer, sparsifier = Selective(model.parameters()), Sparsifier(model)
    train(model, optimizer.step)
    before = {p: state['mask'].clone() for p, state in optimizer.state.items()}
    sparsifier.sparsify_model(50)
    sparsifier.attach(optimizer)
    train(model, optimizer.step)
    assert sparsifier.sparsity == 50
    for p, state in optimizer.state.items():
        assert torch.equal(state['mask'], before[p])
        assert (state['code'] == 200).all()


class Coded(torch.Tensor):
    "A tensor of another kind, as those of low-bit optimizers."


def test_tensor_subclasses_in_the_state_are_left_alone():
    model = net()
    sparsifier = Sparsifier(model)
    sparsifier.sparsify_model(50)
    weight = model[0].weight
    coded, plain = torch.ones(weight.shape).as_subclass(Coded), torch.ones(weight.shape)
    sparsifier.mask_optimizer_state({weight: {'coded': coded, 'plain': plain, 'step': torch.tensor(3.)}})
    assert (coded.as_subclass(torch.Tensor) == 1).all()
    assert torch.equal(plain == 1, sparsifier.masks['0'])


@pytest.mark.parametrize('thing, says', [(torch.optim.SGD, "got <class 'torch.optim.sgd.SGD'>, expected a torch.optim.Optimizer"),
                                         (7, "got <class 'int'>"), (nn.Linear(1, 1), "got <class 'torch.nn.modules.linear.Linear'>")])
def test_what_is_no_optimizer_is_refused(thing, says):
    with pytest.raises(TypeError, match=says): Sparsifier(net()).attach(thing)
