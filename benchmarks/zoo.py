"""Prune and shrink the architectures that people have, one process each: `python benchmarks/zoo.py`.

Networks of timm, transformers, torchvision, segmentation-models-pytorch and ultralytics come from their
constructors, with random weights and statistics: `pip install '.[zoo]'`. Half of the filters of each are zeroed
(`filter`, `local`, `coupled=True`) and `shrink` removes what can go. `zoo.py timm hf/bert` runs those whose names
begin so, without names all are run. Their rows of `ZOO.md` are written, and the others stay."""
import contextlib
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import nn

SIDE = 64  # pixels of a picture, where the architecture takes any
TIMM = {
    'coatnet_nano_rw_224': 224, 'convmixer_768_32': 64, 'convnext_atto': 64, 'convnextv2_atto': 64, 'densenet121': 64,
    'dla34': 64, 'efficientformer_l1': 224, 'efficientnet_b0': 64, 'fastvit_t8': 64, 'ghostnet_100': 64,
    'hrnet_w18_small': 64, 'inception_next_atto': 64, 'inception_v3': 96, 'lcnet_050': 64, 'levit_128s': 224,
    'maxvit_pico_rw_256': 256, 'mixer_s32_224': 224, 'mobilenetv2_100': 64, 'mobilenetv3_small_100': 64,
    'mobilenetv4_conv_small': 64, 'mobileone_s0': 64, 'nf_resnet26': 64, 'nfnet_l0': 64, 'regnety_002': 64,
    'repvgg_a0': 64, 'res2net50_26w_4s': 64, 'resnet18': 64, 'resnext50_32x4d': 64, 'rexnet_100': 64,
    'seresnet18': 64, 'skresnet18': 64, 'starnet_s1': 64, 'swin_tiny_patch4_window7_224': 224, 'vgg11_bn': 64,
    'vit_tiny_patch16_224': 224, 'vovnet39a': 64, 'xception41': 64}
SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)


def of_timm(name, side):
    "Return a network of timm and an example."
    import timm
    return timm.create_model(name, num_classes=10), torch.randn(2, 3, side, side)


def tokens(length=8): return torch.randint(1, 90, (2, length))


def of_transformers(config, model, example, **settings):
    "Return a small network of transformers and an example."
    import transformers
    built = getattr(transformers, model)(getattr(transformers, config)(**settings))
    return built, example() if callable(example) else example


def picture(side=32): return {'pixel_values': torch.randn(2, 3, side, side)}
def text(**more): return {'input_ids': tokens(), **more}


