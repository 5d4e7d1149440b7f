"""Makes the files beside it: a tiny random BERT as `transformers` 5.23 writes it, and its logits.

    python tests/golden/make.py        (needs transformers; the tests do not)

Every parameter is random, gains and biases too, and large enough that each one shows in the
logits. The weights are rounded to fp16 and stored so; the logits are computed in fp64.
"""
import json
from pathlib import Path

import torch
from transformers import BertConfig, BertForQuestionAnswering

HERE = Path(__file__).resolve().parent
B, T = 6, 11
torch.manual_seed(2021)
model = BertForQuestionAnswering(BertConfig(
    vocab_size=29, hidden_size=12, num_attention_heads=3, num_hidden_layers=2, intermediate_size=20,
    max_position_embeddings=17, type_vocab_size=5, layer_norm_eps=0.03)).eval()
for name, p in model.named_parameters():
    torch.nn.init.normal_(p, mean=1.0 if name.endswith("LayerNorm.weight") else 0.0, std=0.5)
model.half().save_pretrained(HERE)

inputs = {"input_ids": torch.randint(29, (B, T)), "token_type_ids": torch.randint(5, (B, T)),
          "attention_mask": (torch.arange(T) < torch.tensor([11, 9, 7, 4, 2, 1])[:, None]).long()}
with torch.no_grad():
    outputs = model.double()(**inputs)
values = {**inputs, "start_logits": outputs.start_logits, "end_logits": outputs.end_logits}
lines = [f'"{key}": [\n' + ",\n".join(json.dumps([round(x, 8) for x in row]) for row in t.tolist()) + "]"
         for key, t in values.items()]
(HERE / "logits.json").write_text("{" + ",\n".join(lines) + "}\n")
