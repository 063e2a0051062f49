"Latency, side by side."
import time
from statistics import median, quantiles
from typing import NamedTuple

import torch

LEAST = 7  # calls that are timed however long they take: a quarter of them is then no single call


class Latency(NamedTuple):
    "Seconds for one call: the median, and how the middle half spreads."
    seconds: float
    low: float  # a quarter of the calls took less
    high: float  # and a quarter more


def side_by_side(
    calls: list,  # functions of nothing
    seconds: float = 1.,  # to spend in all, about
    rounds: int = 200,  # at most
    device: torch.device | str = 'cpu',
) -> list:  # of `Latency`, one a call
    "Time them in turn, again and again, so that a machine that speeds up or slows down is unfair to none."
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
    "Is the difference more than noise: do the middle halves not meet?"
    return new.high < old.low
