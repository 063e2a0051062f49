"Hold a Sparsifier to the steps of an optimizer, by the optimizer's own hooks."
from collections.abc import Callable
from fractions import Fraction

import torch

from fasterai.arguments import read_example, whole
from fasterai.distil import read_distil
from fasterai.driver import Driver, check_choices
from fasterai.names import bare
from fasterai.optimizers import parameters_of, real_optimizers
from fasterai.recipes import with_recipe
from fasterai.repairing import repairs_of
from fasterai.schedule import in_epochs, read_schedule
from fasterai.summary import distilled_line
from fasterai.teacher import Teacher


class Attached:
    """Keep masked weights zero at each step of an optimizer, until `detach`, and prune by a schedule.

    `Sparsifier.attach` returns it. As a context manager it lets go of the optimizer at the end of a `with`
    block."""

    def __init__(self,
        sparsifier,
        optimizer,  # of torch, what wraps some, or a list
    ):
        self.sparsifier, self.optimizer = sparsifier, optimizer
        self.optimizers = [*reversed(real_optimizers(optimizer))]  # of one inside another the inner one comes first
        self.driver, self.step, self.steps = None, 0, 0  # None: nothing is pruned; steps that are done, and all of them
        self.leaders, self._leader, self._hooks = [], None, []  # optimizers whose steps are counted, and the one that has begun a step
        self.teacher, self._inputs = Teacher(None), None  # the dense network, and the inputs of the last `loss`

    def __repr__(self):
        names = ', '.join(dict.fromkeys(type(one).__name__ for one in self.optimizers))
        if self.driver is None: return f'Attached({names})'
        text = '; '.join(filter(None, [self.driver.reached(), distilled_line(self.teacher)]))
        return f'Attached({names}, step {self.step:,} of {self.steps:,}: {text})'

    def __enter__(self): return self

    def __exit__(self, *_): self.detach()

    def detach(self):
        "Let go of the optimizer. Its next step may move the zeros."
        for hook in self._hooks: hook.remove()
        self._hooks = []
        self.teacher.let_go()
        self.sparsifier.let_go(self)

    def loss(self,
        loss_func: Callable,  # of output and targets; returns a scalar
        output,  # of the model, as it returns it
        *targets,  # of the batch
        inputs,  # of the batch, as the model takes them: a tuple for several, a dict for keywords
    ) -> torch.Tensor:  # a scalar
        """Return the loss of a batch, with the distance from the dense network in it where `distil=` says so.

        Before the first event, after the last step and without `distil=` it is that of the targets alone.
        Call it between the model and `backward`, within the same autocast."""
        loss = loss_func(output, *targets)
        self._inputs = read_example(inputs, bare(self.sparsifier.model))
        added = self.teacher.adds(loss, output, self._inputs, targets, loss_func)
        return loss if added is None else loss + added

    # Beginning

    def check(self,
        others: list,  # of `Attached`, to the same Sparsifier
    ):
        "Raise `TypeError` or `ValueError` where there is no optimizer, or not one of this model."
        if not self.optimizers:
            came = self.optimizer if isinstance(self.optimizer, type) else type(self.optimizer)
            raise TypeError(f'optimizer: got {came}, expected a torch.optim.Optimizer; '
                            'with another kind call apply_masks() after each step')
        known = [one for other in others for one in other.optimizers]
        if any(one is other for one in self.optimizers for other in known):
            raise ValueError('optimizer: got one that is attached already, expected another; '
                             'detach() lets go of it')
        if any(id(layer.weight) in self._stepped() for layer in self.sparsifier.layers.values()): return
        raise ValueError('optimizer: got one that steps none of the selected weights, '
                         'expected one that was made with parameters of this model')

    def drive(self,
        others: list,  # of `Attached`, to the same Sparsifier
        sparsity,  # as `sparsify_model` takes it
        schedule,  # as a user gives it
        steps: int,  # of the whole training
        steps_per_epoch: int | None,
        rewind_to,  # a time, or None
        distil,  # as a user gives it
        recipe,  # as a user gives it
    ):
        """Prune by a schedule from the next step on.

        `TypeError` or `ValueError` where an argument is wrong, or the optimizer does not step a layer."""
        sparsifier, rules = self.sparsifier, self.sparsifier.rules
        for other in others:
            if other.driver is None: continue
            raise ValueError(f'sparsity: got {sparsity!r}, but a schedule is at step {other.step:,} of '
                             f'{other.steps:,}, expected detach() first')
        given = with_recipe(recipe, {'schedule': schedule, 'distil': distil})
        schedule, teacher = read_schedule(given['schedule']), Teacher(read_distil(given['distil']))
        repair = [one for one in sparsifier.repairs.functions if one not in repairs_of(rules, None)] or None
        check_choices(rules, sparsity, schedule, repair, rewind_to)
        if steps is None:
            raise ValueError('steps: got None, expected how many steps the optimizer makes in this training')
        whole('steps', steps)
        n_epochs, epoch = _length(schedule, rewind_to, steps, steps_per_epoch)
        self._check_all_are_stepped(others)
        driver = Driver(sparsifier, sparsity, schedule, repair, sparsifier.repairs.data, rewind_to)
        driver.timetable.place(n_epochs, epoch)
        self.driver, self.steps, self.leaders = driver, steps, self._find_leaders()
        self.teacher = teacher
        if rewind_to is not None: self._check_one_optimizer(rewind_to)
        driver.remember(0, self.optimizer)

    def _find_leaders(self):
        "Return the first optimizer that steps a selected weight, and those around it: one begins a step."
        weights = {id(layer.weight) for layer in self.sparsifier.layers.values()}
        first = next(one for one in self.optimizers if weights & parameters_of(one))
        return [one for one in self.optimizers if parameters_of(one) & parameters_of(first)]

    def _check_all_are_stepped(self, others):
        stepped = self._stepped().union(*(other._stepped() for other in others))
        layers = self.sparsifier.layers.items()
        learning = [(name, layer.weight) for name, layer in layers if layer.weight.requires_grad]
        missing = ', '.join(repr(name) for name, weight in learning if id(weight) not in stepped)
        if not missing: return
        raise ValueError(f'optimizer: got one that does not step {missing}, expected one with all selected '
                         'weights: give a list of optimizers, or leave layers out by exclude=')

    def _check_one_optimizer(self, rewind_to):
        if len(self.optimizers) == 1: return
        raise ValueError(f'rewind_to: got {rewind_to!r} with {len(self.optimizers)} optimizers, '
                         'expected None: one would step what is rewound by a gradient of before')

    def begin(self):
        "Set the hooks. They are not compiled, where a step is."
        before, after = map(torch.compiler.disable, (self._before_step, self._after_step))
        for one in self.optimizers:
            self._hooks += [one.register_step_pre_hook(before), one.register_step_post_hook(after)]

    # Steps

    def _before_step(self, optimizer, args, kwargs):
        "Begin a step. Where it is given a closure gradients are there only when that has run."
        if _is_skipped(optimizer): return
        _unscale(optimizer)
        if any(map(_is_closure, [*args, *kwargs.values()])):
            def around(value): return self._around(value, optimizer) if _is_closure(value) else value
            return tuple(map(around, args)), {name: around(value) for name, value in kwargs.items()}
        self._begin_step(optimizer)

    def _around(self, closure, optimizer):
        "Return a closure that begins the step when it is first called. A line search calls it again."
        masks, calls = self.sparsifier.masks, 0

        def evaluate():
            nonlocal calls
            calls += 1
            if calls > 1: masks.mask_weights(parameters_of(optimizer))
            loss = closure()
            if calls > 1:
                masks.mask_gradients(self._told_by(optimizer))
                return loss
            pruned = self._begin_step(optimizer)
            compares_losses = isinstance(optimizer, torch.optim.LBFGS)
            return evaluate() if pruned and compares_losses else loss
        return evaluate

    def _begin_step(self, optimizer):
        "Gather evidence, make an event, and mask the gradients; tell whether an event was made."
        sparsifier, told, pruned = self.sparsifier, self._told_by(optimizer), False
        if self.driver is None: sparsifier.evidence.step(told)
        elif self._is_first(optimizer):
            sparsifier.evidence.step(self._stepped())
            pruned = self._prune()
            self._leader = optimizer
        sparsifier.masks.mask_gradients(told)
        return pruned

    def _is_first(self, optimizer):
        "Tell whether no other optimizer has begun this step before. One around another begins before it."
        leads = any(one is optimizer for one in self.leaders)
        return leads and (self._leader is None or self._leader is optimizer)

    @property
    def is_over(self) -> bool:
        "Tell whether all steps are done. Masked weights are kept zero in later ones."
        return self.step >= self.steps

    def _prune(self):
        if self.is_over: return False
        timetable, choice = self.driver.timetable, self.teacher.choice
        if choice is not None and self._inputs is None:
            raise ValueError(f'distil: got {choice}, but loss() of what attach() returns was not called, '
                             'expected loss(loss_func, output, target, inputs=inputs) before each backward')
        timetable.progress = (self.step + 1) / self.steps
        if timetable.is_due: self.teacher.remember(bare(self.sparsifier.model), self._inputs)
        return self.driver.prune()

    def _after_step(self, optimizer, *_):
        self.sparsifier.repairs.trained()
        self.sparsifier.masks.mask_weights(parameters_of(optimizer))
        self.sparsifier.mask_optimizer_state(optimizer.state)
        if optimizer is not self._leader: return
        self._leader = None
        if self.is_over: return
        self.step += 1
        self.driver.rewind(self.optimizer)
        self.driver.remember(self.step, self.optimizer)
        if self.is_over: self.teacher.let_go()

    def _stepped(self): return set().union(*map(parameters_of, self.optimizers))

    def _told_by(self, optimizer):
        "Return the ids of the parameters of an optimizer without those of one inside it."
        inside = self.optimizers[:self.optimizers.index(optimizer)]
        return parameters_of(optimizer).difference(*map(parameters_of, inside))

    # Saving

    def state_dict(self) -> dict:
        "Return how far the training is."
        of_teacher = {'teacher': self.teacher.state_dict()}
        return {'step': self.step, 'steps': self.steps} | self.driver.state_dict() | of_teacher

    def goes_on(self,
        state: dict,  # of `state_dict`
    ) -> bool:
        """Tell whether a state is of this training. One that is over may be followed by another.

        `ValueError` where it is of one of other length that is under way."""
        lacks = {'step', 'steps', 'done', 'pruned', 'waiting', 'rewound', 'snapshot', 'teacher'} - {*state}
        if lacks: raise ValueError(f'state: got no {", ".join(sorted(lacks))} of the training, expected all')
        if state['steps'] == self.steps: return True
        if state['step'] >= state['steps']: return False
        raise ValueError(f'steps: got {self.steps}, expected {state["steps"]} as in the state, which is of '
                         f'step {state["step"]}')

    def load_state_dict(self,
        state: dict,  # of `state_dict`, of this training
    ):
        "Go on from there; `ValueError`, and nothing changed, where a network of the state does not fit."
        begun = bool(state['pruned']) and state['step'] < self.steps
        network = self.teacher.read_state(state['teacher'], bare(self.sparsifier.model), begun)
        self.driver.load_state_dict(state, self.optimizer)
        self.step, self.teacher.network = state['step'], network


def _length(schedule, rewind_to, steps, steps_per_epoch):
    "Return how long a training is: how many epochs of how many steps."
    if steps_per_epoch is not None:
        return Fraction(steps, whole('steps_per_epoch', steps_per_epoch)), steps_per_epoch
    times = in_epochs(schedule, rewind_to)
    if not times: return 1, steps
    raise ValueError(f'steps_per_epoch: got None with {times[0]!r}, expected how many steps an epoch has')


def _is_closure(value): return callable(value) and not isinstance(value, torch.optim.Optimizer)


def _is_skipped(optimizer):
    "Tell whether a fused optimizer will skip the step: GradScaler has it do so where a gradient is infinite."
    found = getattr(optimizer, 'found_inf', None)
    return found is not None and bool(found)


@torch.no_grad()
def _unscale(optimizer):
    "Unscale the gradients that GradScaler leaves to a fused optimizer."
    scale = getattr(optimizer, 'grad_scale', None)
    if scale is None: return
    for group in optimizer.param_groups:
        for p in group['params']:
            if p.grad is not None: p.grad /= scale.to(p.grad.device)
    optimizer.grad_scale = None
