"Say why filters stay that are zero, and what was removed."
from collections import Counter

NOT_ALONE = 'without them the outputs would not be the same'
FAILS = 'without them the model fails'
NOT_TRIED = 'removing them failed together with others, and there was no time to try them alone'
NOT_RUN = 'their layer does not run on the example'
LAST_ONE = 'one channel must be left'
IS_INPUT = "they meet the network's input, a batch or positions, of which nothing can go"
IS_OUTPUT = "they are the network's output"
HAS_BIAS = ('their bias is not zero: apply_masks() of a Sparsifier with granularity=\'filter\' makes it so, '
            'and needs some training or repair')
IS_SHIFTED = 'a bias or a BatchNorm makes them other than zero'
MEETS_NONZERO = 'they are added to, or read by, channels that are not zero: coupled=True zeroes such together'
SETS_SCALE = 'their number sets the scale of attention'
IS_NUMBERED = 'the code takes them by their number'
UNEVEN = 'each group of a convolution, or part of a split, must lose as many'
NOT_ALL = 'they are rows of a whole, such as a head of attention or a part of a split, that is not zero'
TRAINING_UNKNOWN = ('the model does not run in training mode on the example, so layers that run in it alone '
                    'may not fit what they read')
UNREAD = 'nothing that is known reads them'
NO_OUTPUTS = 'the network returns no tensors that could be compared'


def mixes(
    operation: str,  # as torch calls it
) -> str:
    "Return why channels that pass an operation stay."
    return f'they pass {_with_article(operation)}, which mixes channels'


def makes_nonzero(
    operation: str,  # as torch calls it
) -> str:
    "Return why channels that are zero before an operation, and not behind it, stay."
    return f'{_with_article(operation)} makes them other than zero'


def _with_article(noun): return f'an {noun}' if noun[0] in 'aeiou' else f'a {noun}'


def summary(
    before: int,  # parameters
    after: int,
    removed: dict,  # name of a layer: how many of its filters went
    staying: dict,  # name of a layer: reasons, one for each zero filter that stays
) -> str:  # lines
    "Return what is printed of a removal: what went, and a line for each reason why others stay."
    if not before: return 'shrink: nothing to remove: the model has no parameters'
    lines = [f'shrink: {sum(removed.values()):,} filters of {len(removed)} layers removed; '
             f'{before:,} parameters became {after:,} ({100 * after / before:.1f} %)']
    counts = {}  # reason: Counter of names
    for name, reasons in staying.items():
        for reason in reasons: counts.setdefault(reason, Counter())[name] += 1
    for reason, names in counts.items():
        lines.append(f'  {sum(names.values()):,} zero filters stay in {listed(list(names))}: {reason}')
    if not removed and not staying:
        lines.append("  no filter is zero: prune with granularity='filter' first")
    return '\n'.join(lines)


def listed(
    names: list,
    most: int = 3,  # of them that are named
) -> str:
    "Return names as a text, where there are many the first and how many more."
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more
