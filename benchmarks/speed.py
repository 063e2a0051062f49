"""What an event and a step cost, in passes over the weights; `make bench` writes the table to benchmarks/RESULTS.md.

One pass is `sum(w.abs().sum() for w in weights)`. Each figure is the median over rounds of the ratio to a pass timed just before
it, so that a machine that speeds up and slows down does not matter. Every event is checked: the zeros are as many as asked for."""
import argparse
import copy
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from results import RESULTS, machine, table, write
from torch import nn

from fasterai.sparsifier import Sparsifier

warnings.filterwarnings('ignore', 'sparsity: ')  # layers of a network with random weights are left almost empty
WARM = 2  # rounds that are not counted: the first ones wait for memory
PRUNABLE = (nn.Conv2d, nn.Linear)
EVENTS = (  # what, passes at most, and of which kind
    ('global event, weight, magnitude', 4, 'weight', 'global', 'magnitude'),
    ('local event, weight, magnitude', 4, 'weight', 'local', 'magnitude'),
    ('global event, weight, gradient', 6, 'weight', 'global', 'gradient'),
    ('local event, weight, gradient', 6, 'weight', 'local', 'gradient'),
    ('global event, vector', 15, 'vector', 'global', 'magnitude'),
    ('global event, kernel', 4, 'kernel', 'global', 'magnitude'),
    ('global event, filter', 4, 'filter', 'global', 'magnitude'))


def weights_of(model): return [m.weight.detach() for m in model.modules() if isinstance(m, PRUNABLE)]


def one_pass(weights): return sum(w.abs().sum() for w in weights)


def timed(f):
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    start = time.perf_counter()
    f()
    wait()
    return time.perf_counter() - start


class Fresh:
    "A model that can be put back to dense before each round, with gradients."
    def __init__(self, model):
        self.model, self.weights = model, weights_of(model)
        self.dense = [w.clone() for w in self.weights]
        for p in model.parameters(): p.grad = torch.randn_like(p)

    def reset(self):
        for w, d in zip(self.weights, self.dense): w.copy_(d)
        return self.model


def in_passes(fresh, prepare, work, check, rounds):
    "Median ratio of `work` to one pass, interleaved; `check` sees what each round has done."
    ratios = []
    for _ in range(rounds + WARM):
        thing = prepare(fresh.reset())
        for _ in range(3): unit = timed(lambda: one_pass(fresh.weights))
        ratios.append(timed(lambda: work(thing)) / unit)
        check(thing)
    return statistics.median(ratios[WARM:])


def events(fresh, sparsity, rounds):
    "The figures of `EVENTS` and of applying the masks, for all convolutions and Linears."
    names = [n for n, m in fresh.model.named_modules() if isinstance(m, PRUNABLE)]
    total = sum(w.numel() for w in fresh.weights)

    def zeros(): return sum(int((w == 0).sum()) for w in fresh.weights)

    for _, _, *choices in EVENTS:
        def check(sparsifier):
            largest = max(layer.grouping.size for layer in sparsifier.layers.values())
            if choices[:2] == ['weight', 'global']: assert zeros() == round(total * sparsity / 100)
            elif choices[1] == 'local':
                for layer in sparsifier.layers.values():
                    assert abs(int((layer.weight == 0).sum()) - layer.weight.numel() * sparsity / 100) <= .5
            else: assert abs(zeros() - total * sparsity / 100) <= largest
        yield in_passes(fresh, lambda m: Sparsifier(m, *choices, layers=names), lambda s: s.sparsify_model(sparsity), check, rounds)

    def pruned(model):
        sparsifier = Sparsifier(model, layers=names)
        sparsifier.sparsify_model(sparsity)
        return sparsifier
    yield in_passes(fresh, pruned, lambda s: s.apply_masks(), lambda s: None, rounds)


