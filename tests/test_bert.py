"""bert.py beside `transformers` (stored and live), beside naive code, and before broken files.

Only the two tests named `live` need transformers or safetensors, and skip themselves without.
"""
import json
import math
import os
import pickle
import tracemalloc
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from bert import (ACTIVATIONS, BertConfig, BertForQuestionAnswering, load_model, read_safetensors,
                  save_model, write_safetensors)
from blockprune import mask_dimensions, mask_weight, set_threshold

GOLDEN = Path(__file__).parent / "golden"
GOLD = {key: torch.tensor(rows) for key, rows in json.loads((GOLDEN / "logits.json").read_text()).items()}
INPUTS = IDS, TYPES, MASK = GOLD["input_ids"], GOLD["token_type_ids"], GOLD["attention_mask"]
REAL = MASK.bool()

# All different, so that no axis can stand in for another: B 6, T 11, E 12, H 3, D 4, F 20, layers 2.
TINY = dict(vocab_size=29, hidden_size=12, num_attention_heads=3, num_hidden_layers=2,
            intermediate_size=20, max_position_embeddings=17, type_vocab_size=5)
UNEVEN = dict(heads=[0, 2], ffn=[5, 0])


def scramble(model: nn.Module):
    """In eval mode; every parameter random, gains and biases too, and large enough to be seen."""
    torch.manual_seed(1)
    for name, p in model.eval().named_parameters():
        nn.init.normal_(p, mean=1.0 if name.lower().endswith("norm.weight") else 0.0, std=0.5)
    return model


def tiny(**changes) -> BertForQuestionAnswering:
    return scramble(BertForQuestionAnswering(BertConfig(**{**TINY, **changes})))


