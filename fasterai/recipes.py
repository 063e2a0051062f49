"Name arguments of a training that go together, each of which was measured."
from fasterai.arguments import one_of
from fasterai.schedule import one_cycle

DEFAULTS = {'schedule': 'gradual', 'distil': None}  # of the arguments that a recipe may choose

# `accurate` is ahead of gradual pruning where a trained ResNet-20 is pruned far (`benchmarks/SCIENCE.md`). It
# begins at once, so that the dense network teaches as it came, and slowly; for a half of the training the
# sparsity is reached.
RECIPES = {
    'accurate': {'schedule': one_cycle(start=0, end=.5), 'distil': .9},
}


def with_recipe(
    recipe: str | None,  # a name in `RECIPES`
    given: dict,  # {name of an argument: what came}
) -> dict:  # {name: value}
    "Return arguments, those that were left at their defaults as a recipe has them."
    if recipe is None: return given
    names = ', '.join(RECIPES)
    if not isinstance(recipe, str):
        raise TypeError(f'recipe: got {recipe!r}, expected one of {names}, or None')
    row = one_of('recipe', recipe, RECIPES, 'or None')
    return given | {name: value for name, value in row.items() if _is(given[name], DEFAULTS[name])}


def _is(value, default): return value is default or isinstance(value, str) and value == default
