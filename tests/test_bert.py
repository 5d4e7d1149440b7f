"""bert.py beside `transformers` (stored and live), beside naive code, and before broken files.

Only the tests named `live` need transformers or safetensors, and skip themselves without.
"""
import hashlib
import json
import math
import os
import tracemalloc
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import bert
from bert import (ACTIVATIONS, BertConfig, BertForQuestionAnswering, folder_sha256, load_model,
                  load_tokenizer, read_json, read_safetensors, reading, replacing, same_tokenizer,
                  save_model, weights_sha256, write_json, write_safetensors)
from blockprune import mask_weight, set_threshold

# Inputs for a tiny model, and what transformers made of them.
GOLDEN = Path(__file__).parent / "golden"
STORED = json.loads((GOLDEN / "logits.json").read_text())
IDS = torch.tensor(STORED["input_ids"])
TYPES = torch.tensor(STORED["token_type_ids"])
MASK = torch.tensor(STORED["attention_mask"])
LOGITS = torch.tensor([STORED["start_logits"], STORED["end_logits"]])
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
        mean = 1.0 if name.lower().endswith("norm.weight") else 0.0
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


def change(path: Path, changes: dict):
    """Change entries of a JSON or safetensors file. Those that `changes` calls `...` go."""
    is_json = path.suffix == ".json"
    values = (read_json(path) if is_json else read_safetensors(path)) | changes
    values = {key: value for key, value in values.items() if value is not ...}
    if is_json:
        write_json(path, values)
    else:
        write_safetensors(values, path)


# ------------------------------------------------------------------------ parity with transformers


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_golden(dtype, atol):
    model = load_model(GOLDEN).to(dtype).eval()
    close(torch.stack(model(*INPUTS))[:, REAL], LOGITS[:, REAL], atol)


@pytest.mark.hf
@pytest.mark.parametrize("kind, act", [
    *[("ForQuestionAnswering", act) for act in ("gelu", "relu", "gelu_new", "swish")],
    ("ForPreTraining", "gelu"), ("Model", "gelu"),
])
def test_live_parity_both_ways(tmp_path, kind, act):
    """Their folder → our model → our folder → their model."""
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, f"Bert{kind}")(transformers.BertConfig(**TINY, hidden_act=act))
    scramble(theirs).save_pretrained(tmp_path / "theirs")
    has_head = hasattr(theirs, "qa_outputs")
    ours = load_model(tmp_path / "theirs", fresh_head=not has_head).eval()
    save_model(ours, tmp_path / "ours")
    again, info = transformers.BertForQuestionAnswering.from_pretrained(
        tmp_path / "ours", output_loading_info=True)
    again.eval()
    assert not any(info.values())       # nothing missing, unexpected or of another shape
    if has_head:
        close(again.qa_outputs.weight, theirs.qa_outputs.weight)
    named = dict(input_ids=IDS, token_type_ids=TYPES, attention_mask=MASK)
    for dtype, atol in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        hidden = ours.to(dtype).bert(*INPUTS)
        close(hidden[REAL], theirs.to(dtype).base_model(**named).last_hidden_state[REAL], atol)
        expected = again.to(dtype)(**named)
        for logits, name in zip(ours(*INPUTS), ("start_logits", "end_logits")):
            close(logits[REAL], expected[name][REAL], atol)


# ----------------------------------------------------------------------------- the model by itself


@torch.no_grad()
def test_attention_is_the_naive_one():
    """softmax(Q Kᵀ / √D) V, one row of the batch and one head after the other."""
    attention = tiny(heads=[2, 3]).double().bert.layers[0].attention
    x = torch.randn(6, 11, 12).double()
    expected = torch.zeros(6, 11, 8).double()
    for b in range(6):
        for head in (slice(0, 4), slice(4, 8)):
            scores = attention.query(x)[b, :, head] @ attention.key(x)[b, :, head].T / math.sqrt(4)
            weights = scores.exp() * MASK[b]
            weights = weights / weights.sum(1, keepdim=True)
            expected[b, :, head] = weights @ attention.value(x)[b, :, head]
    close(attention(x, MASK.bool()[:, None, None]), attention.out(expected), 1e-12)


