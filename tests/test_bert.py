"""bert.py beside `transformers` (stored and live), beside naive code, and before broken files.

Only the tests named `live` need transformers or safetensors, and skip themselves without.
"""
import hashlib
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

from bert import (ACTIVATIONS, BertConfig, BertForQuestionAnswering, folder_sha256, load_model,
                  load_tokenizer, read_safetensors, same_tokenizer, save_model, write_safetensors)
from blockprune import mask_dimensions, mask_weight, set_threshold

# Inputs for a tiny model, and what transformers made of them.
GOLDEN = Path(__file__).parent / "golden"
STORED = json.loads((GOLDEN / "logits.json").read_text())
IDS = torch.tensor(STORED["input_ids"])
TYPES = torch.tensor(STORED["token_type_ids"])
MASK = torch.tensor(STORED["attention_mask"])
START = torch.tensor(STORED["start_logits"])
END = torch.tensor(STORED["end_logits"])
INPUTS = (IDS, TYPES, MASK)
REAL = MASK.bool()      # logits at padding mean nothing

# All different, so that no axis stands in for another: B 6, T 11, E 12, H 3, D 4, F 20, layers 2.
TINY = dict(vocab_size=29, hidden_size=12, num_attention_heads=3, num_hidden_layers=2,
            intermediate_size=20, max_position_embeddings=17, type_vocab_size=5)
UNEVEN = dict(heads=[0, 2], ffn=[5, 0])


def scramble(model: nn.Module):
    """In eval mode; every parameter random, gains and biases too, and large enough to be seen."""
    torch.manual_seed(1)
    model.eval()
    for name, parameter in model.named_parameters():
        mean = 0.0
        if name.lower().endswith("norm.weight"):
            mean = 1.0
        nn.init.normal_(parameter, mean=mean, std=0.5)
    return model


def tiny(**changes) -> BertForQuestionAnswering:
    return scramble(BertForQuestionAnswering(BertConfig(**(TINY | changes))))


