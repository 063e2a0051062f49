"A fit that ends anywhere, by SIGKILL too, goes on from its last file as if nothing had happened."
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import convnet
from fastai.callback.core import Callback
from fastai.callback.tracker import SaveModelCallback

from fasterai.callback import SparsifyCallback
from fasterai.schedule import linear

EPOCHS, WEIGHTS = 64, 566  # so that no step is due half a weight


class Slow(Callback):
    def after_batch(self): time.sleep(.004)


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


def test_killed_ten_times(make_learner, tmp_path):
    moments, fork = random.Random(0), multiprocessing.get_context('fork')
    reached, kills = [], 0
    while kills < 10:
        process = fork.Process(target=go_on, args=(make_learner, tmp_path, Slow()))
        process.start()
        time.sleep(moments.uniform(.05, .4))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL  # it was still at work
        kills += 1
        epoch, state = newest(tmp_path)
        if state is not None: assert zeros(state) == due(epoch)
        reached.append(epoch)
    assert reached == sorted(reached) and 0 < reached[-1] < EPOCHS - 1
    learn = go_on(make_learner, tmp_path)
    assert zeros(learn.model.state_dict()) == due(EPOCHS - 1) == round(.9 * WEIGHTS)
    for epoch in range(EPOCHS): assert zeros(torch.load(tmp_path / 'models' / f'model_{epoch}.pth', weights_only=True)) == due(epoch)


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
