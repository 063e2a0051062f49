"Split an event into rounds of rising sparsity."
from fractions import Fraction
from math import ceil, log


def in_rounds(
    budgets: list,  # `event.Budget`
    rounds: int | None = None,  # how many; None: what the criterion needs
    keeps: Fraction | None = None,  # the share of what is left that a round keeps at least; None: one round is enough
) -> list:  # of lists of budgets, the last one as given
    "Return the budgets of each round. A round keeps the same share of what is left as the others."
    in_one = rounds == 1 or rounds is None and keeps is None
    if in_one: return [budgets]
    now = [_sparsity(budget) for budget in budgets]
    if rounds is None: rounds = max([1, *(_rounds(budget, has, keeps) for budget, has in zip(budgets, now))])
    steps = [[_part(budget, has, Fraction(i, rounds)) for budget, has in zip(budgets, now)]
             for i in range(1, rounds)]
    return [*steps, budgets]


def _sparsity(budget):
    "Return the fraction of the weights of a budget that are zero now, by work of their multiply-adds."
    zeros = sum(int((layer.weight.detach() == 0).sum()) * layer.uses for layer in budget.layers)
    return Fraction(zeros, _size(budget))


def _size(budget): return sum(layer.weight.numel() * layer.uses for layer in budget.layers)


def _kept(budget):
    "Return the fraction of weights that a budget keeps in the end; at 100 % that of one weight."
    return max(1 - budget.fraction, Fraction(1, _size(budget)))


def _rounds(budget, now, keeps):
    if keeps is None or budget.fraction <= now: return 1
    return ceil(log(_kept(budget) / (1 - now)) / log(keeps))


def _part(budget, now, progress):
    "Return the budget of a round."
    if budget.fraction <= now: return budget
    left = (1 - now) * Fraction(float(_kept(budget) / (1 - now)) ** float(progress))
    return budget._replace(target=1 - left, share=Fraction(1), initial=Fraction(0))
