"An example for each name of the reference: a comment has the name. These lines come before each of them."
from fastai.basics import *
from fasterai.all import *
from fasterai.deploy import *
from fasterai.demo import digits_learner, network

learn = digits_learner()
model = learn.model  # block1.conv, block2.conv, block3.conv, output
x, y = learn.dls.one_batch()

# SparsifyCallback
learn.fit_one_cycle(2, 1e-2, cbs=SparsifyCallback(90, schedule='gradual'))

# KeepSparse
Sparsifier(model).sparsify_model(80)
learn.fit_one_cycle(1, 1e-2, cbs=KeepSparse())  # the zeros stay

# Sparsifier
sparsifier = Sparsifier(model, context='erk', exclude='output')
sparsifier.sparsify_model(90)
print(sparsifier.report())

# Attached
optimizer = torch.optim.Adam(model.parameters(), 1e-2)
with Sparsifier(model).attach(optimizer, sparsity=90, schedule='gradual', steps=20) as attached:
    for x, y in learn.dls.train:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
print(attached.is_over)

# Masks
sparsifier = Sparsifier(model)
sparsifier.sparsify_model(50)
print(sparsifier.masks['output'][0], sparsifier.masks.left('output'))

# Change
change = Sparsifier(model).sparsify_model(50)
print({name: int(died.sum()) for name, died in change.died.items()})

# Layer
layer = Sparsifier(model, 'filter').layers['block2.conv']
print(layer.module, layer.weight.shape)

# Report
report = Sparsifier(model).report()
print(report, report.sparsity, report.to_frame())

# block
Sparsifier(model, block(2, 16), layers='output').sparsify_model(50)

# head
attention = nn.MultiheadAttention(64, num_heads=4)
Sparsifier(attention, head(4), layers='in_proj_weight').sparsify_model(50)

# add_layer_type
class Scaled(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(inputs, outputs))

add_layer_type(Scaled, matrix='I O')
Sparsifier(nn.Sequential(Scaled(64, 10)), 'channel').sparsify_model(50)

# Criterion
def change_of_weight(weight, initial): return (weight - initial).abs()

learn.fit(1, 1e-2, cbs=SparsifyCallback(80, criteria=change_of_weight))

# magnitude
Sparsifier(model, criteria='magnitude').sparsify_model(80)

# gradient
nn.functional.cross_entropy(model(x), y).backward()
Sparsifier(model, criteria='gradient').sparsify_model(80)

# taylor
learn.fit(1, 1e-2, cbs=SparsifyCallback(80, criteria='taylor'))

# movement
learn.fit(1, 1e-2, cbs=SparsifyCallback(80, criteria='movement'))

# squared
Sparsifier(model, 'filter', criteria='squared').sparsify_model(50)

# magnitude_increase
learn.fit(1, 1e-2, cbs=SparsifyCallback(80, criteria='magnitude_increase'))

# obd
Sparsifier(model, criteria='obd', data=[(x, y)], loss_func=nn.functional.cross_entropy).sparsify_model(80)

# obs
Sparsifier(model, criteria='obs', data=[(x, y)], loss_func=nn.functional.cross_entropy).sparsify_model(80)

# synflow
Sparsifier(model, criteria='synflow', example=x).sparsify_model(80)

# wanda
Sparsifier(model, criteria='wanda', context=within('O'), data=[x]).sparsify_model(50)

# ria
Sparsifier(model, criteria='ria', data=[x]).sparsify_model(50)

# sparsegpt
Sparsifier(model, criteria='sparsegpt', data=[x]).sparsify_model(50)

# alps
Sparsifier(model, criteria='alps', data=[x]).sparsify_model(50)

# fpgm
Sparsifier(model, 'filter', 'local', criteria='fpgm').sparsify_model(50)

# elementwise
from fasterai.criteria import elementwise

@elementwise
def distance(weight, initial): return abs(weight - initial)

learn.fit(1, 1e-2, cbs=SparsifyCallback(80, criteria=distance))

# matrixwise
from fasterai.criteria import matrixwise

@matrixwise
def relative(weight):  # (groups, outputs, inputs)
    return weight.abs() / weight.abs().sum(-1, keepdim=True)

Sparsifier(model, criteria=relative).sparsify_model(50)

# Kind
from fasterai.kinds import EVIDENCE, Kind

EVIDENCE['steps'] = Kind(lambda layer, n: torch.full_like(layer.weight, n or 0), on_step=lambda layer, n: (n or 0) + 1)

# Computed
from fasterai.kinds import EVIDENCE, Computed, Kind

EVIDENCE['square'] = Kind(lambda layer, state: Computed(lambda weight: weight * weight, {'weight': layer.weight}))

# dense_gradient
learn.fit(1, 1e-2, cbs=SparsifyCallback(90, schedule=rigl(every=steps(5)), regrow='gradient'))

# distillation
learn.fit(1, 1e-2, cbs=SparsifyCallback(90, distil=distillation(share=.5)))

# Snapshot
snapshot = Snapshot(model)
learn.fit(1, 1e-2, cbs=SparsifyCallback(80))
Sparsifier(model, keep_zeros=True).rewind(snapshot)

# find_ticket
found = find_ticket(learn, lambda learn: learn.fit(1, 1e-2), sparsity=80, rounds=2, compare=False)

# Ticket
found = find_ticket(learn, lambda learn: learn.fit(1, 1e-2), sparsity=80, rounds=1, compare=False)
found.put_into(model)  # the first weights, and zeros
print(found.to_frame())

