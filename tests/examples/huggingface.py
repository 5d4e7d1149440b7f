"""Fine-prune BERT and GPT-2 of the `transformers` package, which this project needs nowhere else.

The models need no change: a mask goes on any module that has a weight. After bake() they are
ordinary models again, and save_pretrained() and from_pretrained() give the same logits.

The two models are small and random. In their place put from_pretrained("...").
"""
import tempfile

import torch
import transformers

import blockprune

WORDS = 50
HIDDEN = 32         # 768 in BERT-base and GPT-2
BLOCK = (8, 8)      # there (32, 32)


def models():
    """A random BERT and a random GPT-2: 2 layers, 4 heads."""
    torch.manual_seed(0)
    bert = transformers.BertConfig(vocab_size=WORDS, hidden_size=HIDDEN, num_hidden_layers=2,
                                   num_attention_heads=4, intermediate_size=64)
    gpt2 = transformers.GPT2Config(vocab_size=WORDS, n_embd=HIDDEN, n_layer=2, n_head=4,
                                   bos_token_id=0, eos_token_id=0)
    return transformers.BertForMaskedLM(bert), transformers.GPT2LMHeadModel(gpt2)


def mask_bert(model):
    for layer in model.bert.encoder.layer:
        attention = layer.attention
        blockprune.mask_weight(attention.self.query, BLOCK, kind="attention")
        blockprune.mask_weight(attention.self.key, BLOCK, kind="attention")
        blockprune.mask_weight(attention.self.value, BLOCK, kind="attention")
        blockprune.mask_weight(attention.output.dense, BLOCK, kind="attention")
        # Weights are (out, in): a block is a row of the first matrix, a column of the second.
        blockprune.mask_weight(layer.intermediate.dense, (1, HIDDEN), kind="ffn")
        blockprune.mask_weight(layer.output.dense, (HIDDEN, 1), kind="ffn")


def mask_gpt2(model):
    # GPT-2 stores its weights as (in, out): say so, for each bias goes with its output.
    for layer in model.transformer.h:
        blockprune.mask_weight(layer.attn.c_attn, BLOCK, output_dim=1, kind="attention")
        blockprune.mask_weight(layer.attn.c_proj, BLOCK, output_dim=1, kind="attention")
        # So here a block is a column of the first matrix, a row of the second.
        blockprune.mask_weight(layer.mlp.c_fc, (HIDDEN, 1), output_dim=1, kind="ffn")
        blockprune.mask_weight(layer.mlp.c_proj, (1, HIDDEN), output_dim=1, kind="ffn")


def fine_prune(model, steps):
    """An ordinary training loop; comments stand at what pruning adds."""
    ids = torch.randint(WORDS, (8, 12))         # to be learnt by heart
    # Scores get a learning rate of their own: 1e-2 in the paper, more in so short a run.
    groups = blockprune.parameter_groups(model, lr=1e-3, score_lr=0.15)
    optimizer = torch.optim.Adam(groups)
    for step in range(steps):
        # The threshold: 0 for the first 5 % of the steps, 0.1 for the last 50 %.
        tau = blockprune.threshold_schedule(step, steps, flat_start=steps // 20,
                                            flat_end=steps // 2)
        blockprune.set_threshold(model, tau)

        loss = model(input_ids=ids, labels=ids).loss

        # The penalty pushes scores down. Its weight λ follows the threshold, up to 0.5.
        loss = loss + 5 * tau * blockprune.penalty(model)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def save_and_load(model):
    """The model as it is loaded again, and the largest difference between their logits."""
    ids = torch.randint(WORDS, (3, 10))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder).eval()
    difference = model(ids).logits - loaded(ids).logits
    return loaded, difference.abs().max().item()


def zeros_in_matrices(model):
    zeros = 0
    for parameter in model.parameters():
        if parameter.dim() == 2:
            zeros += int((parameter == 0).sum())
    return zeros


def main():
    bert, gpt2 = models()
    mask_bert(bert)
    mask_gpt2(gpt2)
    results = []
    for model in (bert, gpt2):
        fine_prune(model, 60)
        kept = blockprune.density(model)
        # Masked weights become zeros, and the modules are those of transformers again.
        blockprune.bake(model)
        model.eval()

        loaded, difference = save_and_load(model)
        zeros = zeros_in_matrices(loaded)
        print(f"{type(model).__name__}: {kept['all']:.2f} of the weights kept, {zeros:,} zeros")
        print(f"    saved and loaded, its logits differ by {difference}")
        results.append((loaded, kept, zeros, difference))
    return results


if __name__ == "__main__":
    main()
