"Measure latencies side by side."
import random
import time
from statistics import median, quantiles
from typing import NamedTuple

import torch

LEAST = 7  # calls that are timed however long they take: a quarter of them is then no single call

WON = .75  # share of rounds


class Latency(NamedTuple):
    "Describe how long a call takes: the median of many calls, and the range of the middle half."
    seconds: float  # the median
    low: float  # seconds; a quarter of the calls took less
    high: float  # seconds; a quarter of the calls took more
    rounds: tuple = ()  # seconds of each call, in the order of the rounds


def side_by_side(
    calls: list,  # functions without arguments
    seconds: float = 1.,  # time to spend on all of them together, about
    rounds: int = 200,  # how often each is called, at most
    device: torch.device | str = 'cpu',  # the device that computes: a GPU is waited for
) -> list:  # a `Latency` for each call
    """Time calls side by side, round after round, so that a change of the machine's speed affects all alike.

    The order is another one each round: a call finds in the caches what the one before it has left there."""
    on_gpu = torch.device(device).type == 'cuda'

    def once(call):
        start = time.perf_counter()
        call()
        if on_gpu: torch.cuda.synchronize(device)  # a call returns before the GPU is done
        return time.perf_counter() - start

    for call in calls: once(call)  # the first call sets things up
    times = [[once(call)] for call in calls]
    end = time.perf_counter() + seconds

    def enough():
        count = len(times[0])
        return count >= LEAST and (count >= rounds or time.perf_counter() >= end)

    order, shuffle = list(range(len(calls))), random.Random(0).shuffle
    while not enough():
        shuffle(order)
        for i in order: times[i].append(once(calls[i]))
    return [_latency(t) for t in times]


def _latency(times):
    quarter, _, three_quarters = quantiles(times, n=4)
    return Latency(median(times), quarter, three_quarters, tuple(times))


def faster(
    new: Latency,
    old: Latency,
) -> bool:
    """Tell whether a call is faster by more than noise.

    Two calls of one round ran one after the other, so that what slowed one slowed both. Three of four rounds
    must be won, and so many that chance alone does it once in forty. Without rounds, the middle halves must
    not overlap."""
    if not new.rounds or len(new.rounds) != len(old.rounds): return new.high < old.low
    count, won = len(new.rounds), sum(a < b for a, b in zip(new.rounds, old.rounds))
    return won >= WON * count and won - (count - won) >= 2 * count ** .5