def peers(fresh, sparsity, rounds):
    "The same global event by torch.nn.utils.prune, in passes."
    from torch.nn.utils import prune
    total = sum(w.numel() for w in fresh.weights)

    def work(model):
        layers = [(m, 'weight') for m in model.modules() if isinstance(m, PRUNABLE)]
        prune.global_unstructured(layers, prune.L1Unstructured, amount=sparsity / 100)

    def check(model): assert sum(int((m.weight_mask == 0).sum()) for m in model.modules() if isinstance(m, PRUNABLE)) == round(total * sparsity / 100)
    return in_passes(fresh, copy.deepcopy, work, check, rounds)


def large(weights):
    """One event over so many weights, in a process of its own; prints nanoseconds a weight, passes, and bytes a weight: masks, and the peak
    above the weights and masks in the event."""
    layers = nn.ModuleList()
    while weights > 0:  # layers of at most 64 million
        rows = min(8192, -(-weights // 8192))
        layers.append(nn.utils.skip_init(nn.Linear, 8192, rows, bias=False))
        weights -= 8192 * rows
    with torch.no_grad():
        for layer in layers: layer.weight.uniform_(-1, 1)
    total = sum(layer.weight.numel() for layer in layers)
    before = resident('VmRSS')  # the weights, and Python
    sparsifier = Sparsifier(layers)
    held = sum(sparsifier.masks[name].numel() for name in sparsifier.layers)
    touch(total)
    event, after = timed(lambda: sparsifier.sparsify_model(90)), peak()
    unit = min(timed(lambda: sum(layer.weight.detach().abs().sum() for layer in layers)) for _ in range(2))  # after it: a pass needs memory too
    assert sum(int((layer.weight == 0).sum()) for layer in layers) == round(.9 * total)
    print(1e9 * event / total, event / unit, held / total, (after - before - held) / total, (after - before) / total)


def touch(size):
    "Use so many bytes and give them back: what a virtual machine waits for at the first touch of memory is no cost of an event."
    torch.ones(size, dtype=torch.uint8)
    Path('/proc/self/clear_refs').write_text('5')  # the peak of memory begins anew


def peak(): return resident('VmHWM')  # what getrusage tells a child begins with its parent's


def resident(field):
    "Bytes of this process, from Linux's /proc."
    line = next(line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def apart(*arguments):
    "The figures that a process of its own prints: its peak of memory is its own, and how its memory lies is the luck of one process only."
    out = subprocess.run([sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True, check=True).stdout
    return [float(x) for x in out.split()]


def in_fit():
    "The callback's share of training steps: with an event in every one, in every tenth, and between events. Each is a median over steps or tens."
    from fastai.callback.core import Callback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner, noop
    from torch.utils.data import TensorDataset
    from torchvision.models import resnet18

    from fasterai.callback import SparsifyCallback
    from fasterai.schedule import linear, one_shot, steps

    class Clock(Callback):
        "The time of whole steps, from before_batch to after_batch."
        def __init__(self, order): self.order, self.steps = order, []
        def before_batch(self): self.start = time.perf_counter()
        def after_batch(self):
            if self.training: self.steps.append(time.perf_counter() - self.start)

    class Timed(SparsifyCallback):
        "The time spent in the callback's own events."
        spent = 0.
        def __call__(self, event):
            start = time.perf_counter()
            try: return super().__call__(event)
            finally: self.spent += time.perf_counter() - start
    shares = []
    for schedule, period, periods in ((linear(0, 1), 1, 18), (linear(0, 1, every=steps(10)), 10, 5), (one_shot(at=1), 1, 18)):
        batches = period * periods + 2  # the first and the last are not counted
        data = TensorDataset(torch.randn(32 * batches, 3, 64, 64), torch.randint(0, 10, (32 * batches,)))
        learn = Learner(DataLoaders.from_dsets(data, data, bs=32, num_workers=0, pin_memory=False, device='cpu'), resnet18(num_classes=10),
                        loss_func=nn.functional.cross_entropy)
        learn.remove_cb(learn.progress)
        learn.logger, learn.dls.valid = noop, []
        clock, spent = Clock(-100), []

        class Note(Callback):
            order = 200
            def before_batch(self): callback.spent = 0.
            def after_batch(self): spent.append(callback.spent)
        callback = Timed(90, schedule=schedule)
        learn.fit(1, 1e-3, cbs=[callback, clock, Note()])
        own, whole = (torch.tensor(times[1:-1]).view(periods, period).sum(1) for times in (spent, clock.steps))
        shares.append(100 * float((own / whole).quantile(.5)))
    return shares


def reached(measured, most): return 'yes' if measured <= most else 'no'


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--small', action='store_true', help='a small network and few rounds: for a test of correctness, not for figures')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--out', type=Path, default=RESULTS)
    parser.add_argument('--processes', type=int, default=7, help='in which the events are timed')
    parser.add_argument('--large', type=int, help=argparse.SUPPRESS)
    parser.add_argument('--events', action='store_true', help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    if chosen.large: return large(chosen.large)
    from torchvision.models import resnet18, resnet50
    fresh, rounds = (Fresh(resnet18(num_classes=10)), 1) if chosen.small else (Fresh(resnet50()), chosen.rounds)
    if chosen.events: return print(*events(fresh, 90, rounds))
    how = ['--events', '--rounds', rounds] + ['--small'] * chosen.small
    found = [apart(*how) for _ in range(1 if chosen.small else chosen.processes)]
    rows = []
    for (what, limit, *_), ratios in zip((*EVENTS, ('applying the masks after a step', 1.1)), zip(*found)):
        ratio = statistics.median(ratios)
        rows.append((what, f'{limit:g} passes', f'{ratio:.1f} ({min(ratios):.1f} – {max(ratios):.1f})', reached(ratio, limit)))
    ours = statistics.median(ratios[0] for ratios in found)
    theirs = peers(fresh, 90, min(rounds, 3))
    rows.append(('torch.nn.utils.prune, the same global event', '30 × ours',
                 f'{theirs:.0f} passes: {theirs / ours:.0f} ×', reached(30, theirs / ours)))
    some = [apart('--large', 2_000_000)] if chosen.small else [apart('--large', 25_600_000) for _ in range(5)]
    cost, _, held, transient, _ = map(statistics.median, zip(*some))
    rows += [('memory held, bytes a weight', '1', f'{held:.2f}', reached(held, 1)),
             ('peak above weights and masks in an event, bytes a weight', '2', f'{transient:.2f}', reached(transient, 2))]
    if not chosen.small:
        more, passes, _, _, above = map(statistics.median, zip(*(apart('--large', 1_000_000_000) for _ in range(3))))
        rows += [('a billion weights: cost per weight against 25.6 million', '1.5 ×', f'{more / cost:.2f} × ({more:.1f} ns, {passes:.1f} passes)',
                  reached(more / cost, 1.5)),
                 ('a billion weights: peak above the weights, bytes a weight', '3', f'{above:.2f}', reached(above, 3))]
        names = 'callback in learn.fit, an event in every step (ResNet-18, 64 px, batch 32)', 'the same with every=steps(10)', 'the same between events'
        for what, limit, share in zip(names, (7, 3, 2.5), in_fit()):
            rows.append((what, f'{limit:g} % of the step', f'{share:.1f} %', reached(share, limit)))
    if torch.cuda.is_available():
        ratio = next(events(Fresh(resnet50().cuda()), 90, rounds))  # the first of `EVENTS`
        rows.append(('the global event on CUDA', '6 passes, 3 beyond the floor', f'{ratio:.1f} ({torch.cuda.get_device_name()})', reached(ratio, 6)))
    else: rows.append(('the global event on CUDA', '6 passes, 3 beyond the floor', 'not measured', ''))
    network = '--small, no figures to go by' if chosen.small else 'ResNet-50, 25.5 million weights, random, 90 %'
    write('What an event and a step cost', f'By `make bench` ({network}); {machine()}.\nOne pass is `sum(w.abs().sum() for w in weights)`; '
          f'each figure is a median of ratios taken side by side, '
          f'of an event the median of {len(found)} processes (the least – the most).\n\n{table(rows)}', chosen.out)


if __name__ == '__main__': main()