def close(ours, theirs, atol=0.0):
    """Of tensors, or of tuples or dicts of them. Without atol: the same names, types, shapes and values."""
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0, check_dtype=atol == 0)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model folder holding tiny()."""
    save_model(tiny(), tmp_path / "model")
    return tmp_path / "model"


def change(path: Path, changes: dict):
    """Set entries of a .json or .safetensors file, and take out those that are `...`."""
    values = json.loads(path.read_text()) if path.suffix == ".json" else read_safetensors(path)
    values = {key: value for key, value in {**values, **changes}.items() if value is not ...}
    path.write_text(json.dumps(values)) if path.suffix == ".json" else write_safetensors(values, path)


# ------------------------------------------------------------------------ parity with transformers


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_golden(dtype, atol):
    for name, tensor in read_safetensors(GOLDEN / "model.safetensors").items():
        assert tensor.std() > 0, name  # no gain is all ones and no bias all zeros
    for logits, key in zip(load_model(GOLDEN).to(dtype).eval()(*INPUTS), ("start_logits", "end_logits")):
        close(logits[REAL], GOLD[key][REAL], atol)


@pytest.mark.parametrize("kind, act, options", [
    ("BertForQuestionAnswering", "gelu", {}), ("BertForQuestionAnswering", "relu", {}),
    ("BertForQuestionAnswering", "gelu_new", {}), ("BertForPreTraining", "gelu", {}),
    ("BertModel", "gelu", {}), ("BertModel", "gelu", {"add_pooling_layer": False})])
def test_live_parity_both_ways(tmp_path, kind, act, options):
    """Their folder → our model → our folder → their model."""
    transformers = pytest.importorskip("transformers")
    theirs = scramble(getattr(transformers, kind)(transformers.BertConfig(**TINY, hidden_act=act), **options))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs", fresh_head=kind != "BertForQuestionAnswering").eval()
    save_model(ours, tmp_path / "ours")
    again, info = transformers.BertForQuestionAnswering.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())  # nothing missing, unexpected or of another shape
    named = dict(zip(("input_ids", "token_type_ids", "attention_mask"), INPUTS))
    for dtype, atol in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        hidden, start, end = ours.to(dtype).bert(*INPUTS), *ours(*INPUTS)
        close(hidden[REAL], theirs.to(dtype).base_model(**named).last_hidden_state[REAL], atol)
        for qa in [again.eval().to(dtype)] + [theirs] * (kind == "BertForQuestionAnswering"):
            expected = qa(**named)
            close((start[REAL], end[REAL]), (expected.start_logits[REAL], expected.end_logits[REAL]), atol)


# ----------------------------------------------------------------------------- the model by itself


@torch.no_grad()
def test_attention_is_the_naive_one():
    attention, x = tiny(heads=[2, 3]).double().bert.layers[0].attention, torch.randn(6, 11, 12).double()
    q, k, v, rows = attention.query(x), attention.key(x), attention.value(x), torch.zeros(6, 11, 8).double()
    for real in (MASK, torch.ones_like(MASK)):
        for b in range(6):
            for h in (slice(0, 4), slice(4, 8)):  # softmax(Q Kᵀ / √D) V, one row and head after the other
                weights = (q[b, :, h] @ k[b, :, h].T / 2).exp() * real[b]
                rows[b, :, h] = weights / weights.sum(1, keepdim=True) @ v[b, :, h]
        close(attention(x, real.bool()[:, None, None]), attention.out(rows), 1e-12)
    close(attention(x, None), attention.out(rows), 1e-12)


def test_activations():
    x = torch.linspace(-9, 9, 101, dtype=torch.float64)
    gelu_new = x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))
    for name, y in {"gelu": x / 2 * (1 + torch.erf(x / math.sqrt(2))), "relu": x * (x > 0), "gelu_new": gelu_new,
                    "gelu_pytorch_tanh": gelu_new, "silu": x / (1 + torch.exp(-x))}.items():
        close(ACTIVATIONS[name](x), y, 1e-12)


@pytest.mark.parametrize("changes", [{}, UNEVEN])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_padding_changes_nothing(changes, dtype, atol):
    model = tiny(**changes).to(dtype)
    start, end = model(*INPUTS)
    for b, n in enumerate(MASK.sum(1)):
        close((start[b:b + 1, :n], end[b:b + 1, :n]), model(IDS[b:b + 1, :n], TYPES[b:b + 1, :n]), atol)
    close(model(IDS), model(IDS, torch.zeros_like(IDS), torch.ones_like(IDS)), atol)  # the defaults


def test_nothing_left_adds_the_bias():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch has one about empty matrices
        layer, x = tiny(heads=[0, 2], ffn=[0, 7]).bert.layers[0], torch.randn(6, 11, 12)
    assert [p.numel() for p in layer.attention.parameters()] == [0] * 7 + [12]  # the bias of `out`
    assert [p.numel() for p in layer.ffn.parameters()] == [0] * 3 + [12]
    middle = layer.attention_norm(x + layer.attention.out.bias)
    close(layer(x, None), layer.ffn_norm(middle + layer.ffn.fc2.bias), 1e-6)


def test_gradients_reach_every_parameter():
    model = tiny(**UNEVEN)
    sum(logits[REAL].square().sum() for logits in model(*INPUTS)).backward()
    for name, p in model.named_parameters():
        if p.numel() and not name.endswith("key.bias"):  # that one shifts all scores of a query alike
            assert p.grad.isfinite().all() and p.grad.any(), name


def test_the_papers_headline_model():
    pruned = BertConfig(heads=[4, 4, 6, 7, 7, 5, 6, 7, 5, 5, 5, 3],
                        ffn=[552, 717, 795, 789, 833, 792, 620, 466, 283, 112, 96, 238])
    for config, parameters, weights in ((pruned, 46_161_559, 22_248_960), (BertConfig(), 108_893_186, 84_934_656)):
        with torch.device("meta"):
            model = BertForQuestionAnswering(config)
        linears = [module for module in model.bert.layers.modules() if isinstance(module, nn.Linear)]
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert sum(module.weight.numel() for module in linears) == weights


@torch.no_grad()
def test_dropout_only_in_training():
    x = torch.randn(6, 11, 12)
    hidden = tiny(hidden_dropout_prob=1.0, attention_probs_dropout_prob=0.0)
    attention = tiny(attention_probs_dropout_prob=1.0).bert.layers[0].attention
    plain = tiny(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    close(hidden(*INPUTS), plain(*INPUTS))
    close(attention(x, None), plain.bert.layers[0].attention(x, None))
    y = torch.zeros_like(x)  # all dropped: embeddings, attention and feed-forward add nothing ...
    for layer in hidden.bert.layers:
        y = layer.ffn_norm(layer.attention_norm(y))
    close(hidden.train().bert(*INPUTS), y, 1e-6)
    close(attention.train()(x, None), attention.out.bias.expand_as(x), 1e-6)  # ... and no V gets through


# ------------------------------------------------------------------------------ loading and saving

IMPOSSIBLE = {  # `...`: the key is missing
    "heads": [[2], [1, 2, 3], [4, 1], [-1, 2], [1.0, 2], [True, 2], 3], "ffn": [[5], [21, 5], [5, -1], ["5", 5]],
    "hidden_size": [..., 13, "12"], "num_hidden_layers": [..., 0], "num_attention_heads": [..., -3],
    "vocab_size": [..., 29.0], "type_vocab_size": [True], "intermediate_size": ["20"],
    "max_position_embeddings": [None], "hidden_act": ["tanh", None], "layer_norm_eps": ["1e-12"],
    "hidden_dropout_prob": ["0.1", 1.5], "attention_probs_dropout_prob": [None, -0.5],
    "initializer_range": [[]], "do_lower_case": ["false"]}


@pytest.mark.parametrize("key, value", [(key, value) for key in IMPOSSIBLE for value in IMPOSSIBLE[key]])
def test_config_refused(folder, key, value):
    with pytest.raises(ValueError, match=key):
        BertConfig(**{**TINY, key: value})
    change(folder / "config.json", {key: value})
    with pytest.raises(ValueError, match=key):
        load_model(folder)


def test_not_a_bert_folder(folder):
    config = (folder / "config.json").read_text()
    for text in ("[]", "\0", config[:-9], config.replace('"model_type": "bert"', '"model_type": "roberta"'),
                 config.replace("{", '{"position_embedding_type": "relative_key",')):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json"):
            load_model(folder)
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").unlink()
    for path, missing in (folder, "model.safetensors"), (folder.parent, "config.json"):
        with pytest.raises(FileNotFoundError, match=missing):
            load_model(path)


def test_cased_vocabulary(folder):
    assert load_model(folder).config.do_lower_case is True
    change(folder / "config.json", {"do_lower_case": ...})
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    cased = load_model(folder)
    assert cased.config.do_lower_case is False
    save_model(cased, folder.parent / "copy")
    assert load_model(folder.parent / "copy").config == cased.config


@pytest.mark.parametrize("name, tensor", [
    ("bert.encoder.layer.1.attention.self.key.bias", ...), ("bert.embeddings.LayerNorm.weight", ...),
    ("bert.encoder.layer.2.output.dense.bias", torch.ones(12)), ("classifier.weight", torch.ones(3, 12)),
    ("bert.encoder.layer.0.output.dense.weight", torch.ones(20, 12)), ("qa_outputs.weight", torch.ones(3, 12))])
def test_loader_names_the_tensor(folder, name, tensor):
    change(folder / "model.safetensors", {name: tensor})
    for fresh_head in (False, True):
        with pytest.raises(ValueError, match=name.removeprefix("bert.")):
            load_model(folder, fresh_head=fresh_head)


def test_fresh_head_and_ignored_tensors(folder, capsys):
    change(folder / "model.safetensors", {
        "qa_outputs.weight": ..., "qa_outputs.bias": ..., "bert.pooler.dense.weight": torch.ones(12, 12),
        "cls.predictions.bias": torch.ones(29), "bert.embeddings.position_ids": torch.arange(17)[None]})
    with pytest.raises(ValueError, match="qa_outputs.bias"):
        load_model(folder)
    model = load_model(folder, fresh_head=True)
    report = capsys.readouterr().out
    for word in ("37 tensors", "qa_outputs.weight", "pooler.dense.weight", "predictions.bias", "position_ids"):
        assert word in report, word
    close(model.bert.state_dict(), tiny().bert.state_dict())
    assert not model.qa_outputs.bias.any() and 0 < model.qa_outputs.weight.std() < 0.1


@pytest.mark.parametrize("prefix", ["bert.", ""])
@pytest.mark.parametrize("gain, bias", [("Norm.weight", "Norm.bias"), ("Norm.gamma", "Norm.beta")])
def test_old_names(folder, prefix, gain, bias):
    path = folder / "model.safetensors"
    write_safetensors({name.replace("bert.", prefix).replace("Norm.weight", gain).replace("Norm.bias", bias): tensor
                       for name, tensor in read_safetensors(path).items()}, path)
    close(load_model(folder).state_dict(), tiny().state_dict())


def test_pytorch_model_bin_cannot_run_code(folder):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(folder / "owned"),)

    torch.save(read_safetensors(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    close(load_model(folder).state_dict(), tiny().state_dict())
    torch.save({"bert.pooler.dense.bias": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises((pickle.UnpicklingError, ValueError)):
        load_model(folder)
    assert not (folder / "owned").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (folder / "owned").exists()  # the trap would have snapped


@pytest.mark.parametrize("changes", [{}, UNEVEN, dict(heads=[3, 0], ffn=[0, 7]), dict(heads=[3, 1]), dict(ffn=[20, 9])])
def test_save_and_load(tmp_path, changes):
    model, folder = tiny(hidden_act="relu", layer_norm_eps=0.03, **changes), tmp_path / "a" / "b"
    (tmp_path / "words").write_text("[PAD]\nthe\n")
    for vocab in (tmp_path / "words", folder / "vocab.txt"):  # the second time over itself
        save_model(model, folder, vocab=vocab, method="hybrid")
        again = load_model(folder).eval()
        assert again.config == model.config
        close(again.state_dict(), model.state_dict())
        close(again(*INPUTS), model(*INPUTS))
        assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "vocab.txt"}
        assert (folder / "vocab.txt").read_text() == "[PAD]\nthe\n"
    config = json.loads((folder / "config.json").read_text())
    assert config["method"] == "hybrid" and ("heads" in config) == ("ffn" in config) == bool(changes)


@torch.no_grad()
def test_a_masked_model_saves_what_it_computes(tmp_path):
    model, expected = tiny(), tiny().state_dict()
    layer = model.bert.layers[1]
    tiles = mask_weight(layer.attention.value, (4, 5)).scores  # 3 x 3 blocks, the last 2 columns wide
    dimensions = mask_dimensions(layer.ffn.fc1, layer.ffn.fc2)
    set_threshold(model, 0.5)
    tiles.copy_(torch.tensor([[1, -1, 2], [-1, -2, -1], [-3, 1, -1]]))  # no block is left in the second row
    dimensions.copy_(torch.arange(20) % 3 - 0.5)  # every third goes
    tile = (tiles > 0).repeat_interleave(4, 0).repeat_interleave(5, 1)[:, :12]
    for name, mask in {"attention.value.weight": tile, "attention.value.bias": tile.any(1),
                       "ffn.fc1.weight": dimensions[:, None] > 0, "ffn.fc1.bias": dimensions > 0,
                       "ffn.fc2.weight": dimensions > 0}.items():
        expected[f"bert.layers.1.{name}"] *= mask
    save_model(model, tmp_path)
    again = load_model(tmp_path).eval()
    close(again.state_dict(), expected)
    close(again(*INPUTS), model(*INPUTS))


# ------------------------------------------------------------------------------------ safetensors


def every_kind() -> dict:
    return {"f64": torch.tensor([[0.1, -2], [3, 4]]).double(), "one f16": torch.tensor([0.1]).half(),
            "i64": torch.tensor([[2 ** 62, -7]]), "empty": torch.empty(0, 5), "f32": torch.arange(24.0).view(3, 2, 4),
            "0-d": torch.tensor(2.5), "empty bf16": torch.empty(3, 0).bfloat16(), "bf16": torch.arange(7).bfloat16(),
            "transposed": torch.arange(12.0).view(3, 4).t(), 'a "name" →': torch.ones(2)}


def test_safetensors_round_trip(tmp_path):
    for tensors in ({}, every_kind()):
        write_safetensors(tensors, tmp_path / "file")
        close(read_safetensors(tmp_path / "file"), tensors)
    for dtype in (b'"F64"', b'"F32"', b'"F16"', b'"BF16"', b'"I64"'):
        assert dtype in (tmp_path / "file").read_bytes()


def test_live_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    write_safetensors(every_kind(), tmp_path / "ours")
    close(safetensors.load_file(tmp_path / "ours"), every_kind())
    safetensors.save_file({name: t.contiguous() for name, t in every_kind().items()}, tmp_path / "theirs")
    close(read_safetensors(tmp_path / "theirs"), every_kind())


def test_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors({"a": torch.ones(3)}, path)
    before = path.read_bytes()
    with pytest.raises(NotImplementedError):  # the second tensor has no data: the write fails in mid-file
        write_safetensors({"a": torch.zeros(5), "b": torch.zeros(5, device="meta")}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def content(a={}, b={}, length=None, text=None, **more) -> bytes:
    """A file of two tensors. a, b, more: what else to say of them; length, text: of the header."""
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **a},
              "b": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12], **b}, **more}
    text = json.dumps(header).encode() if text is None else text
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(range(12))


LIES = {
    "overlap": content(b=dict(shape=[2], data_offsets=[4, 12])), "hole": content(dict(shape=[1], data_offsets=[0, 4])),
    "backwards": content(dict(data_offsets=[8, 0])), "one offset": content(dict(data_offsets=[0])),
    "too few bytes": content(dict(shape=[3])), "too many": content(dict(shape=[1])),
    "other size": content(dict(dtype="F16")), "unknown dtype": content(dict(dtype="F31")),
    "negative offset": content(dict(shape=[3], data_offsets=[-4, 8])), "negative shape": content(dict(shape=[-2, -1])),
    "fraction": content(dict(shape=[2.0])), "text": content(b=dict(shape="")), "object": content(b=dict(shape={})),
    "huge": content(b=dict(shape=[2 ** 60], data_offsets=[8, 8 + 2 ** 62])), "long": content(b=dict(shape=[2 ** 62])),
    "overflow": content(c=dict(dtype="F32", shape=[2 ** 62, 2 ** 62, 0], data_offsets=[12, 12])),
    "list": content(c=[]), "number": content(text=b"3"), "not JSON": content(text=b'{"a": '),
    "not text": content(text=b"\xff\xfe{}"), "one byte more": content() + b"\0",
    **{f"header of {n}": content(length=n) for n in (0, 100, 300, 2 ** 33, 2 ** 64 - 1)},
    **{f"cut at {n}": content()[:n] for n in (0, 1, 7, 8, 9, 60, len(content()) - 12, len(content()) - 1)}}


@pytest.mark.parametrize("lie", LIES)
def test_lying_safetensors_are_refused(tmp_path, lie):
    (tmp_path / "true").write_bytes(content())
    assert read_safetensors(tmp_path / "true")["a"].shape == (2,)
    (tmp_path / "lie.safetensors").write_bytes(LIES[lie])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="lie.safetensors"):
            read_safetensors(tmp_path / "lie.safetensors")
        assert tracemalloc.get_traced_memory()[1] < 1e6  # nothing was allocated on the file's word
    finally:
        tracemalloc.stop()
