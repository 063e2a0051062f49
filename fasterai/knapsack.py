"Choose one option for each of several things, so that together they do the least harm within a budget."
import numpy as np

STEPS = 4000  # of the budget; a cost is rounded up to the next


def least_harm(
    harms: list,  # arrays (options,), one for each thing; an option of the same place in `costs`
    costs: list,  # arrays (options,), in one unit
    budget: float,  # in that unit
) -> list | None:  # the place of an option for each thing; None where the cheapest ones cost more than the budget
    """Choose by dynamic programming over a budget in steps (as SPDY does, Frantar & Alistarh 2022).

    Costs are counted from the cheapest option of each thing, and rounded up, so that the budget is kept."""
    cheapest = [float(cost.min()) for cost in costs]
    room = budget - sum(cheapest)
    if room < 0: return None
    step = room / STEPS
    best, chosen = np.zeros(STEPS + 1), []  # of the things so far, the least harm within so many steps
    for harm, cost, least in zip(harms, costs, cheapest):
        best, options = _with(best, harm, _in_steps(cost - least, step))
        chosen.append(options)
    left, found = STEPS, []
    for options, cost, least in zip(reversed(chosen), reversed(costs), reversed(cheapest)):
        found.append(int(options[left]))
        left -= int(_in_steps(cost - least, step)[found[-1]])
    return found[::-1]


def _in_steps(cost, step):
    "Round costs up to whole steps; those that no budget reaches are more than all steps."
    if not step: return np.where(cost > 0, STEPS + 1, 0)
    return np.ceil(np.minimum(cost / step, STEPS + 1) - 1e-9).astype(int)


def _with(best, harm, steps):
    "Return the least harm with one thing more, (STEPS + 1,), and which of its options that takes."
    found, options = np.full(len(best), np.inf), np.zeros(len(best), int)
    for option, (more, n) in enumerate(zip(harm, steps)):
        if n > STEPS: continue
        total = best[:len(best) - n] + more
        better = total < found[n:]
        found[n:][better] = total[better]
        options[n:][better] = option
    return found, options