# Context
def median(layers, fraction):  # one mask for each layer, True = keep
    return [torch.from_numpy(one.all_scores() > np.quantile(one.all_scores(), float(fraction))) for one in layers]

Sparsifier(model, context=median).sparsify_model(80)

# within
Sparsifier(model, context=within('O')).sparsify_model(50)  # the same share of each output

# LayerGroups
def half_of_each(layers, fraction):
    return [torch.from_numpy(one.all_scores() > np.median(one.all_scores())) for one in layers]

Sparsifier(model, context=half_of_each).sparsify_model(50)

# Schedule
def root(progress): return progress ** .5

learn.fit(1, 1e-2, cbs=SparsifyCallback(80, schedule=root))

# one_shot
SparsifyCallback(80, schedule=one_shot(at=.5))

# iterative
SparsifyCallback(80, schedule=iterative(n_steps=5, start=.1, end=.6))

# gradual
SparsifyCallback(80, schedule=gradual(start=.1, end=.75, power=3))

# linear
SparsifyCallback(80, schedule=linear(start=0, end=.5))

# cosine
SparsifyCallback(80, schedule=cosine(start=0, end=.5))

# one_cycle
SparsifyCallback(80, schedule=one_cycle(start=0, end=.5))

# dense_sparse_dense
SparsifyCallback(80, schedule=dense_sparse_dense())

# exponential
SparsifyCallback(80, schedule=exponential(rate=5))

# multi_step
SparsifyCallback(80, schedule=multi_step(at=(.25, .5), shares=(.5, 1)))

# acdc
SparsifyCallback(80, schedule=acdc(start=.1, end=.8, every=.1))

# rigl
SparsifyCallback(80, schedule=rigl(every=steps(100), swap=.3, end=.75))

# Due
def halfway(progress): return Due(share=1, swap=.3, nth=int(progress >= .5))  # one exchange

learn.fit(1, 1e-2, cbs=SparsifyCallback(80, schedule=halfway))

# steps
learn.fit(1, 1e-2, cbs=SparsifyCallback(80, schedule=one_shot(at=steps(10))))

# epochs
learn.fit(3, 1e-2, cbs=SparsifyCallback(80, schedule=gradual(end=epochs(1.5))))

# over
schedule = gradual(end=epochs(8)).over(n_epochs=10, steps_per_epoch=500)
print(schedule(.5))

# refit
dense = deepcopy(model)
Sparsifier(model).sparsify_model(50)
print(refit(model, dense, [x]))

# recalibrate
dense = deepcopy(model)
Sparsifier(model).sparsify_model(50)
print(recalibrate(model, dense, [x]))

# Repaired
change = Sparsifier(model, data=[x], repair='refit').sparsify_model(50)
print(change.repaired[0].before, change.repaired[0].after)

# sensitivity
found = sensitivity(learn, levels=(50, 90))

# Sensitivity
found = sensitivity(learn, levels=(50, 90))
print(found.suggest(70), found.to_frame())

# fit_to
found = fit_to(model, x, [x], bytes=60_000)

# Fitted
found = fit_to(model, x, [x], bytes=60_000)
print(found.sparsity, found.to_frame())
small = found.model

# plot_kernels
plot_kernels(model.block2.conv.weight)

# plot_weights
dense = deepcopy(model)
Sparsifier(model).sparsify_model(80)
plot_weights(dense.block2.conv.weight, model.block2.conv.weight)

# plot_tradeoff
plot_tradeoff({'weight': [(50, .99), (80, .98)], 'filter': [(50, .98), (80, .95)]})

# plot_schedule
plot_schedule('gradual')

# save_sparse
Sparsifier(model).sparsify_model(90)
save_sparse(model, 'sparse.safetensors')

# load_sparse
save_sparse(model, 'sparse.safetensors')
load_sparse(network(), 'sparse.safetensors')

# shrink
Sparsifier(model, 'filter', 'local', example=x).sparsify_model(50)
small = shrink(model, x)

# save_small
Sparsifier(model, 'filter', 'local', example=x).sparsify_model(50)
save_small(shrink(model, x), 'small.safetensors', model)

# load_small
Sparsifier(model, 'filter', 'local', example=x).sparsify_model(50)
save_small(shrink(model, x), 'small.safetensors', model)
small = load_small(model, 'small.safetensors')

# speed_up
Sparsifier(model).sparsify_model(90)
fast = speed_up(model.eval(), x, seconds=.02)  # leave out seconds= for times to rely on

# save_fast
fast = speed_up(model.eval(), x, seconds=.02)
save_fast(fast, 'fast.safetensors')

# load_fast
save_fast(speed_up(model.eval(), x, seconds=.02), 'fast.safetensors')
fast = load_fast(network(), 'fast.safetensors')

# export_onnx
export_onnx(model, 'model.onnx', x)

# payoff
dense = deepcopy(model)
Sparsifier(model).sparsify_model(90)
print(payoff(dense, model, x, seconds=.02))

# Payoff
result = payoff(model, model, x, seconds=.02)
print(result.to_frame())
result.plot()

# SparseConv
from fasterai.deploy.kernels import SparseConv
sparse = SparseConv(model.block2.conv.eval())
print(sparse(torch.randn(1, 32, 8, 8)).shape)

# SparseLinearKernel
from fasterai.deploy.kernels import SparseLinearKernel
print(SparseLinearKernel(model.output)(torch.randn(1, 64)).shape)

# MaxPool
from fasterai.deploy.kernels import MaxPool
print(MaxPool(nn.MaxPool2d(2))(torch.randn(1, 3, 8, 8)).shape)
