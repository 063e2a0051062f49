"""A sentence encoder (BERT, 6 layers of 384), its 36 Linears pruned in one event, each to the same sparsity,
without labels or training.

It is compared with the dense network on sentences that it was not calibrated on: the rank correlation of the
similarities of all pairs, and the mean cosine between pruned and dense vectors."""
import re
from copy import deepcopy

import numpy as np
import torch
from torch import nn

from experiments.bert import batches, encode, load
from experiments.memory import above, held_together
from experiments.rows import Goal, Row, timed
from fasterai.context import within
from fasterai.repair import refit
from fasterai.sparsifier import Sparsifier

CALIBRATE, MEASURE = 800, 350  # sentences
NONE, REFIT = 'no repair', 'refit'
CASES = {  # percent or pattern: (criterion, repair); sparsegpt and alps refit by themselves
    '50': [('magnitude', NONE), ('magnitude', REFIT), ('wanda', NONE), ('wanda', REFIT), ('ria', REFIT),
           ('sparsegpt', 'its own refit'), ('alps', 'its own refit')],
    '70': [('magnitude', NONE), ('magnitude', REFIT), ('wanda', NONE), ('wanda', REFIT), ('alps', 'its own refit')],
    '2:4': [('magnitude', NONE), ('magnitude', REFIT), ('wanda', NONE), ('wanda', REFIT), ('alps', 'its own refit')],
}


CONTEXTS = dict.fromkeys(('wanda', 'ria'), within('O'))  # as in the papers; else within layers
CRITERIA = {criterion for cases in CASES.values() for criterion, _ in cases}


def run(data, sparsity):
    "Yield how near networks that are pruned to one of `CASES` are to the dense one."
    dense = load()
    sentences = _sentences(data / 'shakespeare/input.txt')
    calibrate = batches(sorted(sentences[:CALIBRATE], key=len))
    measure = batches(sentences[CALIBRATE:])
    wanted = encode(dense, measure)
    found, slowest, peak = {}, 0., 0
    name = sparsity if ':' in sparsity else f'{sparsity} %'
    for criterion, repair in CASES[sparsity]:
        with timed() as clock, above() as memory:
            net = _pruned(dense, criterion, repair, sparsity, calibrate)
        slowest = max(slowest, clock.seconds)
        if repair == REFIT: peak = max(peak, memory.peak)
        vectors = encode(net, measure)
        cosine = float((vectors * wanted).sum(1).mean())
        found[criterion, repair] = correlation = rank_correlation(vectors, wanted)
        yield Row('MiniLM', f'{name}, {criterion}, {repair}', f'rank correlation {correlation:.4f}, cosine {cosine:.4f}',
                  seconds=clock.seconds)
    plain, repaired = (found['magnitude', repair] for repair in (NONE, REFIT))
    yield Goal(f'MiniLM, {name}: refit comes nearer to the dense network than magnitude alone',
               f'{repaired:.4f} against {plain:.4f}', repaired > plain)
    yield Goal(f'MiniLM, {name}: pruning and repair in less than five minutes', f'{slowest:.0f} s at most', slowest < 300)
    together = held_together(dense, nn.Linear)
    setting = f'{name}: peak of a refit above networks and batches; all Gram matrices: {together / 1e6:.0f} MB'
    yield Row('MiniLM', setting, f'{peak / 1e6:.0f} MB')


def _sentences(path):
    "Return sentences of 30 to 120 characters, drawn by chance, none of them twice."
    text = re.sub(r'(?m)^[^\n]*:$', '', path.read_text())  # who speaks
    parts = re.split(r'(?<=[.!?])\s+', re.sub(r'\s+', ' ', text))
    sentences = sorted({part for part in parts if 30 <= len(part) <= 120})
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0))
    return [sentences[i] for i in order[:CALIBRATE + MEASURE].tolist()]


def _pruned(dense, criterion, repair, sparsity, calibrate):
    net = deepcopy(dense)
    is_pattern = ':' in sparsity
    context = sparsity if is_pattern else CONTEXTS.get(criterion, 'local')
    percent = 50 if is_pattern else float(sparsity)
    known = {} if criterion == 'magnitude' else dict(data=calibrate)
    Sparsifier(net, 'weight', context, criterion, layers=nn.Linear, **known).sparsify_model(percent)
    if repair == REFIT: refit(net, dense, calibrate)
    return net


def rank_correlation(one, other) -> float:
    "Return Spearman's correlation of the similarities of all pairs of vectors."
    above = torch.ones(len(one), len(one)).triu(1).bool()
    ranks = [np.argsort(np.argsort((v @ v.T)[above].numpy())) for v in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])
