"""Fine-prune BERT and GPT-2 of the `transformers` package, which is needed here and nowhere else in this project.

Masks are attached by the names of modules; the models know nothing of them. After bake() they are ordinary again:
save_pretrained() and from_pretrained() give the same logits. GPT-2 stores its weights (in, out): output_dim=1.
The models are small and random; put from_pretrained("...") in their place.
"""
import tempfile

import torch
import transformers

from blockprune import bake, density, mask_weight, parameter_groups, penalty, set_threshold, threshold_schedule

KINDS = {   # how the name of a module ends → kind, block, the dimension of the weight that holds the outputs
    "bert": {"self.query": ("attention", (8, 8), 0), "self.key": ("attention", (8, 8), 0), "self.value": ("attention", (8, 8), 0),
             "attention.output.dense": ("attention", (8, 8), 0), "intermediate.dense": ("ffn", (1, 32), 0),
             "output.dense": ("ffn", (32, 1), 0)},
    "gpt2": {"attn.c_attn": ("attention", (8, 8), 1), "attn.c_proj": ("attention", (8, 8), 1),
             "mlp.c_fc": ("ffn", (32, 1), 1), "mlp.c_proj": ("ffn", (1, 32), 1)}}


def models():
    torch.manual_seed(0)
    small = dict(vocab_size=50)
    bert = transformers.BertConfig(**small, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    gpt2 = transformers.GPT2Config(**small, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return transformers.BertForMaskedLM(bert), transformers.GPT2LMHeadModel(gpt2)


def prune(model, steps=60):
    ids = torch.randint(50, (8, 12))        # to be learnt by heart
    for name, module in model.named_modules():
        for end, (kind, block, output_dim) in KINDS[model.config.model_type].items():
            if name.endswith(end) and hasattr(module, "weight"):
                mask_weight(module, block, output_dim=output_dim, kind=kind)
                break
    optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-3, score_lr=0.15))
    for step in range(steps):
        tau = threshold_schedule(step, steps, flat_start=3, flat_end=30)
        set_threshold(model, tau)
        loss = model(input_ids=ids, labels=ids).loss + 5 * tau * penalty(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    kept = density(model)
    return bake(model).eval(), kept


@torch.no_grad()
def main():
    found = []
    for model in models():
        with torch.enable_grad():
            model, kept = prune(model)
        ids = torch.randint(50, (3, 10))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = type(model).from_pretrained(folder).eval()
        difference = (model(ids).logits - again(ids).logits).abs().max().item()
        zeros = sum(int((p == 0).sum()) for p in again.parameters() if p.dim() == 2)
        print(f"{type(model).__name__}: kept {kept['all']:.2f}, {zeros:,} zeros, reloaded logits differ by {difference}")
        found.append((again, kept, zeros, difference))
    return found


if __name__ == "__main__":
    main()