LLAMA = SMALL | dict(use_cache=False)
TRANSFORMERS = {
    'albert': ('AlbertConfig', 'AlbertModel', text, SMALL | dict(embedding_size=32)),
    'bart': ('BartConfig', 'BartModel', partial(text, use_cache=False), dict(
        d_model=64, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=128, decoder_ffn_dim=128, vocab_size=100,
        encoder_attention_heads=4, decoder_attention_heads=4)),
    'bert': ('BertConfig', 'BertModel', text, SMALL),
    'bert-mlm': ('BertConfig', 'BertForMaskedLM', text, SMALL),
    'bloom': ('BloomConfig', 'BloomModel', partial(text, use_cache=False), dict(
        hidden_size=64, n_layer=2, n_head=4, vocab_size=100)),
    'clip': ('CLIPVisionConfig', 'CLIPVisionModel', picture, dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)),
    'convnext': ('ConvNextConfig', 'ConvNextModel', partial(picture, 64), dict(
        hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 2, 1])),
    'convnextv2': ('ConvNextV2Config', 'ConvNextV2Model', partial(picture, 64), dict(
        hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 2, 1])),
    'deberta-v2': ('DebertaV2Config', 'DebertaV2Model', text, SMALL),
    'dinov2': ('Dinov2Config', 'Dinov2Model', picture, dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)),
    'distilbert': ('DistilBertConfig', 'DistilBertModel', text, dict(dim=64, hidden_dim=128, n_layers=2, n_heads=4, vocab_size=100)),
    'gpt-neox': ('GPTNeoXConfig', 'GPTNeoXModel', partial(text, use_cache=False), SMALL),
    'gpt2': ('GPT2Config', 'GPT2LMHeadModel', partial(text, use_cache=False), dict(
        n_embd=64, n_layer=2, n_head=4, vocab_size=100)),
    'llama': ('LlamaConfig', 'LlamaForCausalLM', text, LLAMA),
    'llama-gqa': ('LlamaConfig', 'LlamaForCausalLM', text, LLAMA | dict(num_key_value_heads=2)),
    'mamba': ('MambaConfig', 'MambaModel', partial(text, use_cache=False), dict(hidden_size=64, num_hidden_layers=2, vocab_size=100)),
    'mixtral-moe': ('MixtralConfig', 'MixtralForCausalLM', text, LLAMA | dict(num_key_value_heads=2, num_local_experts=4)),
    'opt': ('OPTConfig', 'OPTModel', partial(text, use_cache=False), dict(
        hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100, word_embed_proj_dim=64)),
    'qwen2': ('Qwen2Config', 'Qwen2ForCausalLM', text, LLAMA | dict(num_key_value_heads=2)),
    'roberta': ('RobertaConfig', 'RobertaModel', text, SMALL),
    'segformer': ('SegformerConfig', 'SegformerModel', partial(picture, 64), {}),
    't5': ('T5Config', 'T5Model', lambda: {'input_ids': tokens(), 'decoder_input_ids': tokens(), 'use_cache': False}, dict(
        d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=100)),
    'vit': ('ViTConfig', 'ViTModel', picture, dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)),
    'whisper': ('WhisperConfig', 'WhisperModel', lambda: {
        'input_features': torch.randn(2, 20, 100), 'decoder_input_ids': tokens(), 'use_cache': False}, dict(
        d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, num_mel_bins=20,
        encoder_ffn_dim=128, decoder_ffn_dim=128, max_source_positions=50, vocab_size=100, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1)),
}


def of_torchvision(name, shape, **settings):
    "Return a network of torchvision and an example."
    from torchvision import models
    return getattr(models, name)(weights=None, **settings), torch.randn(2, *shape)


def ssdlite():
    "Return a detector of torchvision and an example."
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)
    return model, ([torch.rand(3, 64, 64), torch.rand(3, 64, 64)],)


def video():
    "Return a network for videos and an example."
    from torchvision.models.video import r3d_18
    return r3d_18(num_classes=10), torch.randn(2, 3, 4, 32, 32)


TORCHVISION = {
    'googlenet': ('googlenet', (3, 96, 96), dict(num_classes=10, aux_logits=False, init_weights=False)),
    'googlenet-aux': ('googlenet', (3, 96, 96), dict(num_classes=10, aux_logits=True, init_weights=False)),
    'shufflenet': ('shufflenet_v2_x0_5', (3, 64, 64), dict(num_classes=10)),
    'squeezenet': ('squeezenet1_1', (3, 64, 64), dict(num_classes=10)),
    'vit_b_16': ('vit_b_16', (3, 32, 32), dict(image_size=32, num_classes=10))}


def of_smp(name, encoder='resnet18', **settings):
    "Return a network for segmentation and an example."
    import segmentation_models_pytorch as smp
    return getattr(smp, name)(encoder, encoder_weights=None, classes=2, **settings), torch.randn(2, 3, SIDE, SIDE)


SMP = {
    'deeplabv3+': ('DeepLabV3Plus', {}), 'fpn': ('FPN', {}), 'unet': ('Unet', {}),
    'unet-mbv2-scse': ('Unet', dict(encoder='mobilenet_v2', decoder_attention_type='scse'))}


def yolo():
    "Return a detector of ultralytics and an example."
    from ultralytics.nn.tasks import DetectionModel
    return DetectionModel('yolov8n.yaml', verbose=False), torch.randn(2, 3, SIDE, SIDE)


ZOO = {
    **{f'hf/{name}': partial(of_transformers, *spec[:3], **spec[3]) for name, spec in TRANSFORMERS.items()},
    **{f'smp/{name}': partial(of_smp, spec[0], **spec[1]) for name, spec in SMP.items()},
    **{f'timm/{name}': partial(of_timm, name, side) for name, side in TIMM.items()},
    **{f'tv/{name}': partial(of_torchvision, spec[0], spec[1], **spec[2]) for name, spec in TORCHVISION.items()},
    'tv/r3d_18': video,
    'tv/ssdlite': ssdlite,
    'ul/yolov8n': yolo,
}


