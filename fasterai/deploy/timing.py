"Latency, side by side."
import time
from statistics import median, quantiles
from typing import NamedTuple

import torch


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
    def once(call):
        start = time.perf_counter()
        call()
        if torch.device(device).type == 'cuda': torch.cuda.synchronize(device)
        return time.perf_counter() - start
    for call in calls: once(call)  # the first call sets things up
    times, end = [[once(call)] for call in calls], time.perf_counter() + seconds
    while len(times[0]) < 7 or len(times[0]) < rounds and time.perf_counter() < end:
        for call, took in zip(calls, times): took.append(once(call))
    return [Latency(median(t), quantiles(t, n=4)[0], quantiles(t, n=4)[2]) for t in times]


def faster(
    new: Latency,
    old: Latency,
) -> bool:
    "Is the difference more than noise: do the middle halves not meet?"
    return new.high < old.low
