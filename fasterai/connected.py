"Find which of many numbers are connected by pairs."
import numpy as np


def lowest_connected(
    n: int,  # how many numbers: 0 to n - 1
    one: np.ndarray,  # ints (pairs,)
    other: np.ndarray,  # ints (pairs,), what each is connected with
) -> np.ndarray:  # ints (n,)
    "Return for each number the lowest one that it is connected with, itself where there is none."
    found = np.arange(n)
    while True:
        low = np.minimum(found[one], found[other])
        lower = found.copy()
        np.minimum.at(lower, found[one], low)
        np.minimum.at(lower, found[other], low)
        while not np.array_equal(lower, lower[lower]): lower = lower[lower]
        if np.array_equal(lower, found): return found
        found = lower
