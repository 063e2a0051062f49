"A fit that ends anywhere, by SIGKILL too, goes on from its last file as if nothing had happened."
import io
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import convnet
from fastai.callback.core import Callback
from fastai.callback.tracker import SaveModelCallback

from fasterai.callback import SparsifyCallback
from fasterai.schedule import linear

EPOCHS, WEIGHTS = 64, 566  # so that no step is due half a weight


class Die(Callback):
    "SIGKILL at the n-th step from here on, at one of its events; or, for 'save', with half of the next file written."
    order = 100

    def __init__(self, steps, event): self.steps, self.event = steps, event

    def __call__(self, name):
        if name == 'before_batch' and self.training: self.steps -= 1
        if self.steps > 0: return
        if name == self.event: die()
        if self.event == 'save':
            die_in_the_next_save()
            self.event = None


def die(): os.kill(os.getpid(), signal.SIGKILL)


def die_in_the_next_save():
    def half(content, file, *args, **kwargs):
        whole = io.BytesIO()
        save(content, whole, *args, **kwargs)
        with open(file, 'wb') as opened: opened.write(whole.getvalue()[:whole.tell() // 2])
        die()
    save, torch.save = torch.save, half


def zeros(state): return sum(int((state[f'{i}.weight'] == 0).sum()) for i in (0, 3, 8))


def due(epoch): return round(WEIGHTS * .9 * (epoch + 1) / EPOCHS)


def newest(folder):
    "The last epoch whose file can be read, and its content; a kill may have cut one short."
    for epoch in reversed(range(EPOCHS)):
        try: return epoch, torch.load(folder / 'models' / f'model_{epoch}.pth', weights_only=True)
        except Exception: continue
    return -1, None


def go_on(make_learner, folder, *cbs):
    "What a user does in a fresh process: load the last file and fit from the next epoch on."
    epoch, state = newest(folder)
    learn = make_learner(convnet())
    if state is not None: learn.load(f'model_{epoch}')
    learn.fit(EPOCHS, cbs=[SparsifyCallback(90, schedule=linear(0, 1)), SaveModelCallback(every_epoch=True), *cbs], start_epoch=epoch + 1)
    return learn


MOMENTS = ['before_batch', 'after_backward', 'before_step', 'after_step', 'after_batch', 'after_train', 'before_validate', 'after_epoch']


def test_killed_twelve_times(make_learner, tmp_path):
    draw, fork, reached = random.Random(0), multiprocessing.get_context('fork'), []
    for event in [*MOMENTS, 'save', 'save', 'after_step', 'save']:
        process = fork.Process(target=go_on, args=(make_learner, tmp_path, Die(draw.randint(1, 24), event)))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL  # it was still at work
        epoch, state = newest(tmp_path)
        if state is not None: assert zeros(state) == due(epoch)
        reached.append(epoch)
    assert reached == sorted(reached)
    assert 0 < reached[-1] < EPOCHS - 1
    learn = go_on(make_learner, tmp_path)
    assert zeros(learn.model.state_dict()) == due(EPOCHS - 1) == round(.9 * WEIGHTS)
    for epoch in range(EPOCHS):
        assert zeros(torch.load(tmp_path / 'models' / f'model_{epoch}.pth', weights_only=True)) == due(epoch)


SCRIPT = '''
import sys
from functools import partial
from pathlib import Path
sys.path.insert(0, {tests!r})
from conftest import new_learner
from test_resume import Callback, go_on, zeros

class Look(Callback):
    order = 99
    def after_step(self): print(zeros(self.model.state_dict()))

folder = Path({folder!r})
go_on(partial(new_learner, folder), folder, Look())
'''


def test_resumed_in_a_fresh_process(make_learner, tmp_path):
    class Stop(Callback):
        order = 99

        def after_epoch(self):
            if self.epoch == EPOCHS - 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): go_on(make_learner, tmp_path, Stop())
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    out = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True).stdout
    steps = EPOCHS * 4
    assert [int(line) for line in out.split()] == [round(WEIGHTS * .9 * i / steps) for i in range(steps - 7, steps + 1)]


def test_a_resumed_fit_says_that_evidence_of_training_begins_anew(make_learner, capsys):
    for criterion, says in ('movement', True), ('gradient', True), ('magnitude', False), ('wanda', False):
        learn = make_learner()
        learn.logger = print
        learn.fit(3, cbs=SparsifyCallback(50, criteria=criterion), start_epoch=1)
        assert ('of earlier steps are not known, and are gathered anew' in capsys.readouterr().out) == says
