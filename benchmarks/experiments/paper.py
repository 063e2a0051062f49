"What the calibration of one block costs in a language model of 7 billion parameters: computed, not measured."
from experiments.rows import as_table

HIDDEN, WIDE, BLOCKS = 4096, 11008, 32  # as in LLaMA-7B
TOKENS = 128 * 2048  # the calibration set of Frantar & Alistarh 2023
BYTES = 8  # of an entry, float64
LAYERS = {  # name: (inputs, outputs)
    'q, k, v, o': (HIDDEN, HIDDEN, 4), 'gate, up': (HIDDEN, WIDE, 2), 'down': (WIDE, HIDDEN, 1),
}


def run(data):
    "Yield the table, as a text."
    rows, total = [], [0, 0, 0]
    for name, (inputs, outputs, number) in LAYERS.items():
        grams = 2 * inputs ** 2 * BYTES  # XᵀX and XᵀX'
        gather = number * 2 * 2 * TOKENS * inputs ** 2
        kept = inputs // 2
        solve = number * outputs * kept ** 3 / 3  # a Cholesky for each output, at 50 %
        run_once = number * 2 * 2 * TOKENS * inputs * outputs  # pruned and dense
        total = [total[0] + gather, total[1] + solve, total[2] + run_once]
        rows.append((name, str(number), f'{grams / 1e9:.2f} GB', f'{gather:.1e}', f'{solve:.1e}', f'{run_once:.1e}'))
    rows.append(('one block', '7', 'the largest: one layer at a time', *(f'{value:.1e}' for value in total)))
    together = BLOCKS * sum(number * 2 * inputs ** 2 * BYTES for inputs, _, number in LAYERS.values())
    heading = ('layers', 'number', 'two Gram matrices of one layer, float64', 'flops to gather them',
               'flops to solve, 50 %', 'flops to run pruned and dense once')
    yield (f'{BLOCKS} blocks of {HIDDEN} × {WIDE}, {TOKENS:,} tokens. All Gram matrices of the model together would take '
           f'{together / 1e9:.0f} GB.\n\n' + as_table(rows, heading))
