"Say before a fit what is left alone, and after it what was asked and what was reached."
from fractions import Fraction

from fasterai.arguments import name_of
from fasterai.repair import REPAIRS, Repaired
from fasterai.report import Report
from fasterai.zeros import count_zeros

LOW_RATE = .05  # of its peak: a learning rate that a network hardly recovers with
NOT_DISTILLED = ('not distilled: the fit resumes after its first event, '
                 'and the dense network of then is not in memory')


def frozen_line(
    frozen: list,  # names of layers that are frozen, and not by the Learner
) -> str:  # '' where there are none
    "Name the layers that are left alone because they do not learn."
    if not frozen: return ''
    are, they = ('are', 'they learn') if len(frozen) > 1 else ('is', 'it learns')
    return (f'{_some(frozen)} {are} frozen, and not by learn.freeze() with this optimizer, '
            f'so left alone unless {they} in this fit; the other layers are pruned')


def anew_line(
    kinds: list,  # of evidence that training gathers
) -> str:  # '' where there are none
    "Say what a resumed fit does not know of the steps before it."
    if not kinds: return ''
    return f'resumed: {" and ".join(kinds)} of earlier steps are not known, and are gathered anew'


def not_run_line(
    skipped: dict,  # name of a layer: why it was left out
) -> str:  # '' where all ran
    "Name the layers whose filters are left alone because they did not run in the first batch."
    names = [name for name, reason in skipped.items() if reason.startswith('did not run')]
    if not names: return ''
    return (f'{_some(names)} did not run in the first batch, so left alone; '
            'name them in layers= to include them')


def chosen_line(
    found,  # `fit_to.Fitted`
) -> str:
    "Say which sparsities a budget has got."
    by_sparsity = sorted(found.sparsities, key=found.sparsities.get)
    least, most = (f'{found.sparsities[name]:g} % of {name!r}' for name in (by_sparsity[0], by_sparsity[-1]))
    return f'{found.title}, from {least} to {most}'


def zeros_line(
    layers: dict,  # name: `selected.Layer`
    masks: dict,  # name: `event.Mask`
) -> str:  # '' where they are not more than a hundredth of the weights
    "Say how many weights come in as zeros that no mask holds, where, and how they can be held."
    zeros = {name: count_zeros(layer.weight, masks[name]) for name, layer in layers.items()}
    total, n = sum(layer.weight.numel() for layer in layers.values()), sum(zeros.values())
    if 100 * n <= total: return ''
    where = sorted([name for name in zeros if zeros[name]], key=zeros.get, reverse=True)
    return (f'{n:,} of {total:,} weights come in as zeros, in {_some(where)}, and may learn until they are '
            'pruned; keep_zeros=True holds them')


def names_of_repairs(
    repairs: list,  # functions, as `repair.read_repairs` returns them
) -> list:  # of str
    "Return how repairs are called: by their names in `REPAIRS`, or as functions."
    named = [(function, name) for name, function in REPAIRS.items()]
    return [next((name for known, name in named if known is repair), name_of(repair)) for repair in repairs]


def repaired_line(
    names: list,  # of the repairs
    found: tuple,  # what each returned: `Repaired`, or anything of a function of one's own; () where there was no event
) -> str:  # '' where there was nothing to repair
    "Say what was repaired at the last event, how far the outputs are off, and which repair was not kept."
    measured = [one for one in found if isinstance(one, Repaired)]
    nothing_to_do = measured and not any(one.before for one in measured)
    if not found or nothing_to_do: return ''
    undone = [name for name, one in zip(names, found) if isinstance(one, Repaired) and not one.kept]
    kept = [name for name in names if name not in undone]
    refused = f'{" and ".join(undone)} brought the outputs no nearer, so not kept'
    if not kept: return f'not repaired: {refused}, divergence {measured[0].before:.2g}'
    text = f'repaired with {" and ".join(kept)}'
    if measured: text += f', divergence {measured[0].before:.2g} -> {measured[-1].after:.2g}'
    return f'{text}; {refused}' if undone else text


def rewound_line(
    timetable,  # `Timetable`
    rewound: bool,
) -> str:  # '' where nothing was to be rewound
    "Say to which step the weights went back, or that they did not."
    if timetable.last is None: return ''
    if rewound: return f'rewound to step {timetable.remember} after the last event, at step {timetable.last}'
    return f'not rewound: the last event, due at step {timetable.last}, was not followed by a step'


def distilled_line(
    teacher,  # `Teacher`
) -> str:  # '' where nothing was distilled
    "Say how often the dense network was listened to."
    if not teacher.n_batches: return ''
    return (f'distilled in {teacher.n_lower:,} of {teacher.n_batches:,} batches, '
            'in which the dense network had the lower loss')


def low_rate_line(
    rate: float | None,  # learning rate when the target was reached, as a share of the highest before; None: it was not
    timetable,  # `Timetable`
) -> str:  # '' where it was high enough
    "Warn where the learning rate was too low for the network to recover."
    if rate is None or rate >= LOW_RATE: return ''
    return (f'the learning rate was {100 * rate:.2g} % of its peak when the sparsity was reached, '
            f'so the network hardly recovers: end {name_of(timetable.schedule)} earlier')


def reached_line(
    report: Report,
    asked: dict,  # name of a layer: fraction of zeros
    masked: dict,  # name of a layer: number of weights that are masked
    masked_before: dict,  # the same before the fit
    frozen: list,  # names of layers for which the schedule waits, since the Learner has frozen them
    unknown: frozenset,  # names of layers about which the criterion knew nothing at the last event
    timetable,  # `Timetable`
    trouble: str,  # why the last event failed, or there was none; '' where it succeeded
    round_to: int | None,  # of the rules
) -> str:
    "Say what was asked and what was reached, and why it is another sparsity."
    total, zeros = report.multiply_adds, report.saved  # of weights, where the context does not go by work
    wanted = sum(asked.get(row.layer, 0) * row.weights * row.uses for row in report.rows)
    text = (f'asked {float(100 * wanted / total):.4g} %, reached {100 * zeros / total:.2f} % '
            f'({zeros:,} of {total:,} {report.unit})')
    if frozen: return f'{_waits(frozen, report)}; {text}'
    if trouble: return f'{text}; {trouble}'
    progress, share = timetable.progress, timetable.share
    if progress < 1: return f'{text}, stopped after {100 * progress:.0f} % of the training'
    if share < 1: text += f', since {name_of(timetable.schedule)} ends at {100 * share:.0f} % of it'
    held, before = (sum(of.get(row.layer, 0) * row.uses for row in report.rows)
                    for of in (masked, masked_before))
    return text + _why(zeros, wanted * Fraction(share), held, before, sorted(unknown), round_to)


def _why(zeros, wanted, held, before, unknown, round_to):
    "Say why there are other zeros than wanted."
    if unknown: return f'; nothing is known of {_some(unknown)}, so not pruned'
    if before > round(wanted): return '; zeros that are there stay, and count'
    free = zeros - held
    if free and zeros > round(wanted): return f'; {free:,} of them are zero without a mask of this callback'
    if round_to and held != wanted: return f'; round_to={round_to} rounds the filters that stay'
    return ''


def _waits(waiting, report):
    return (f'waits while {len(waiting)} of {len(report.rows)} selected layers are frozen '
            f'({waiting[0]!r} first); fine_tune unfreezes them for its second part, '
            'elsewhere learn.unfreeze() does, or choose others by layers=')


def _some(names):
    "Write up to three names."
    more = f' and {len(names) - 3} more' if len(names) > 3 else ''
    return ', '.join(map(repr, names[:3])) + more