def randomize(model):
    "Give each BatchNorm statistics, scales and shifts as after training."
    for m in model.modules():
        if not isinstance(m, nn.modules.batchnorm._BatchNorm): continue
        if m.affine:
            nn.init.uniform_(m.weight, .5, 1.5)
            nn.init.uniform_(m.bias, -.5, .5)
        if m.running_mean is not None:
            nn.init.normal_(m.running_mean, std=.1)
            nn.init.uniform_(m.running_var, .5, 1.5)


SECONDS = 30  # of the processor, for each shrink


def one(name):
    "Prune, shrink and export one network; print a line of JSON."
    from copy import deepcopy

    from fasterai.deploy.compare import example_inputs, fresh, outputs
    from fasterai.deploy.shrink import parameters, shrink
    from fasterai.sparsifier import Sparsifier
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    model, x = ZOO[name]()
    randomize(model.eval())
    row = {'name': name, 'parameters': parameters(model)}
    dense = deepcopy(model)
    sparsifier = Sparsifier(dense)
    sparsifier.sparsify_model(90)
    report = sparsifier.report()
    row['weights'] = 'exact' if abs(report.zeros - .9 * report.weights) <= .5 else f'{report.zeros} of {report.weights}'
    sparsifier = Sparsifier(model, 'filter', 'local', example=x, coupled=True)
    sparsifier.sparsify_model(50)
    report, said = sparsifier.report(), io.StringIO()
    row['filters'] = f'{100 * report.zeros / report.weights:.1f} %'
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + SECONDS + 15, resource.RLIM_INFINITY))
    start = time.process_time()
    with contextlib.redirect_stdout(said): small = shrink(model, x)
    row['seconds'] = round(time.process_time() - start, 1)
    resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY,) * 2)
    row['left'] = 100 * parameters(small) / parameters(model)
    inputs = example_inputs(x, model)
    row['least'] = 100 * least(model, inputs) / parameters(model)
    worst = 0.
    for batch in [inputs, *fresh(inputs)]:
        for a, b in zip(outputs(small, batch), outputs(model, batch)):
            if b.numel(): worst = max(worst, float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)))
    row['error'] = worst
    row['said'] = said.getvalue().splitlines()[1:] + [*not_pruned(sparsifier.skipped)]
    row['onnx'] = onnx(small, x)
    print('ROW ' + json.dumps(row))


def least(model, inputs):
    """Count the parameters that no exact removal of channels takes away, with the zeros as they are.

    What only this code or that of `shrink` hinders may go: numbers that are fixed, parts that must lose as much,
    and means, whose length a scale could make up for."""
    from fasterai.deploy.labels import solve
    from fasterai.deploy.tracing import trace
    from fasterai.deploy.why import IS_NUMBERED, SETS_SCALE, mixes
    found = trace(model, inputs)
    true = {mixes(name) for name in ('LayerNorm', 'GroupNorm', 'softmax', 'BatchNorm', 'convolution')}
    def hinders(reason): return reason in true or not reason.startswith('they pass') and reason not in (IS_NUMBERED, SETS_SCALE)
    labels = found.labels
    labels.stuck = [entry for entry in labels.stuck if hinders(entry[1])]
    labels.even = []
    gone, count = solve(labels).gone, 0
    grouped = {id(g.weight): g for g in labels.grouped if g.by_inputs}
    for name, p in model.named_parameters():
        stay = [int((~gone[first:first + n]).sum()) for first, n in zip(found.owned[name], p.shape)]
        if id(p) in grouped:
            g = grouped[id(p)]
            ins, outs = ((~gone[rows].any(1)).reshape(g.groups, -1).sum(1) for rows in (g.ins, g.outs))
            count += int((ins * outs).sum()) * p[0, 0].numel()
        else: count += prod(stay)
    return count


def not_pruned(skipped):
    "Yield a line for each reason why layers are not pruned."
    names = {}
    for name, reason in skipped.items(): names.setdefault(reason.split(':')[0].split(', and ')[0], []).append(name)
    for reason, some in names.items(): yield f'not pruned: {some[0]}{f" and {len(some) - 1} more" if some[1:] else ""}: {reason}'


