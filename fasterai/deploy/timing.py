"Measure latencies side by side."
import time
from statistics import median, quantiles
from typing import NamedTuple

import torch

LEAST = 7  # calls that are timed however long they take: a quarter of them is then no single call


class Latency(NamedTuple):
    "Describe how long a call takes: the median of many calls, and the range of the middle half."
    seconds: float  # the median
    low: float  # seconds; a quarter of the calls took less
    high: float  # seconds; a quarter of the calls took more


def side_by_side(
    calls: list,  # functions without arguments
    seconds: float = 1.,  # time to spend on all of them together, about
    rounds: int = 200,  # how often each is called, at most
    device: torch.device | str = 'cpu',  # the device that computes: a GPU is waited for
) -> list:  # a `Latency` for each call
    "Time calls in turn, round after round, so that a change of the machine's speed affects all alike."
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

    while not enough():
        for call, took in zip(calls, times): took.append(once(call))
    return [_latency(t) for t in times]


def _latency(times):
    quarter, _, three_quarters = quantiles(times, n=4)
    return Latency(median(times), quarter, three_quarters)


def faster(
    new: Latency,
    old: Latency,
) -> bool:
    "Tell whether a call is faster by more than noise: whether its middle half lies below that of the other."
    return new.high < old.low
