"""Train and prune a tiny BERT, randomly initialised, with the Trainer of Hugging Face's transformers.

    python examples/hf_trainer.py"""
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from fasterai.sparsifier import Sparsifier

WORDS, LENGTH = 64, 16


class Sentences(Dataset):
    "Random words; the label says whether the first word comes again."
    def __init__(self, n=1024):
        generator = torch.Generator().manual_seed(0)
        self.words = torch.randint(1, WORDS, (n, LENGTH), generator=generator)
        again = torch.arange(n) % 2 == 0
        self.words[again, -1] = self.words[again, 0]
        self.labels = (self.words[:, 1:] == self.words[:, :1]).any(1).long()

    def __len__(self): return len(self.words)
    def __getitem__(self, i): return {'input_ids': self.words[i], 'labels': self.labels[i]}


def main():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=64, max_position_embeddings=LENGTH)
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, max_steps=100, per_device_train_batch_size=32, use_cpu=True, seed=0,
                                 report_to='none', save_strategy='no', logging_strategy='no', disable_tqdm=True)
        sparsifier = Sparsifier(model)  # all linear layers: queries, keys, values and the rest; not the embeddings
        attached = sparsifier.attach(optimizer, sparsity=90, schedule='gradual', steps=args.max_steps)
        Trainer(model, args, train_dataset=Sentences(), optimizers=(optimizer, None)).train()

    report = sparsifier.report()
    print(report)
    zeros = sum(int((layer.weight == 0).sum()) for layer in sparsifier.layers.values())
    weights = sum(layer.weight.numel() for layer in sparsifier.layers.values())
    assert zeros == round(.9 * weights) and attached.is_over


if __name__ == '__main__': main()