def onnx(small, x):
    "Export the smaller network, compare it in onnxruntime, and return ok or the reason."
    from fasterai.deploy.export import export_onnx
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        try: export_onnx(small, Path(folder) / 'small.onnx', x)
        except (TypeError, ValueError) as error: return str(error)[:300]
    return 'ok'


def run(name):
    "Run one network in a process of its own; return its row, with an error where it has none."
    done = subprocess.run([sys.executable, __file__, '--one', name], capture_output=True, text=True)
    row = next((line[4:] for line in done.stdout.splitlines() if line.startswith('ROW ')), None)
    if row: return json.loads(row)
    lines = done.stderr.strip().splitlines() or [f'ended with {done.returncode}']
    return {'name': name, 'failed': lines[-1][:160]}


def shown(row):
    "Return a row of the table."
    if 'failed' in row: return f"| {row['name']}{' | ' * (len(COLUMNS) - 1)}{row['failed'].replace('|', '/')} |"
    reasons = '; '.join(line.strip() for line in row['said'][:4])
    more = len(row['said']) - 4
    if more > 0: reasons += f'; and {more} more'
    cells = [row['name'], f"{row['parameters'] / 1e6:.2f}", row['weights'], row['filters'], f"{row['left']:.1f} %", f"{row['least']:.1f} %",
             f"{row['error']:.0e}", str(row['seconds']), row['onnx'], reasons]
    return '| ' + ' | '.join(' '.join(cell.replace('|', '/').split()) for cell in cells) + ' |'


HEAD = """# Architectures, pruned and shrunk

`python benchmarks/zoo.py`, random weights and statistics, one thread. `weights`: is the count exact at 90 % of single weights? `filters`: the share of zeros at
50 % of the filters, `local` and `coupled=True`. `left`: the parameters after `shrink`, 25 to 28 % where all can go. `least`: what no exact removal of channels takes away
from the network with these zeros, even if its code fixed no numbers; it is above 27 % where layers are not pruned, or norms mix channels. `error`: the largest difference of the
outputs, relative to the largest output, on the example and a batch that `shrink` has not seen. `CPU s`: of `shrink`. `ONNX`: `export_onnx` of the smaller network, which compares
the outputs in onnxruntime.

"""
COLUMNS = 'network', 'million parameters', 'weights', 'filters', 'left', 'least', 'error', 'CPU s', 'ONNX', 'what stays'
HEADING = '| ' + ' | '.join(COLUMNS) + ' |\n'
PAGE = Path(__file__).with_name('ZOO.md')


def main(names):
    if names and HEADING not in PAGE.read_text(): sys.exit('names: the page has other columns, so all networks are run')
    for name in [n for n in ZOO if not names or n.startswith(tuple(names))]:
        row = shown(run(name))
        print(row, flush=True)
        write({name: row})


def write(new):
    "Write the page with new rows, and say how many networks reach what."
    old = {line.split(' | ')[0].removeprefix('| '): line for line in PAGE.read_text().splitlines() if line.startswith('| ')}
    rows = [row for row in map((old | new).get, ZOO) if row and row.count(' | ') == len(COLUMNS) - 1]
    cells = [[cell.strip() for cell in row.split('|')[1:-1]] for row in rows]
    done = [dict(zip(COLUMNS, row)) for row in cells if row[4]]
    def share(row, key): return float(row[key].removesuffix(' %'))
    small, could = (sum(share(row, key) <= 27 for row in done) for key in ('left', 'least'))
    written = sum(row['ONNX'] == 'ok' for row in done)
    said = (f'{len(done)} of {len(ZOO)} come back, in {sum(float(row["CPU s"]) for row in done):.0f} CPU s. {small} have at most 27 % of the parameters, '
            f'and no more than {could} could. {written} are written as ONNX; the others have the reason.')
    table = HEADING + '|---' * len(COLUMNS) + '|\n'
    PAGE.write_text(HEAD + said + '\n\n' + table + '\n'.join(rows) + '\n')


if __name__ == '__main__':
    if sys.argv[1:2] == ['--one']: one(sys.argv[2])
    else: main(sys.argv[1:])