def test_activations():
    x = torch.linspace(-9, 9, 101, dtype=torch.float64)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)
    formulas = {
        "gelu": x / 2 * (1 + torch.erf(x / math.sqrt(2))),
        "relu": x * (x > 0),
        "gelu_new": x / 2 * (1 + torch.tanh(inner)),
        "silu": x / (1 + torch.exp(-x)),
    }
    aliases = {"gelu_python": "gelu", "swish": "silu", "gelu_pytorch_tanh": "gelu_new"}
    for name, activation in ACTIVATIONS.items():
        close(activation(x), formulas[aliases.get(name, name)], 1e-12)


@pytest.mark.parametrize("changes", [{}, UNEVEN])
def test_padding_changes_nothing(changes):
    model = tiny(**changes).double()
    logits = torch.stack(model(IDS, TYPES, MASK))
    for b, length in enumerate(MASK.sum(1)):
        alone = model(IDS[b, None, :length], TYPES[b, None, :length])
        close(logits[:, b, None, :length], torch.stack(alone), 1e-10)


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


@torch.no_grad()
def test_dropout_only_in_training():
    x = torch.randn(6, 11, 12)
    # Of all or of nothing, so that no luck is in it.
    hidden = tiny(hidden_dropout_prob=1.0, attention_probs_dropout_prob=0.0)
    attention = tiny(attention_probs_dropout_prob=1.0).bert.layers[0].attention
    plain = tiny(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    close(hidden(*INPUTS), plain(*INPUTS))
    close(attention(x, None), plain.bert.layers[0].attention(x, None))
    # In training embeddings, attention and feed-forward add nothing, and no value gets through.
    expected = torch.zeros_like(x)
    for layer in hidden.bert.layers:
        expected = layer.ffn_norm(layer.attention_norm(expected))
    close(hidden.train().bert(*INPUTS), expected, 1e-6)
    close(attention.train()(x, None), attention.out.bias.expand_as(x), 1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_on_a_cpu_is_fp32(autocast):
    q, k, v = torch.randn(3, 6, 3, 11, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        x = bert.scaled_dot_product_attention(q, k, v, None, 0.0)
    expected = functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    close(x, expected.bfloat16())


# ------------------------------------------------------------------------------ loading and saving


@pytest.mark.parametrize("key, value", [
    ("heads", [2]), ("ffn", [1, 2, 3]), ("num_attention_heads", 5),
    ("model_type", "roberta"), ("position_embedding_type", "relative_key"), ("is_decoder", True),
    ("add_cross_attention", True), ("pruned_heads", {"0": [1]}),
])
def test_a_config_of_another_model_is_refused(folder, key, value):
    change(folder / "config.json", {key: value})
    with pytest.raises(ValueError, match=f"config.json: .*{key}"):
        load_model(folder)


def test_keys_that_change_nothing_are_accepted(folder):
    change(folder / "config.json", dict(
        position_embedding_type="absolute", is_decoder=False, pruned_heads={},
        add_cross_attention=None, chunk_size_feed_forward=3, heads=..., ffn=...))
    close(load_model(folder).state_dict(), tiny().state_dict())


@pytest.mark.parametrize("fresh_head", [False, True])
@pytest.mark.parametrize("name, tensor", [      # `...`: it is missing
    ("bert.encoder.layer.1.attention.self.key.bias", ...),
    ("bert.encoder.layer.2.output.dense.bias", torch.ones(12)),
    ("classifier.weight", torch.ones(3, 12)),
    ("bert.encoder.layer.0.output.dense.weight", torch.ones(20, 12)),
    ("qa_outputs.weight", torch.ones(1, 12)),       # which copy_() would repeat
])
def test_a_tensor_that_does_not_fit_is_named(folder, name, tensor, fresh_head):
    change(folder / "model.safetensors", {name: tensor})
    with pytest.raises(ValueError, match=f"model.safetensors: .*{name.removeprefix('bert.')}"):
        load_model(folder, fresh_head=fresh_head)


def test_fresh_head_and_ignored_tensors(folder, capsys):
    ignored = ("bert.pooler.dense.weight", "cls.predictions.bias", "bert.embeddings.position_ids",
               "bert.embeddings.token_type_ids")
    change(folder / "model.safetensors", {
        "qa_outputs.weight": ..., "qa_outputs.bias": ..., **dict.fromkeys(ignored, torch.ones(3))})
    with pytest.raises(ValueError, match="qa_outputs.bias"):
        load_model(folder)
    model = load_model(folder, fresh_head=True)
    report = capsys.readouterr().out
    for word in ("37 tensors", "qa_outputs.weight", *ignored):
        assert word.removeprefix("bert.") in report, word
    close(model.bert.state_dict(), tiny().bert.state_dict())
    assert not model.qa_outputs.bias.any()
    assert 0 < model.qa_outputs.weight.std() < 0.1


@pytest.mark.parametrize("now, then", [
    ("bert.", ""), ("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")])
def test_old_names(folder, now, then):
    tensors = read_safetensors(folder / "model.safetensors")
    tensors = {name.replace(now, then): tensor for name, tensor in tensors.items()}
    write_safetensors(tensors, folder / "model.safetensors")
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
    with pytest.raises(ValueError, match="pytorch_model.bin: "):
        load_model(folder)
    assert not (folder / "owned").exists()
    # The trap would have snapped.
    torch.load(path, weights_only=False)
    assert (folder / "owned").exists()


@pytest.mark.parametrize("changes", [{}, UNEVEN, dict(heads=[3, 1]), dict(ffn=[0, 7])])
def test_save_and_load(tmp_path, changes):
    model = tiny(hidden_act="relu", layer_norm_eps=0.03, **changes)
    folder = tmp_path / "a" / "b"
    save_model(model, folder, method="hybrid")
    again = load_model(folder).eval()
    assert again.config == model.config
    close(again.state_dict(), model.state_dict())
    close(again(*INPUTS), model(*INPUTS))
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads((folder / "config.json").read_text())["method"] == "hybrid"


@torch.no_grad()
def test_a_masked_model_saves_what_it_computes(tmp_path):
    model = tiny()
    value = model.bert.layers[1].attention.value
    # Two of nine blocks are left, none of them in the second row.
    mask_weight(value, (4, 5)).scores.copy_(torch.tensor([[1, -1, -1], [-1, -2, -1], [-1, 1, -1]]))
    set_threshold(model, 0.5)
    save_model(model, tmp_path)
    again = load_model(tmp_path).eval()
    close(again(*INPUTS), model(*INPUTS))
    plain = again.bert.layers[1].attention.value
    close((plain.weight, plain.bias), (value.weight, value.bias))
    assert plain.weight.count_nonzero() == 40 and plain.bias.count_nonzero() == 8


def test_sha256_is_of_what_is_read(folder):
    (folder / "vocab.txt").write_bytes(b"at first")
    seen = {folder_sha256(folder)}
    (folder / "vocab.txt").rename(folder / "added_tokens.json")
    assert folder_sha256(folder) not in seen
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                 "added_tokens.json", "pruning.safetensors", "config.json", "model.safetensors"):
        for content in (b"here", b"changed"):
            (folder / name).write_bytes(content)
            assert folder_sha256(folder) not in seen, name
            seen.add(folder_sha256(folder))
    (folder / "pytorch_model.bin").write_text("not read")
    assert folder_sha256(folder) in seen
    assert weights_sha256(folder) == hashlib.sha256(b"changed").hexdigest()


# ------------------------------------------------------------------------------------ tokenizers

WORDS = ("[PAD] [UNK] [CLS] [SEP] [MASK] hello héllo Hello Héllo h ##ello e ##llo "
         "東 京 東京 ##京 moon Moon un ##able").split()
TEXTS = ["Héllo", "東京", "Moon moon", "unable [SEP] sun", "HÉLLO", "a\u00adb moon"]
# The ids of TEXTS by what tokenizer_config.json says, as `transformers` 5 has them.
TOKENIZERS = [
    ({}, [[5], [13, 14], [17, 17], [19, 20, 3, 1], [5], [1, 17]]),
    ({"do_lower_case": False}, [[8], [13, 14], [18, 17], [19, 20, 3, 1], [1], [1, 17]]),
    ({"do_lower_case": False, "strip_accents": True},
     [[7], [13, 14], [18, 17], [19, 20, 3, 1], [1], [1, 17]]),
    ({"strip_accents": False, "tokenize_chinese_chars": False},
     [[6], [15], [17, 17], [19, 20, 3, 1], [6], [1, 17]]),
]


def tokenizer_folder(folder: Path, options: dict | None = None, words=WORDS) -> Path:
    """A model folder without weights. options: of tokenizer_config.json, None for no such file."""
    folder.mkdir()
    write_json(folder / "config.json", dict(vocab_size=len(WORDS), hidden_size=12,
                                            num_hidden_layers=1, num_attention_heads=1))
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    if options is not None:
        write_json(folder / "tokenizer_config.json", options)
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


@pytest.mark.parametrize("options, expected", TOKENIZERS)
def test_a_tokenizer_is_what_its_folder_says(tmp_path, options, expected):
    plain = tokenizer_folder(tmp_path / "plain")
    folder = tokenizer_folder(tmp_path / "folder", options)
    other_form = only_tokenizer_json(tokenizer_folder(tmp_path / "other form", options))
    assert ids_of(folder) == ids_of(other_form) == expected
    assert same_tokenizer(folder, other_form)
    assert same_tokenizer(folder, plain) == (options == {})


@pytest.mark.hf
@pytest.mark.parametrize("options, expected", TOKENIZERS)
def test_live_tokenizer(tmp_path, options, expected):
    """transformers makes the same ids of our copies of a folder, and we of what it saves."""
    load = pytest.importorskip("transformers").AutoTokenizer.from_pretrained
    folder = tokenizer_folder(tmp_path / "bert", options)
    change(folder / "config.json", {"model_type": "bert"})
    save_model(tiny(vocab_size=len(WORDS)), tmp_path / "ours", tokenizer_from=folder)
    theirs = load(tmp_path / "ours")
    assert theirs(TEXTS, add_special_tokens=False)["input_ids"] == expected
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs/config.json").write_text((folder / "config.json").read_text())
    assert not (tmp_path / "theirs/vocab.txt").exists()
    assert ids_of(tmp_path / "theirs") == expected
    assert same_tokenizer(tmp_path / "theirs", folder)


def test_tokenizer_config_json_has_the_last_word(tmp_path):
    """As in transformers, over tokenizer.json too; config.json has none over tokenizer.json."""
    folder = tokenizer_folder(tmp_path / "bert")
    change(folder / "config.json", {"do_lower_case": False})
    assert ids_of(folder)[0] == [8]
    only_tokenizer_json(folder)
    change(folder / "config.json", {"do_lower_case": True})
    assert ids_of(folder)[0] == [8]
    write_json(folder / "tokenizer_config.json", {"do_lower_case": True})
    assert ids_of(folder)[0] == [5]


@pytest.mark.parametrize("text", [
    "\ufeff" + "\n".join(WORDS),          # a byte order mark
    "\n".join(WORDS) + "\n\n \n",         # blank lines after the end
    "\r\n".join(WORDS) + "\r\n",          # a file from Windows
    "\n".join(WORDS).replace("h\n", "x\u2028y\x85z\n"),       # these end no line
])
def test_a_vocabulary_as_editors_leave_it(tmp_path, text):
    folder = tokenizer_folder(tmp_path / "bert")
    (folder / "vocab.txt").write_bytes(text.encode())
    assert ids_of(folder) == TOKENIZERS[0][1]


def test_saving_copies_the_tokenizer(tmp_path):
    source = tokenizer_folder(tmp_path / "bert")
    # Some folders say the case in config.json alone.
    change(source / "config.json", {"do_lower_case": False})
    copy = tmp_path / "copy"
    save_model(tiny(vocab_size=len(WORDS)), copy, tokenizer_from=source)
    names = {path.name for path in copy.iterdir()}
    assert names == {"config.json", "model.safetensors", "vocab.txt"}
    assert ids_of(copy) == TOKENIZERS[1][1]


@pytest.mark.parametrize("words", [[*WORDS[:-2], WORDS[-1], WORDS[-2]], WORDS[:-1]])
def test_other_words_are_another_tokenizer(tmp_path, words):
    folder = tokenizer_folder(tmp_path / "bert")
    assert not same_tokenizer(folder, tokenizer_folder(tmp_path / "other", words=words))


# ------------------------------------------------------------------------------------------ files


TENSORS = {
    "f64": torch.tensor([[0.1, -2], [3, 4]]).double(),
    "one f16": torch.tensor([0.1]).half(),          # after it nothing is aligned
    "i64": torch.tensor([[2 ** 62, -7]]),
    "empty": torch.empty(0, 5),
    "0-d": torch.tensor(2.5),
    "bf16": torch.arange(7).bfloat16(),
    "transposed": torch.arange(12.0).view(3, 4).t(),
    'a "name" →': torch.ones(2),
}


def test_safetensors_round_trip(tmp_path):
    for tensors in ({}, {"empty": torch.empty(0, 5)}, TENSORS):
        write_safetensors(tensors, tmp_path / "file")
        close(read_safetensors(tmp_path / "file"), tensors)


@pytest.mark.hf
def test_live_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    write_safetensors(TENSORS, tmp_path / "ours")
    close(safetensors.load_file(tmp_path / "ours"), TENSORS)
    contiguous = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    safetensors.save_file(contiguous, tmp_path / "theirs")
    close(read_safetensors(tmp_path / "theirs"), TENSORS)


def file_of(**row) -> bytes:
    """A safetensors file of one tensor with 12 bytes, and a header with this row."""
    row = dict(dtype="F32", shape=[3], data_offsets=[0, 12]) | row
    text = json.dumps({"a": row}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(12)


BROKEN = {
    "not JSON": ("config.json", b'{"model_type": "bert"'),
    "a text": ("config.json", json.dumps(TINY | {"hidden_size": "12"}).encode()),
    "empty": ("model.safetensors", b""),
    "web page": ("model.safetensors", b"<!DOCTYPE html>"),
    "cut in the header": ("model.safetensors", file_of()[:40]),
    "cut in the data": ("model.safetensors", file_of()[:-1]),
    "unknown type": ("model.safetensors", file_of(dtype="F31")),
    "huge": ("model.safetensors", file_of(shape=[2 ** 60], data_offsets=[0, 2 ** 62])),
    "wrong shape": ("model.safetensors", file_of(shape=[2 ** 60])),
    "no pickle": ("pytorch_model.bin", b"<!DOCTYPE html>"),
    "no tokenizer": ("tokenizer.json", b"{}"),
    "no text": ("vocab.txt", b"\xff\xfe[PAD]"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named_in_one_line(folder, case):
    name, content = BROKEN[case]
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as error:
            load_model(folder)
            load_tokenizer(folder)
        # No header can ask for more memory than its file has.
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()
    text = str(error.value)
    assert text.startswith(f"{folder / name}: ") and text.count(str(folder)) == 1
    assert "\n" not in text and len(text) < 400


@pytest.mark.parametrize("error", [MemoryError(), torch.cuda.OutOfMemoryError("full"),
                                   FileNotFoundError(2, "No such file", "name")])
def test_reading_lets_through_what_is_not_the_files_fault(error):
    with pytest.raises(type(error)) as caught:
        with reading("path"):
            raise error
    assert caught.value is error


def test_replacing_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "file"
    write_json(path, 1)
    with pytest.raises(KeyboardInterrupt):
        with replacing(path) as temporary:
            temporary.write_text("half of a lon")
            raise KeyboardInterrupt
    assert path.read_text() == "1\n"
    write_json(path, 2)
    assert path.read_text() == "2\n" and list(tmp_path.iterdir()) == [path]
