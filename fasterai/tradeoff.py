"Predict what sparsities of layers cost and which damage they do, and choose the least harmful ones."
import numpy as np

from fasterai.knapsack import least_harm

LEVELS = (20, 40, 50, 60, 70, 78, 84, 88, 92, 95, 97, 98.5)  # percent of a layer's weights, that are measured
GRID = np.array([0., *(round(100 * (1 - .98 ** i), 2) for i in range(1, 208)), LEVELS[-1]])  # that are chosen from


class Table:
    """Hold what each sparsity of each layer costs and which damage it does, alone.

    Between the levels that were measured both are interpolated. More zeros never cost more: where a
    measurement says so, the cost with fewer of them counts."""

    def __init__(self,
        damage: dict,  # layer's name: damage at 0 % and at `LEVELS`
        cost: dict,  # layer's name: cost there, in one unit
        dense: float,  # cost of the whole dense network
    ):
        levels = [0, *LEVELS]
        self.damage = {name: np.interp(GRID, levels, row) for name, row in damage.items()}
        self.cost = {name: np.interp(GRID, levels, np.minimum.accumulate(cost[name])) for name in damage}
        self.rest = dense - sum(row[0] for row in self.cost.values())  # of all that is not pruned

    def choose(self,
        budget: float,  # cost of the whole network
    ) -> dict:  # layer's name: percent
        "Return the least damage within a budget; where none is, the cheapest of all."
        rows = list(self.damage.values()), list(self.cost.values())
        found = least_harm(*rows, budget - self.rest)
        return self.cheapest if found is None else self._named(found)

    @property
    def cheapest(self) -> dict:  # layer's name: percent
        "Return the least damage at the least cost."
        rows = list(self.damage.values()), list(self.cost.values())
        return self._named(least_harm(*rows, sum(float(row.min()) for row in self.cost.values())))

    def smallest(self,
        damage: float,  # sum over the layers
    ) -> dict:  # layer's name: percent
        "Return the least cost at no more than this damage."
        return self._named(least_harm(list(self.cost.values()), list(self.damage.values()), damage))

    def _named(self, places): return {name: float(GRID[place]) for name, place in zip(self.cost, places)}

    def rows(self,
        sparsities: dict,  # layer's name: percent
    ) -> list:  # of (layer's name, (percent, cost of the dense layer, cost, damage))
        "Return what each layer costs and does."
        return [(name, (percent, float(self.cost[name][0]), float(np.interp(percent, GRID, self.cost[name])),
                        float(np.interp(percent, GRID, self.damage[name]))))
                for name, percent in sparsities.items()]

    def of(self,
        sparsities: dict,  # layer's name: percent
    ) -> tuple:  # (cost, damage)
        "Predict what a network costs and does."
        rows = [row for _, row in self.rows(sparsities)]
        return self.rest + sum(row[2] for row in rows), sum(row[3] for row in rows)

    def curves(self,
        global_: list,  # sparsities by one global threshold, a dict for each level
    ) -> dict:  # {way to choose: list of (cost, damage)}
        "Predict cost and damage of three ways to choose."
        uniform = [dict.fromkeys(self.cost, level) for level in LEVELS]
        least = [self.choose(self.of(sparsities)[0]) for sparsities in uniform]  # within what these cost
        ways = {'least harmful': least, 'uniform': uniform, 'global': global_}
        return {name: [self.of(sparsities) for sparsities in several] for name, several in ways.items()}
