"Distillation in a loop of one's own: `loss` of what `attach` returns. That it does what a fit does is in test_driver.py."
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fasterai.distil import distillation
from fasterai.schedule import linear, one_cycle, one_shot
from fasterai.sparsifier import Sparsifier

X, Y = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4
N = 12


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(.2), nn.Linear(16, 4))
    for _ in range(20): model(X)
    return model


def begin(model=None, sparsity=80, **given):
    model = net() if model is None else model
    optimizer, sparsifier = torch.optim.AdamW(model.parameters(), 1e-2), Sparsifier(model)
    return model, optimizer, sparsifier, sparsifier.attach(optimizer, sparsity, **{'schedule': one_shot(.3), 'steps': N, 'distil': distillation(.5)} | given)


def train(model, optimizer, attached, n, start=0):
    "Train n steps; return the loss of each."
    seen = []
    for i in range(start, start + n):
        rows = slice(i * 5 % 20, i * 5 % 20 + 16)
        loss = attached.loss(F.cross_entropy, model(X[rows]), Y[rows], inputs=X[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


def values(model): return {name: value.clone() for name, value in model.state_dict().items()}
def same(one, other): return all(torch.equal(value, other[name]) for name, value in one.items())


# The loss

def test_a_share_of_the_loss_is_the_distance_from_the_network_before_the_event():
    model, optimizer, _, attached = begin()
    train(model, optimizer, attached, 3)
    dense = net()
    dense.load_state_dict(values(model))
    dense.eval()
    assert attached.teacher.network is None
    train(model, optimizer, attached, 1, 3)  # the step of the event
    stored = values(attached.teacher.network)
    assert torch.equal(stored['0.weight'], dense[0].weight) and not torch.equal(model[0].weight, dense[0].weight)
    dense.load_state_dict(stored)
    output, targets = model(X), dense(X).argmax(1)  # labels for which the dense network is the better one
    plain = F.cross_entropy(output, targets)
    soft, softer = F.softmax(dense(X) / 2, 1), F.softmax(output / 2, 1)
    by_hand = .5 * plain + .5 * 4 * (soft * (soft / softer).log()).sum(1).mean()
    assert attached.loss(F.cross_entropy, output, targets, inputs=X).item() == pytest.approx(by_hand.item(), rel=1e-5)
    worst = dense(X).argmin(1)  # labels for which it is not
    assert attached.loss(F.cross_entropy, dense(X).detach() * .1, worst, inputs=X) == F.cross_entropy(dense(X) * .1, worst)
    assert (attached.teacher.n_batches, attached.teacher.n_lower) == (2, 1)
    assert 'distilled in 1 of 2 batches' in repr(attached)


@pytest.mark.parametrize('given', [{'distil': None}, {'distil': 0}, {'recipe': 'accurate', 'distil': 0}])
def test_without_distillation_it_is_the_loss_of_the_labels(given):
    model, optimizer, _, attached = begin(**given)
    train(model, optimizer, attached, 8)
    assert attached.teacher.network is None
    assert attached.loss(F.mse_loss, X, X + 1, inputs=X) == 1


class Two(nn.Module):
    "Take two inputs, and return two outputs."
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, a, b): return self.one(a) + self.two(b), self.one(b)


@pytest.mark.parametrize('inputs', [lambda x: (x, x), lambda x: {'a': x, 'b': x}], ids=['tuple', 'dict'])
def test_several_inputs_and_several_targets(inputs):
    model, optimizer, _, attached = begin(Two(), schedule=one_shot(0.))

    def loss(output, y, z): return F.cross_entropy(output[0], y) + F.cross_entropy(output[1], z)
    for _ in range(3):
        attached.loss(loss, model(X, X), Y, Y, inputs=inputs(X)).backward()
        optimizer.step()
    assert attached.teacher.n_batches == 2
    taught, output = [one.detach() for one in attached.teacher.network(X, X)], [one.detach() for one in model(X, X)]
    labels = [one.argmax(1) for one in taught]
    plain = sum(map(F.cross_entropy, output, labels))
    apart = sum(4 * F.kl_div(F.log_softmax(p / 2, 1), F.softmax(z / 2, 1), reduction='batchmean') for p, z in zip(output, taught))
    assert attached.loss(loss, output, *labels, inputs=inputs(X)).item() == pytest.approx((plain + apart).item() / 2, rel=1e-4)


def test_a_closure_is_called_again_after_an_event():
    model = nn.Linear(8, 4)
    optimizer, sparsifier = torch.optim.LBFGS(model.parameters(), .1), Sparsifier(model)
    attached = sparsifier.attach(optimizer, 50, one_shot(.3), steps=4, distil=.5)

    def closure():
        optimizer.zero_grad()
        loss = attached.loss(F.cross_entropy, model(X), Y, inputs=X)
        loss.backward()
        return loss
    for _ in range(3): optimizer.step(closure)
    assert attached.teacher.n_lower > 0 and sparsifier.sparsity == 50


# How long the dense network is kept

def test_it_is_let_go_at_the_last_step_and_by_detach():
    model, optimizer, _, attached = begin()
    train(model, optimizer, attached, N - 1)
    assert attached.teacher.network is not None
    train(model, optimizer, attached, 1, N - 1)
    assert attached.teacher.network is None
    model, optimizer, sparsifier, attached = begin()
    train(model, optimizer, attached, 6)
    sparsifier.detach()
    assert attached.teacher.network is None


@pytest.mark.parametrize('at', [2, 5, N])
@pytest.mark.parametrize('late', [False, True], ids=['loaded before', 'loaded after'])
def test_resumed_to_the_bit(tmp_path, at, late):
    model, optimizer, sparsifier, attached = begin()
    train(model, optimizer, attached, at)
    torch.save([model.state_dict(), optimizer.state_dict(), sparsifier.state_dict()], tmp_path / 'at.pt')
    torch.manual_seed(1)
    seen = train(model, optimizer, attached, N + 2 - at, at)
    of_model, of_optimizer, of_sparsifier = torch.load(tmp_path / 'at.pt', weights_only=True)
    other = net()
    other.load_state_dict(of_model)
    its_optimizer, its_sparsifier = torch.optim.AdamW(other.parameters(), 1e-2), Sparsifier(other)
    its_optimizer.load_state_dict(of_optimizer)
    if not late: its_sparsifier.load_state_dict(of_sparsifier)
    goes_on = its_sparsifier.attach(its_optimizer, 80, one_shot(.3), steps=N, distil=distillation(.5))
    if late: its_sparsifier.load_state_dict(of_sparsifier)
    torch.manual_seed(1)
    assert train(other, its_optimizer, goes_on, N + 2 - at, at) == seen and same(model.state_dict(), other.state_dict())


def test_a_state_that_does_not_fit_changes_nothing():
    model, optimizer, sparsifier, attached = begin()
    train(model, optimizer, attached, 6)
    state, before, teacher = sparsifier.state_dict(), values(model), attached.teacher.network
    for wrong, says in ((None, 'distil: got distillation.*, but the state is of a training without it'),
                        (nn.Linear(2, 2).state_dict(), 'state: got the dense network of another model')):
        with pytest.raises(ValueError, match=says):
            sparsifier.load_state_dict(state | {'.training': state['.training'] | {'teacher': wrong, 'step': 5}})
        assert same(before, values(model)) and attached.step == 6 and attached.teacher.network is teacher


# What can be given

def test_a_loop_that_does_not_ask_for_the_loss_is_told_at_its_first_step():
    model, optimizer, _, _ = begin(recipe='accurate', distil=None)
    before = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in before.items()}
    F.cross_entropy(model(X), Y).backward()
    with pytest.raises(ValueError, match=r'distil: got distillation\(\), but loss\(\) of what attach\(\) returns was not called'): optimizer.step()
    assert same(before, dict(model.named_parameters()))


def test_a_recipe_chooses_what_was_left_open():
    attached = begin(recipe='accurate', schedule='gradual', distil=None)[-1]
    assert attached.driver.timetable.schedule == one_cycle(0, .5) and attached.teacher.choice == distillation(.9)
    attached = begin(recipe='accurate', schedule=linear(0, 1), distil=.3)[-1]
    assert attached.driver.timetable.schedule == linear(0, 1) and attached.teacher.choice == distillation(.3)


@pytest.mark.parametrize('given, error, says', [
    (dict(sparsity=None, schedule='gradual', steps=None, distil=.5), ValueError, r'sparsity: got None with distil=0.5, expected percent'),
    (dict(sparsity=None, schedule='gradual', steps=None, distil=None, recipe='accurate'), ValueError, "sparsity: got None with recipe='accurate', expected"),
    (dict(distil=2), ValueError, 'distil: got share=2'), (dict(distil='soft'), TypeError, "distil: got 'soft'"),
    (dict(recipe='acurate'), ValueError, "recipe: got 'acurate', expected one of accurate, or None; did you mean 'accurate'")])
def test_what_cannot_be(given, error, says):
    with pytest.raises(error, match=says): begin(**given)
