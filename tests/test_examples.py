"The examples run, and reach their sparsity: each asserts its exact count of zeros."
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / 'examples'
NEEDS = {'plain_loop': [], 'accelerate_loop': ['accelerate'], 'lightning_trainer': ['lightning'], 'hf_trainer': ['transformers', 'accelerate'],
         'timm_step': ['timm'], 'compiled': [], 'lora': ['peft']}
ON_TWO_PROCESSES = {'ddp', 'fastai_ddp', 'fsdp'}  # test_ranks.py runs them


def test_every_example_is_run(): assert {*NEEDS} | ON_TWO_PROCESSES == {file.stem for file in EXAMPLES.glob('*.py')}


@pytest.mark.parametrize('name', NEEDS)
def test_an_example(name):
    for package in NEEDS[name]: pytest.importorskip(package)
    if name == 'compiled' and not shutil.which(os.environ.get('CXX', 'g++')): pytest.skip('torch.compile needs a compiler')
    done = subprocess.run([sys.executable, EXAMPLES / f'{name}.py'], capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    assert 'selected weights' in done.stdout