def close(ours, theirs, atol=0.0):
    """Tensors, or tuples or dicts of them. Without atol: of the same types and exactly the same."""
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0, check_dtype=atol == 0)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model folder holding tiny()."""
    save_model(tiny(), tmp_path / "model")
    return tmp_path / "model"


def changed(values: dict, changes: dict) -> dict:
    """The values with the changes, and without the entries that the changes call `...`."""
    values = values | changes
    return {key: value for key, value in values.items() if value is not ...}


def change_json(path: Path, changes: dict):
    path.write_text(json.dumps(changed(json.loads(path.read_text()), changes)))


def change_weights(folder: Path, changes: dict):
    path = folder / "model.safetensors"
    write_safetensors(changed(read_safetensors(path), changes), path)


# ------------------------------------------------------------------------ parity with transformers


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_golden(dtype, atol):
    for name, tensor in read_safetensors(GOLDEN / "model.safetensors").items():
        assert tensor.std() > 0, name       # no gain is all ones and no bias all zeros
    model = load_model(GOLDEN).to(dtype).eval()
    start, end = model(*INPUTS)
    close(start[REAL], START[REAL], atol)
    close(end[REAL], END[REAL], atol)


@pytest.mark.parametrize("kind, act, options", [
    ("BertForQuestionAnswering", "gelu", {}),
    ("BertForQuestionAnswering", "relu", {}),
    ("BertForQuestionAnswering", "gelu_new", {}),
    ("BertForQuestionAnswering", "gelu_python", {}),
    ("BertForQuestionAnswering", "swish", {}),
    ("BertForPreTraining", "gelu", {}),
    ("BertModel", "gelu", {}),
    ("BertModel", "gelu", {"add_pooling_layer": False}),
])
def test_live_parity_both_ways(tmp_path, kind, act, options):
    """Their folder → our model → our folder → their model."""
    transformers = pytest.importorskip("transformers")
    theirs_has_head = kind == "BertForQuestionAnswering"
    config = transformers.BertConfig(**TINY, hidden_act=act)
    theirs = scramble(getattr(transformers, kind)(config, **options))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs", fresh_head=not theirs_has_head).eval()
    save_model(ours, tmp_path / "ours")
    again, info = transformers.BertForQuestionAnswering.from_pretrained(
        tmp_path / "ours", output_loading_info=True)
    again.eval()
    assert not any(info.values())       # nothing missing, unexpected or of another shape

    named = dict(input_ids=IDS, token_type_ids=TYPES, attention_mask=MASK)
    for dtype, atol in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        hidden = ours.to(dtype).bert(*INPUTS)
        expected_hidden = theirs.to(dtype).base_model(**named).last_hidden_state
        close(hidden[REAL], expected_hidden[REAL], atol)
        start, end = ours(*INPUTS)
        with_head = [again.to(dtype)]
        if theirs_has_head:
            with_head.append(theirs)
        for model in with_head:
            expected = model(**named)
            close(start[REAL], expected.start_logits[REAL], atol)
            close(end[REAL], expected.end_logits[REAL], atol)


# ----------------------------------------------------------------------------- the model by itself


@torch.no_grad()
def test_attention_is_the_naive_one():
    """softmax(Q Kᵀ / √D) V, one row of the batch and one head after the other."""
    attention = tiny(heads=[2, 3]).double().bert.layers[0].attention
    x = torch.randn(6, 11, 12).double()
    q = attention.query(x)
    k = attention.key(x)
    v = attention.value(x)
    for mask in (MASK, torch.ones_like(MASK)):
        expected = torch.zeros(6, 11, 8).double()
        for b in range(6):
            for head in (slice(0, 4), slice(4, 8)):
                scores = q[b, :, head] @ k[b, :, head].T / math.sqrt(4)
                weights = scores.exp() * mask[b]
                weights = weights / weights.sum(1, keepdim=True)
                expected[b, :, head] = weights @ v[b, :, head]
        close(attention(x, mask.bool()[:, None, None]), attention.out(expected), 1e-12)
    # The last mask was all ones, which is what None stands for.
    close(attention(x, None), attention.out(expected), 1e-12)


def test_activations():
    x = torch.linspace(-9, 9, 101, dtype=torch.float64)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)
    formulas = {
        "gelu": x / 2 * (1 + torch.erf(x / math.sqrt(2))),
        "relu": x * (x > 0),
        "gelu_new": x / 2 * (1 + torch.tanh(inner)),
        "gelu_pytorch_tanh": x / 2 * (1 + torch.tanh(inner)),
        "silu": x / (1 + torch.exp(-x)),
    }
    for name, expected in formulas.items():
        close(ACTIVATIONS[name](x), expected, 1e-12)


@pytest.mark.parametrize("changes", [{}, UNEVEN])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_padding_changes_nothing(changes, dtype, atol):
    model = tiny(**changes).to(dtype)
    start, end = model(*INPUTS)
    for b in range(len(IDS)):
        length = MASK[b].sum()
        alone = model(IDS[b, None, :length], TYPES[b, None, :length])
        close((start[b, None, :length], end[b, None, :length]), alone, atol)


@pytest.mark.parametrize("changes", [{}, UNEVEN])
def test_defaults_are_one_text_without_padding(changes):
    model = tiny(**changes).double()
    close(model(IDS), model(IDS, torch.zeros_like(IDS), torch.ones_like(IDS)), 1e-10)
    model = model.float()
    close(model(IDS), model(IDS, torch.zeros_like(IDS), torch.ones_like(IDS)), 1e-5)


def test_nothing_left_adds_the_bias():
    with warnings.catch_warnings():
        warnings.simplefilter("error")      # torch has one about empty matrices
        layer = tiny(heads=[0, 2], ffn=[0, 7]).bert.layers[0]
    x = torch.randn(6, 11, 12)
    # All that is left is the bias of the last linear.
    assert [p.numel() for p in layer.attention.parameters()] == [0] * 7 + [12]
    assert [p.numel() for p in layer.ffn.parameters()] == [0] * 3 + [12]
    middle = layer.attention_norm(x + layer.attention.out.bias)
    close(layer(x, None), layer.ffn_norm(middle + layer.ffn.fc2.bias), 1e-6)


def test_gradients_reach_every_parameter():
    model = tiny(**UNEVEN)
    start, end = model(*INPUTS)
    loss = start[REAL].square().sum() + end[REAL].square().sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        # The bias of a key shifts all scores of a query alike.
        if parameter.numel() == 0 or name.endswith("key.bias"):
            continue
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("changes, parameters, weights", [
    ({}, 108_893_186, 84_934_656),
    (dict(heads=[4, 4, 6, 7, 7, 5, 6, 7, 5, 5, 5, 3],
          ffn=[552, 717, 795, 789, 833, 792, 620, 466, 283, 112, 96, 238]), 46_161_559, 22_248_960),
])
def test_the_papers_headline_model(changes, parameters, weights):
    with torch.device("meta"):
        model = BertForQuestionAnswering(BertConfig(**changes))
    assert sum(p.numel() for p in model.parameters()) == parameters
    linears = [module for module in model.bert.layers.modules() if isinstance(module, nn.Linear)]
    assert sum(linear.weight.numel() for linear in linears) == weights


@torch.no_grad()
def test_dropout_only_in_training():
    x = torch.randn(6, 11, 12)
    # Of all or of nothing, so that no luck is in it. In eval mode there is none.
    hidden = tiny(hidden_dropout_prob=1.0, attention_probs_dropout_prob=0.0)
    attention = tiny(attention_probs_dropout_prob=1.0).bert.layers[0].attention
    plain = tiny(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    close(hidden(*INPUTS), plain(*INPUTS))
    close(attention(x, None), plain.bert.layers[0].attention(x, None))
    # In training embeddings, attention and feed-forward add nothing ...
    expected = torch.zeros_like(x)
    for layer in hidden.bert.layers:
        expected = layer.ffn_norm(layer.attention_norm(expected))
    close(hidden.train().bert(*INPUTS), expected, 1e-6)
    # ... and no value gets through.
    close(attention.train()(x, None), attention.out.bias.expand_as(x), 1e-6)


# ------------------------------------------------------------------------------ loading and saving

IMPOSSIBLE = {      # `...`: the key is missing
    "heads": [[2], [1, 2, 3], [4, 1], [-1, 2], [1.0, 2], [True, 2], 3],
    "ffn": [[5], [21, 5], [5, -1], ["5", 5]],
    "hidden_size": [..., 13, "12"],
    "num_hidden_layers": [..., 0, 101, 10 ** 6, 10 ** 18],
    "num_attention_heads": [..., -3],
    "vocab_size": [..., 29.0, 10 ** 18],
    "type_vocab_size": [True, 1],       # 1: question and passage could not be told apart
    "intermediate_size": ["20"],
    "max_position_embeddings": [None],
    "hidden_act": ["tanh", None],
    "layer_norm_eps": ["1e-12"],
    "hidden_dropout_prob": ["0.1", 1.5],
    "attention_probs_dropout_prob": [None, -0.5],
    "initializer_range": [[]],
    "do_lower_case": ["false"],
}
CASES = [(key, value) for key, values in IMPOSSIBLE.items() for value in values]


@pytest.mark.parametrize("key, value", CASES)
def test_config_refused(folder, key, value):
    with pytest.raises(ValueError, match=key):
        BertConfig(**(TINY | {key: value}))
    change_json(folder / "config.json", {key: value})
    with pytest.raises(ValueError, match=key):
        load_model(folder)


@pytest.mark.parametrize("alias, name", [("gelu_python", "gelu"), ("swish", "silu")])
def test_activations_under_another_name(folder, alias, name):
    change_json(folder / "config.json", {"hidden_act": alias})
    close(load_model(folder).eval()(*INPUTS), tiny(hidden_act=name)(*INPUTS))


@pytest.mark.parametrize("text", ["[]", "\0", '{"model_type": "bert"'])
def test_config_that_is_no_object(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json"):
        load_model(folder)


@pytest.mark.parametrize("key, value, harmless", [
    ("model_type", "roberta", "bert"),
    ("position_embedding_type", "relative_key", "absolute"),
    ("is_decoder", True, False),
    ("add_cross_attention", True, False),
    ("pruned_heads", {"0": [1]}, {}),
])
def test_another_function_than_berts(folder, key, value, harmless):
    change_json(folder / "config.json", {key: harmless, "chunk_size_feed_forward": 3})
    close(load_model(folder).state_dict(), tiny().state_dict())
    change_json(folder / "config.json", {key: value})
    with pytest.raises(ValueError, match=f"config.json: .*{key}"):
        load_model(folder)


@pytest.mark.parametrize("key, value", [
    ("vocab_size", 10 ** 8),
    ("vocab_size", 10 ** 9),
    ("hidden_size", 3 * 10 ** 8),
    ("intermediate_size", 10 ** 9),
    ("max_position_embeddings", 10 ** 9),
    ("type_vocab_size", 10 ** 9),
    ("num_hidden_layers", 100),
    ("num_attention_heads", 1),     # of no matter to the shapes: it loads
])
def test_a_config_is_believed_only_as_far_as_the_weights_agree(folder, monkeypatch, key, value):
    """Nothing is allocated on its word, as it would be here before a weight is drawn."""
    normal = nn.init.normal_

    def draw(tensor, *args, **options):
        assert tensor.is_meta or tensor.shape.numel() <= 29 * 12, f"{tensor.shape} are allocated"
        return normal(tensor, *args, **options)

    monkeypatch.setattr(nn.init, "normal_", draw)
    change_json(folder / "config.json", {key: value})
    if key == "num_attention_heads":
        load_model(folder)
    else:
        with pytest.raises(ValueError, match="model.safetensors: .*(by config.json|missing)"):
            load_model(folder)


RED = "\x1b[31mred\n\u202eF1 99.9"       # colours a terminal, forges a line, turns the text around


@pytest.mark.parametrize("changes", [
    {RED: torch.ones(2)},                                           # not known
    {f"pooler.{RED}": torch.ones(2), "qa_outputs.bias": ...},       # ignored, and printed
])
def test_names_from_files_are_printed_as_they_are_spelled(folder, capsys, changes):
    change_weights(folder, changes)
    said = ""
    try:
        load_model(folder, fresh_head=True)
    except ValueError as error:
        said = str(error)
    said += capsys.readouterr().out.removesuffix("\n")
    assert "red" in said and said.isprintable()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers(folder, value):
    name = "bert.encoder.layer.1.attention.output.dense.bias"
    bias = torch.zeros(12)
    bias[5] = value
    change_weights(folder, {name: bias})
    with pytest.raises(ValueError, match=f"{name.removeprefix('bert.')}.* finite"):
        load_model(folder)


def test_two_names_for_one_tensor(folder):
    change_weights(folder, {"bert.embeddings.LayerNorm.gamma": torch.ones(12)})
    with pytest.raises(ValueError, match="embeddings.LayerNorm.weight"):
        load_model(folder)


def test_not_a_model_folder(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        load_model(folder)
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_model(folder.parent)


def test_cased_vocabulary(folder):
    assert load_model(folder).config.do_lower_case is True
    change_json(folder / "config.json", {"do_lower_case": ...})
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    cased = load_model(folder)
    assert cased.config.do_lower_case is False
    save_model(cased, folder.parent / "copy")
    assert load_model(folder.parent / "copy").config == cased.config


@pytest.mark.parametrize("fresh_head", [False, True])
@pytest.mark.parametrize("name, tensor", [      # `...`: it is missing
    ("bert.encoder.layer.1.attention.self.key.bias", ...),
    ("bert.embeddings.LayerNorm.weight", ...),
    ("bert.encoder.layer.2.output.dense.bias", torch.ones(12)),
    ("classifier.weight", torch.ones(3, 12)),
    ("bert.encoder.layer.0.output.dense.weight", torch.ones(20, 12)),
    ("qa_outputs.weight", torch.ones(3, 12)),
])
def test_loader_names_the_tensor(folder, name, tensor, fresh_head):
    change_weights(folder, {name: tensor})
    with pytest.raises(ValueError, match=name.removeprefix("bert.")):
        load_model(folder, fresh_head=fresh_head)


def test_fresh_head_and_ignored_tensors(folder, capsys):
    change_weights(folder, {
        "qa_outputs.weight": ...,
        "qa_outputs.bias": ...,
        "bert.pooler.dense.weight": torch.ones(12, 12),
        "cls.predictions.bias": torch.ones(29),
        "bert.embeddings.position_ids": torch.arange(17)[None],
        "bert.embeddings.token_type_ids": torch.zeros(1, 17, dtype=torch.int64),
    })
    with pytest.raises(ValueError, match="qa_outputs.bias"):
        load_model(folder)
    model = load_model(folder, fresh_head=True)
    report = capsys.readouterr().out
    for word in ("37 tensors", "qa_outputs.weight", "pooler.dense.weight", "predictions.bias",
                 "position_ids", "embeddings.token_type_ids"):
        assert word in report, word
    close(model.bert.state_dict(), tiny().bert.state_dict())
    assert not model.qa_outputs.bias.any()
    assert 0 < model.qa_outputs.weight.std() < 0.1


@pytest.mark.parametrize("prefix", ["bert.", ""])
@pytest.mark.parametrize("gain, bias", [("Norm.weight", "Norm.bias"), ("Norm.gamma", "Norm.beta")])
def test_old_names(folder, prefix, gain, bias):
    path = folder / "model.safetensors"
    tensors = {}
    for name, tensor in read_safetensors(path).items():
        name = name.replace("bert.", prefix)
        name = name.replace("Norm.weight", gain)
        name = name.replace("Norm.bias", bias)
        tensors[name] = tensor
    write_safetensors(tensors, path)
    close(load_model(folder).state_dict(), tiny().state_dict())


def test_pytorch_model_bin_cannot_run_code(folder):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(folder / "owned"),)

    path = folder / "pytorch_model.bin"
    torch.save(read_safetensors(folder / "model.safetensors"), path)
    (folder / "model.safetensors").unlink()
    close(load_model(folder).state_dict(), tiny().state_dict())
    torch.save({"bert.pooler.dense.bias": Evil()}, path)
    with pytest.raises((pickle.UnpicklingError, ValueError)):
        load_model(folder)
    assert not (folder / "owned").exists()
    # The trap would have snapped.
    torch.load(path, weights_only=False)
    assert (folder / "owned").exists()


@pytest.mark.parametrize("changes", [
    {}, UNEVEN, dict(heads=[3, 0], ffn=[0, 7]), dict(heads=[3, 1]), dict(ffn=[20, 9])])
def test_save_and_load(tmp_path, changes):
    model = tiny(hidden_act="relu", layer_norm_eps=0.03, **changes)
    folder = tmp_path / "a" / "b"
    (tmp_path / "vocab.txt").write_text("[PAD]\nthe\n")
    for source in (tmp_path, folder):       # the second time from itself
        save_model(model, folder, tokenizer_from=source, method="hybrid")
        again = load_model(folder).eval()
        assert again.config == model.config
        close(again.state_dict(), model.state_dict())
        close(again(*INPUTS), model(*INPUTS))
        names = {path.name for path in folder.iterdir()}
        assert names == {"config.json", "model.safetensors", "vocab.txt"}
        assert (folder / "vocab.txt").read_text() == "[PAD]\nthe\n"
    config = json.loads((folder / "config.json").read_text())
    assert config["method"] == "hybrid"
    assert ("heads" in config) == ("ffn" in config) == bool(changes)


@torch.no_grad()
def test_a_masked_model_saves_what_it_computes(tmp_path):
    model = tiny()
    layer = model.bert.layers[1]
    # 3 x 3 blocks, the last 2 columns wide. No block is left in the second row.
    tile_scores = mask_weight(layer.attention.value, (4, 5)).scores
    tile_scores.copy_(torch.tensor([[1, -1, 2], [-1, -2, -1], [-3, 1, -1]]))
    # Every third dimension goes.
    dimension_scores = mask_dimensions(layer.ffn.fc1, layer.ffn.fc2).scores
    dimension_scores.copy_(torch.arange(20) % 3 - 0.5)
    set_threshold(model, 0.5)

    tiles = (tile_scores > 0).repeat_interleave(4, 0).repeat_interleave(5, 1)[:, :12]
    dimensions = dimension_scores > 0
    expected = tiny().state_dict()
    expected["bert.layers.1.attention.value.weight"] *= tiles
    expected["bert.layers.1.attention.value.bias"] *= tiles.any(1)
    expected["bert.layers.1.ffn.fc1.weight"] *= dimensions[:, None]
    expected["bert.layers.1.ffn.fc1.bias"] *= dimensions
    expected["bert.layers.1.ffn.fc2.weight"] *= dimensions
    save_model(model, tmp_path)
    again = load_model(tmp_path).eval()
    close(again.state_dict(), expected)
    close(again(*INPUTS), model(*INPUTS))


# ------------------------------------------------------------------------------------ tokenizers

WORDS = ("[PAD] [UNK] [CLS] [SEP] [MASK] hello héllo Hello Héllo h ##ello e ##llo "
         "東 京 東京 ##京 moon Moon un ##able").split()
TEXTS = ["Héllo", "東京", "Moon moon", "unable [SEP] sun", "HÉLLO", "a\u00adb moon"]
# The ids of TEXTS by what tokenizer_config.json says, as `transformers` 5 has them.
TOKENIZERS = [
    ({}, [[5], [13, 14], [17, 17], [19, 20, 3, 1], [5], [1, 17]]),
    ({"do_lower_case": True, "strip_accents": None},
     [[5], [13, 14], [17, 17], [19, 20, 3, 1], [5], [1, 17]]),
    ({"do_lower_case": False}, [[8], [13, 14], [18, 17], [19, 20, 3, 1], [1], [1, 17]]),
    ({"strip_accents": False}, [[6], [13, 14], [17, 17], [19, 20, 3, 1], [6], [1, 17]]),
    ({"do_lower_case": False, "strip_accents": True},
     [[7], [13, 14], [18, 17], [19, 20, 3, 1], [1], [1, 17]]),
    ({"tokenize_chinese_chars": False}, [[5], [15], [17, 17], [19, 20, 3, 1], [5], [1, 17]]),
    ({"do_lower_case": False, "strip_accents": False, "tokenize_chinese_chars": False},
     [[8], [15], [18, 17], [19, 20, 3, 1], [1], [1, 17]]),
]


def tokenizer_folder(folder: Path, options: dict | None = None, words=WORDS) -> Path:
    """A model folder without weights. options: of tokenizer_config.json, None for no such file."""
    folder.mkdir()
    config = dict(vocab_size=len(WORDS), hidden_size=12, num_hidden_layers=1, num_attention_heads=1)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    if options is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return folder


def only_tokenizer_json(folder: Path) -> Path:
    """Say it with tokenizer.json alone, as transformers 5 does, and set what must not act."""
    tokenizer = load_tokenizer(folder)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").unlink()
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    return folder


def ids_of(folder: Path) -> list[list[int]]:
    encodings = load_tokenizer(folder).encode_batch(TEXTS, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def ids_of_transformers(folder: Path) -> list[list[int]]:
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    return tokenizer(TEXTS, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("options, expected", TOKENIZERS)
def test_a_tokenizer_is_what_its_folder_says(tmp_path, options, expected):
    folder = tokenizer_folder(tmp_path / "bert", options)
    assert ids_of(folder) == expected
    assert ids_of(only_tokenizer_json(folder)) == expected


@pytest.mark.parametrize("options, expected", TOKENIZERS)
def test_live_tokenizer(tmp_path, options, expected):
    """The same ids in the folder, in what transformers makes of it, and in our copies of both."""
    transformers = pytest.importorskip("transformers")
    folder = tokenizer_folder(tmp_path / "bert", options)
    assert ids_of_transformers(folder) == expected
    theirs = tmp_path / "theirs"
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(theirs)
    assert not (theirs / "vocab.txt").exists()
    (theirs / "config.json").write_text((folder / "config.json").read_text())
    for source in (folder, theirs):
        assert ids_of(source) == expected
        ours = tmp_path / f"copy of {source.name}"
        save_model(tiny(vocab_size=len(WORDS)), ours, tokenizer_from=source)
        assert ids_of(ours) == expected
        assert ids_of_transformers(ours) == expected
        assert same_tokenizer(ours, folder)


def test_tokenizer_config_json_has_the_last_word(tmp_path):
    """As in transformers, also over tokenizer.json and over the config.json of our older runs."""
    folder = tokenizer_folder(tmp_path / "bert")
    change_json(folder / "config.json", {"do_lower_case": False})
    assert ids_of(folder)[0] == [8]
    only_tokenizer_json(folder)
    change_json(folder / "config.json", {"do_lower_case": True})
    assert ids_of(folder)[0] == [8]
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    assert ids_of(folder)[0] == [5]


@pytest.mark.parametrize("text", [
    "\ufeff" + "\n".join(WORDS),          # a byte order mark
    "\n".join(WORDS) + "\n\n \n",         # blank lines after the end
    "\r\n".join(WORDS) + "\r\n",          # a file from Windows
])
def test_a_vocabulary_as_editors_leave_it(tmp_path, text):
    folder = tokenizer_folder(tmp_path / "bert")
    expected = load_tokenizer(folder).get_vocab()
    (folder / "vocab.txt").write_bytes(text.encode())
    assert load_tokenizer(folder).get_vocab() == expected
    assert ids_of(folder) == TOKENIZERS[0][1]


def test_a_line_is_a_word_whatever_is_in_it(tmp_path):
    """A line ends at its end, and not at another sign that some call a line break."""
    odd = ["x\u2028y", "\x85", "", "ab\u3000"]
    folder = tokenizer_folder(tmp_path / "bert", words=WORDS[:-5] + odd + ["end"])
    vocab = load_tokenizer(folder).get_vocab()
    assert [vocab[word] for word in odd] == [16, 17, 18, 19] and vocab["end"] == 20


@pytest.mark.parametrize("form", ["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize("missing", ["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
def test_a_tokenizer_without_a_special_token(tmp_path, form, missing):
    folder = tokenizer_folder(tmp_path / "bert")
    if form == "tokenizer.json":
        only_tokenizer_json(folder)
    path = folder / form
    path.write_text(path.read_text().replace(missing, "[OTHER]"))
    with pytest.raises(ValueError, match=rf"{form}: .*\{missing}"):
        load_tokenizer(folder)


@pytest.mark.parametrize("form", ["vocab.txt", "tokenizer.json"])
def test_more_words_than_embeddings(tmp_path, form):
    folder = tokenizer_folder(tmp_path / "bert")
    if form == "tokenizer.json":
        only_tokenizer_json(folder)
    change_json(folder / "config.json", {"vocab_size": 20})
    with pytest.raises(ValueError, match=f"{form}: 21 words for 20 embeddings"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name, text", [
    ("tokenizer.json", "{}"),
    ("tokenizer.json", "\0"),
    ("tokenizer_config.json", "[]"),
    ("tokenizer_config.json", '{"do_lower_case": "false"}'),
    ("tokenizer_config.json", '{"strip_accents": "no"}'),
    ("tokenizer_config.json", '{"tokenize_chinese_chars": null}'),
    # Words that vocab.txt does not have: transformers takes them as they stand, and we would not.
    ("added_tokens.json", '{"sunmoon": 21}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"21": {"content": "sunmoon"}}}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": ["sunmoon"]}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"21": "sunmoon"}}'),
])
def test_tokenizer_files_that_are_refused(tmp_path, name, text):
    folder = tokenizer_folder(tmp_path / "bert")
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}|do_lower_case"):
        load_tokenizer(folder)


def test_added_tokens_that_the_vocabulary_has(tmp_path):
    decoder = {str(n): {"content": WORDS[n], "special": True} for n in range(5)}
    folder = tokenizer_folder(tmp_path / "bert", {"added_tokens_decoder": decoder})
    (folder / "added_tokens.json").write_text("{}")
    assert ids_of(folder) == TOKENIZERS[0][1]


def test_no_tokenizer(tmp_path):
    folder = tokenizer_folder(tmp_path / "bert")
    (folder / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match="vocab.txt is missing"):
        load_tokenizer(folder)


def test_saving_copies_the_tokenizer_that_is_there_and_no_other(tmp_path):
    source = tokenizer_folder(tmp_path / "bert", {"do_lower_case": False})
    (source / "special_tokens_map.json").write_text('{"unk_token": "[UNK]"}')
    (source / "notes.txt").write_text("not of the tokenizer")
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "tokenizer.json").write_text("of another run")
    for _ in range(2):      # the second time from itself
        save_model(tiny(vocab_size=len(WORDS)), copy, tokenizer_from=source)
        names = {path.name for path in copy.iterdir()}
        assert names == {"config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json",
                         "special_tokens_map.json"}
        for name in ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json"):
            assert (copy / name).read_bytes() == (source / name).read_bytes()
        assert ids_of(copy) == TOKENIZERS[2][1]
        source = copy


def test_a_cased_folder_of_an_older_run_stays_cased(tmp_path):
    """Those say it in config.json alone."""
    source = tokenizer_folder(tmp_path / "old")
    save_model(tiny(vocab_size=len(WORDS), do_lower_case=False), source, tokenizer_from=source)
    save_model(load_model(source), tmp_path / "copy", tokenizer_from=source)
    assert ids_of(tmp_path / "copy") == TOKENIZERS[2][1]


@pytest.mark.parametrize("options, words", [
    ({"do_lower_case": False}, WORDS),
    ({"strip_accents": False}, WORDS),
    ({"tokenize_chinese_chars": False}, WORDS),
    ({}, [*WORDS[:-2], WORDS[-1], WORDS[-2]]),
    ({}, WORDS[:-1]),
])
def test_same_tokenizer(tmp_path, options, words):
    folder = tokenizer_folder(tmp_path / "bert")
    other = tokenizer_folder(tmp_path / "other", options, words)
    assert same_tokenizer(folder, folder) and same_tokenizer(other, other)
    assert not same_tokenizer(folder, other) and not same_tokenizer(other, folder)
    # In whatever form it is said.
    same = tokenizer_folder(tmp_path / "same", options, words)
    assert same_tokenizer(other, only_tokenizer_json(same))
    assert not same_tokenizer(folder, same)


def test_folder_sha256_is_of_what_is_read(folder):
    names = ["vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
             "added_tokens.json", "pruning.safetensors"]
    expected = {"config.json", "model.safetensors"}
    for name in names:
        assert folder_sha256(folder).keys() == expected
        (folder / name).write_text(name)
        expected.add(name)
    (folder / "log.jsonl").write_text("not read")
    (folder / "pytorch_model.bin").write_text("not read where model.safetensors is")
    before = folder_sha256(folder)
    assert before.keys() == expected
    for name in expected:
        content = (folder / name).read_bytes()
        assert before[name] == hashlib.sha256(content).hexdigest()
        (folder / name).write_bytes(content + b" ")
        after = folder_sha256(folder)
        assert [key for key in after if after[key] != before[key]] == [name]
        (folder / name).write_bytes(content)
    (folder / "model.safetensors").unlink()
    assert "pytorch_model.bin" in folder_sha256(folder)


# ------------------------------------------------------------------------------------ safetensors


def every_kind() -> dict:
    return {
        "f64": torch.tensor([[0.1, -2], [3, 4]]).double(),
        "one f16": torch.tensor([0.1]).half(),
        "i64": torch.tensor([[2 ** 62, -7]]),
        "empty": torch.empty(0, 5),
        "f32": torch.arange(24.0).view(3, 2, 4),
        "0-d": torch.tensor(2.5),
        "empty bf16": torch.empty(3, 0).bfloat16(),
        "bf16": torch.arange(7).bfloat16(),
        "transposed": torch.arange(12.0).view(3, 4).t(),
        'a "name" →': torch.ones(2),
    }


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
    contiguous = {name: tensor.contiguous() for name, tensor in every_kind().items()}
    safetensors.save_file(contiguous, tmp_path / "theirs")
    close(read_safetensors(tmp_path / "theirs"), every_kind())


def test_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors({"a": torch.ones(3)}, path)
    before = path.read_bytes()
    # The second tensor has no data: the write fails in mid-file.
    tensors = {"a": torch.zeros(5), "b": torch.zeros(5, device="meta")}
    with pytest.raises(NotImplementedError):
        write_safetensors(tensors, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


DATA = bytes(range(12))     # of two tensors, "a" of 8 bytes and "b" of 4


def file_of(text: bytes, length: int | None = None) -> bytes:
    """A safetensors file with this header, which says that it has this length."""
    if length is None:
        length = len(text)
    return length.to_bytes(8, "little") + text + DATA


def header(a={}, b={}, **more) -> bytes:
    """A true header, but for what a, b and more say."""
    rows = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | a,
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]} | b}
    return json.dumps(rows | more).encode()


TRUE = file_of(header())
OVERFLOW = dict(dtype="F32", shape=[2 ** 62, 2 ** 62, 0], data_offsets=[12, 12])
LIES = {
    "overlap": file_of(header(b=dict(shape=[2], data_offsets=[4, 12]))),
    "hole": file_of(header(a=dict(shape=[1], data_offsets=[0, 4]))),
    "backwards": file_of(header(a=dict(data_offsets=[8, 0]))),
    "one offset": file_of(header(a=dict(data_offsets=[0]))),
    "too few bytes": file_of(header(a=dict(shape=[3]))),
    "too many": file_of(header(a=dict(shape=[1]))),
    "other size": file_of(header(a=dict(dtype="F16"))),
    "unknown dtype": file_of(header(a=dict(dtype="F31"))),
    "negative offset": file_of(header(a=dict(shape=[3], data_offsets=[-4, 8]))),
    "negative shape": file_of(header(a=dict(shape=[-2, -1]))),
    "fraction": file_of(header(a=dict(shape=[2.0]))),
    "text": file_of(header(b=dict(shape=""))),
    "object": file_of(header(b=dict(shape={}))),
    "huge": file_of(header(b=dict(shape=[2 ** 60], data_offsets=[8, 8 + 2 ** 62]))),
    "long": file_of(header(b=dict(shape=[2 ** 62]))),
    "overflow": file_of(header(c=OVERFLOW)),
    "list": file_of(header(c=[])),
    "number": file_of(b"3"),
    "not JSON": file_of(b'{"a": '),
    "not text": file_of(b"\xff\xfe{}"),
    "one byte more": TRUE + b"\0",
}
for length in (0, 100, 300, 2 ** 33, 2 ** 64 - 1):
    LIES[f"header of {length}"] = file_of(header(), length)
for length in (0, 1, 7, 8, 9, 60, len(TRUE) - 12, len(TRUE) - 1):
    LIES[f"cut at {length}"] = TRUE[:length]


def test_true_safetensors_are_read(tmp_path):
    (tmp_path / "true").write_bytes(TRUE)
    tensors = read_safetensors(tmp_path / "true")
    assert tensors["a"].shape == (2,) and tensors["b"].shape == (1,)


@pytest.mark.parametrize("dtype", ["F31", "F8_E4M3", "I8", RED])
def test_an_unknown_type_is_named(tmp_path, dtype):
    (tmp_path / "file").write_bytes(file_of(header(b=dict(dtype=dtype))))
    with pytest.raises(ValueError) as error:
        read_safetensors(tmp_path / "file")
    assert repr(dtype) in str(error.value) and "not a sound" not in str(error.value)


def test_a_header_over_100_mb_is_not_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes((10 ** 8 + 1).to_bytes(8, "little"))
    os.truncate(path, 10 ** 8 + 1000)       # a hole: it takes no space
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="header"):
            read_safetensors(path)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("lie", LIES)
def test_lying_safetensors_are_refused(tmp_path, lie):
    (tmp_path / "lie.safetensors").write_bytes(LIES[lie])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="lie.safetensors"):
            read_safetensors(tmp_path / "lie.safetensors")
        # Nothing was allocated on the file's word.
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
