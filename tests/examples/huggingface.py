"""Prune BERT and GPT-2 to the end: saved, opened, cut, timed. Needs `transformers`.

The masks go on the models as they are. After bake() a model is an ordinary one with zeros in it,
for save_pretrained() and from_pretrained(). The zeros show what can be removed: cut the model after
opening it. Save it before the cut, since no config of transformers has layers of different sizes.

The models are small and random: in their place put from_pretrained("..."). The task is made up:
which of four marks is in a sentence?
"""
import sys
sys.path.append(sys.path[0] + "/../..")     # the folder of blockprune.py

import tempfile
import timeit

import torch
import transformers
from torch import nn

from blockprune import bake, cut_dimensions, cut_heads, density, mask_dimensions, mask_weight
from common import LENGTH, MARKS, WORDS, fine_prune, sentences

E = 64                  # hidden size: 768 in BERT-base and GPT-2
BLOCK = (16, 16)        # of heads of 16: there (32, 32) of heads of 64


def make_bert():
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=E, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=LENGTH, num_labels=MARKS)
    return transformers.BertForSequenceClassification(config)


def mask_bert(model):
    for layer in model.bert.encoder.layer:
        attention = layer.attention.self
        for linear in (attention.query, attention.key, attention.value,
                       layer.attention.output.dense):
            mask_weight(linear, BLOCK, kind="attention")
        # One score for each inner dimension: a row of the first matrix, a column of the second.
        mask_dimensions(layer.intermediate.dense, layer.output.dense, kind="ffn")


def cut_bert(model):
    """Remove what is empty; how many heads and dimensions are left, by layer.

    In transformers a layer cannot have 0 heads: where one has lost all of them, lower its λ.
    """
    left = []
    for layer in model.bert.encoder.layer:
        attention = layer.attention.self
        heads = cut_heads(attention.query, attention.key, attention.value,
                          layer.attention.output.dense, attention.attention_head_size)
        dimensions = cut_dimensions(layer.intermediate.dense, layer.output.dense,
                                    layer.intermediate.intermediate_act_fn)
        left.append((len(heads), len(dimensions)))
    return left


def make_gpt2():
    config = transformers.GPT2Config(
        vocab_size=WORDS + 1, n_embd=E, n_layer=2, n_head=4, n_positions=LENGTH, num_labels=MARKS,
        pad_token_id=WORDS, bos_token_id=None, eos_token_id=None)
    return transformers.GPT2ForSequenceClassification(config)


def mask_gpt2(model):
    # GPT-2 stores its weights as (in, out): say so, for each bias goes with its output.
    for layer in model.transformer.h:
        mask_weight(layer.attn.c_attn, BLOCK, output_dim=1, kind="attention")
        mask_weight(layer.attn.c_proj, BLOCK, output_dim=1, kind="attention")
        # mask_dimensions() by hand: a column of the first matrix with a row of the second.
        owner = mask_weight(layer.mlp.c_fc, (E, 1), output_dim=1, kind="ffn")
        mask_weight(layer.mlp.c_proj, (1, E), output_dim=1, share=owner, kind="ffn")


def as_linear(module):
    """nn.Linear in place of a module whose weight is (in, out)."""
    linear = nn.Linear(*module.weight.shape)
    linear.weight = nn.Parameter(module.weight.detach().T.contiguous())
    linear.bias = module.bias
    return linear


def cut_gpt2(model):
    """As cut_bert(). Heads stay: query, key and value are one matrix, to be split before a cut."""
    left = []
    for layer in model.transformer.h:
        mlp = layer.mlp
        mlp.c_fc = as_linear(mlp.c_fc)
        mlp.c_proj = as_linear(mlp.c_proj)
        dimensions = cut_dimensions(mlp.c_fc, mlp.c_proj, mlp.act)
        left.append((4, len(dimensions)))
    return left


def main(model, mask, cut, lambdas):
    def batch_loss():
        tokens, label = sentences(32)
        return model(input_ids=tokens, labels=label).loss

    mask(model)
    fine_prune(model, batch_loss, steps=120, lr=1e-3, lambdas=lambdas)
    kept = density(model)
    # Masked weights become zeros, and the modules are those of transformers again.
    bake(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        baked = type(model).from_pretrained(folder)
        small = type(model).from_pretrained(folder)
    left = cut(small)

    tokens, label = sentences(500)
    with torch.no_grad():
        expected = baked(tokens).logits
        logits = small(tokens).logits
        baked_times = timeit.repeat(lambda: baked(tokens), number=1, repeat=9)
        small_times = timeit.repeat(lambda: small(tokens), number=1, repeat=9)
    accuracy = (logits.argmax(dim=1) == label).float().mean()
    difference = (logits - expected).abs().max()
    print(type(model).__name__)
    print(f"  kept: {kept['attention']:.2f} of attention, {kept['ffn']:.2f} of the FFN")
    print(f"  left of 4 heads and 256 inner dimensions, by layer: {left}")
    print(f"  accuracy: {accuracy:.3f}, logits moved by the cut: {difference:.0e}")
    print(f"  speed: {min(baked_times) / min(small_times):.2f} x")


if __name__ == "__main__":
    torch.manual_seed(0)
    main(make_bert(), mask_bert, cut_bert, {"attention": 1.0, "ffn": 0.3})
    main(make_gpt2(), mask_gpt2, cut_gpt2, {"attention": 1.0, "ffn": 2.0})
