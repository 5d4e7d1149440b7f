"""BERT for question answering, from scratch; each layer has its own number of heads and FFN width.

The model of
    Devlin, Chang, Lee, Toutanova: BERT, NAACL 2019; reference code: google-research/bert,
with the settings and the tensor names of Hugging Face: a BERT folder from the hub opens here, and a
folder written here opens in `transformers` as long as no head or dimension was removed. Both
directions are tested against `transformers` in tests/test_bert.py.
Left out: the pooler, the heads of pre-training, relative positions, decoding.

First the model, then the folder it is read from and written to.

Letters:
    B    batch                      H    heads of this layer
    T    tokens                     D    head size, the same in all layers
    E    hidden size                F    inner dimensions of this layer's feed-forward part
"""
import contextlib
import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path
from typing import BinaryIO

import tokenizers
import torch
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import Tensor, nn
from torch.nn import functional

# ----------------------------------------------------------------------------------- configuration

ACTIVATIONS = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
    "gelu_new": nn.GELU("tanh"),
    "gelu_pytorch_tanh": nn.GELU("tanh"),
}


@dataclasses.dataclass
class BertConfig:
    """The keys of Hugging Face's config.json, at the values of bert-base-uncased, and two of ours.

    heads, ffn: how many heads and FFN dimensions are left, a list of one number a layer, 0 allowed.
        None stands for all of them in every layer.
    Raises ValueError, naming the key, where a value is impossible.
    """
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12           # of the dense model: the head size is E over this
    intermediate_size: int = 3072           # of the dense model
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    do_lower_case: bool = True              # of vocab.txt, unless tokenizer_config.json says it
    heads: list[int] | None = None
    ffn: list[int] | None = None

    def __post_init__(self):
        _check_numbers(self)
        if self.heads is None:
            self.heads = [self.num_attention_heads] * self.num_hidden_layers
        if self.ffn is None:
            self.ffn = [self.intermediate_size] * self.num_hidden_layers
        _check_widths("heads", self.heads, self.num_hidden_layers, self.num_attention_heads)
        _check_widths("ffn", self.ffn, self.num_hidden_layers, self.intermediate_size)

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads


# --------------------------------------------------------------------------------------- the model


class Linear(nn.Linear):
    """nn.Linear, drawn in BertForQuestionAnswering. Torch's own way warns about empty matrices."""

    def reset_parameters(self):
        nn.init.zeros_(self.bias)


class SelfAttention(nn.Module):
    """softmax(Q Kᵀ / √D) V for each head, and the projection back to E."""

    def __init__(self, config: BertConfig, heads: int):
        super().__init__()
        E = config.hidden_size
        inner = heads * config.head_size            # H · D; E where no head is removed
        self.heads = heads
        self.dropout = config.attention_probs_dropout_prob
        self.query = Linear(E, inner)
        self.key = Linear(E, inner)
        self.value = Linear(E, inner)
        self.out = Linear(inner, E)

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        # With no head left, what remains of the sum over heads is the bias.
        if self.heads == 0:
            return self.out.bias.expand_as(x)
        q = self.split_heads(self.query(x))                         # (B, H, T, D)
        k = self.split_heads(self.key(x))
        v = self.split_heads(self.value(x))
        dtype = q.dtype
        # Note: a CPU's kernel gains nothing from bf16, and its gradient takes twice as long in it.
        if q.is_cpu and dtype == torch.bfloat16:
            q = q.float()
            k = k.float()
            v = v.float()
        # As in BERT, dropout acts on the attention weights: a token may not be looked at at all.
        dropout = 0.0
        if self.training:
            dropout = self.dropout
        with torch.autocast("cpu", enabled=False):
            x = functional.scaled_dot_product_attention(q, k, v, attention_mask, dropout)
        # Put the heads side by side again.
        x = x.to(dtype).transpose(1, 2)                             # (B, T, H, D)
        x = x.flatten(2)                                            # (B, T, H · D)
        return self.out(x)                                          # (B, T, E)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, H · D) to (B, H, T, D)."""
        B, T, _ = x.shape
        return x.view(B, T, self.heads, -1).transpose(1, 2)


class FeedForward(nn.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, config: BertConfig, width: int):
        super().__init__()
        self.width = width
        self.act = ACTIVATIONS[config.hidden_act]
        self.fc1 = Linear(config.hidden_size, width)
        self.fc2 = Linear(width, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        # With no dimension left, what remains of the sum over them is the bias.
        if self.width == 0:
            return self.fc2.bias.expand_as(x)
        x = self.act(self.fc1(x))                                   # (B, T, F)
        return self.fc2(x)                                          # (B, T, E)


class Layer(nn.Module):
    """Attention and feed-forward, each with dropout, residual connection and then LayerNorm."""

    def __init__(self, config: BertConfig, heads: int, width: int):
        super().__init__()
        E = config.hidden_size
        eps = config.layer_norm_eps
        self.attention = SelfAttention(config, heads)
        self.attention_norm = nn.LayerNorm(E, eps)
        self.ffn = FeedForward(config, width)
        self.ffn_norm = nn.LayerNorm(E, eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, attention_mask)))
        x = self.ffn_norm(x + self.dropout(self.ffn(x)))
        return x                                                    # (B, T, E)


class Bert(nn.Module):
    """Embeddings and encoder: token ids (B, T) to hidden states (B, T, E)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        E = config.hidden_size
        self.word = nn.Embedding(config.vocab_size, E)
        self.position = nn.Embedding(config.max_position_embeddings, E)
        self.token_type = nn.Embedding(config.type_vocab_size, E)
        self.norm = nn.LayerNorm(E, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList()
        for heads, width in zip(config.heads, config.ffn):
            self.layers.append(Layer(config, heads, width))

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None,
                attention_mask: Tensor | None) -> Tensor:
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        # Every token is the sum of what it is, where it is and which of the two texts it is in.
        T = input_ids.shape[1]
        positions = torch.arange(T, device=input_ids.device)
        x = self.word(input_ids) + self.position(positions) + self.token_type(token_type_ids)
        x = self.dropout(self.norm(x))                              # (B, T, E)
        # True where a token may be looked at, the same for all heads and for all tokens that look.
        if attention_mask is not None:
            attention_mask = attention_mask.bool()[:, None, None, :]    # (B, 1, 1, T)
        for layer in self.layers:
            x = layer(x, attention_mask)
        return x                                                    # (B, T, E)


class BertForQuestionAnswering(nn.Module):
    """BERT with a linear layer that scores each token as the start and as the end of the answer.

    config: a BertConfig. Weights are drawn from N(0, initializer_range²), biases are 0.
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.bert = Bert(config)
        self.qa_outputs = Linear(config.hidden_size, 2)
        # As BERT does, here for all modules: in their order, so that a seed gives one model.
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.initializer_range)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None = None,
                attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The start logits and the end logits, each (B, T). At padding they mean nothing.

        input_ids: (B, T). token_type_ids: (B, T), 0 in the question and 1 in the passage; None is
        all 0. attention_mask: (B, T), 1 at tokens and 0 at padding; None is all 1.
        """
        x = self.bert(input_ids, token_type_ids, attention_mask)    # (B, T, E)
        logits = self.qa_outputs(x)                                 # (B, T, 2)
        return logits.unbind(dim=-1)


# ------------------------------------------------------------------------------- files, any of them


@contextlib.contextmanager
def replacing(path: Path):
    """with replacing(path) as temporary: what is written to `temporary` then replaces `path`.

    Raises OSError, with the path, where that fails: a full disk alone names no file.
    """
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        yield temporary
        # At every moment the path has its old content or its new one, whole.
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path, *needs: str) -> dict:
    """The object in a JSON file. Raises ValueError if it is none, or lacks a key of `needs`."""
    try:
        values = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:   # ValueError covers bytes that are no text
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a JSON object is expected")
    for key in needs:
        if key not in values:
            raise ValueError(f"{path}: a JSON object with {', '.join(needs)} is expected")
    return values


def write_json(path: Path, values) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------- safetensors
# The format: 8 bytes N (little endian), N bytes of JSON, the data of all tensors without a gap.
# The JSON is {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}, counted in bytes
# from the beginning of the data.

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file. Raises ValueError where it is cut off, or its header is not true.

    Nothing is believed before it is checked, so nothing is allocated on the header's word.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        try:
            # A header that is longer than the file, or than any real one, is not read.
            header_size = int.from_bytes(file.read(8), "little")
            data_size = size - 8 - header_size
            if data_size < 0:
                raise ValueError("it is cut off")
            if header_size > 100_000_000:
                raise ValueError(f"its header has {header_size} bytes, more than 100 MB")
            header = json.loads(file.read(header_size))
            header.pop("__metadata__", None)
            unknown = [row["dtype"] for row in header.values() if row["dtype"] not in DTYPES]
            if not unknown:
                tensors = _read_data(file, header, data_size)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path}: not a sound safetensors file: {error!r}") from None
    if unknown:
        raise ValueError(f"{path}: data of type {unknown[0]!r}, which is not one of {list(DTYPES)}")
    return tensors


def _read_data(file: BinaryIO, header: dict, data_size: int) -> dict[str, Tensor]:
    """The tensors, from where the file stands. In its order each begins where the last one ends."""
    tensors = {}
    end = 0
    for name, row in sorted(header.items(), key=_data_offsets):
        dtype = DTYPES[row["dtype"]]
        shape = row["shape"]
        for n in shape:
            if type(n) is not int or n < 0:
                raise ValueError(f"the shape of {name} is {shape}")
        begin = end
        end = begin + math.prod(shape) * dtype.itemsize
        if row["data_offsets"] != [begin, end]:
            raise ValueError(f"{name} does not fill the bytes from {begin} to {end}")
        if end > data_size:
            raise ValueError(f"{name} ends after the file")
        # The file has these bytes, and they are no other tensor's: only now they get memory.
        tensors[name] = torch.empty(shape, dtype=dtype, device="cpu")
        file.readinto(_bytes_of(tensors[name]))
    if end != data_size:
        raise ValueError(f"{data_size} bytes of data where the header promises {end}")
    return tensors


def write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors under a temporary name, then rename: a file of that name is always whole."""
    dtype_names = {dtype: name for name, dtype in DTYPES.items()}
    # The header comes first, so all places are counted before anything is written.
    header = {"__metadata__": {"format": "pt"}}     # `transformers` wants to know: of PyTorch
    end = 0
    for name, tensor in tensors.items():
        begin = end
        end = begin + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": dtype_names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    # With blanks after it, so that the data begins at a multiple of 8.
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            file.write(_bytes_of(tensor.detach().cpu().contiguous()))


def _data_offsets(item: tuple[str, dict]) -> list[int]:
    _, row = item
    return row["data_offsets"]


def _bytes_of(tensor: Tensor):
    """The memory of a contiguous tensor on the CPU, as an array of bytes."""
    return tensor.view(-1).view(torch.uint8).numpy()


# -------------------------------------------------------------------------------- the model folder

HF_NAMES = {    # a module here: its name there, after "bert."; {} is the number of the layer
    "bert.word": "embeddings.word_embeddings",
    "bert.position": "embeddings.position_embeddings",
    "bert.token_type": "embeddings.token_type_embeddings",
    "bert.norm": "embeddings.LayerNorm",
    "bert.layers.{}.attention.query": "encoder.layer.{}.attention.self.query",
    "bert.layers.{}.attention.key": "encoder.layer.{}.attention.self.key",
    "bert.layers.{}.attention.value": "encoder.layer.{}.attention.self.value",
    "bert.layers.{}.attention.out": "encoder.layer.{}.attention.output.dense",
    "bert.layers.{}.attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "bert.layers.{}.ffn.fc1": "encoder.layer.{}.intermediate.dense",
    "bert.layers.{}.ffn.fc2": "encoder.layer.{}.output.dense",
    "bert.layers.{}.ffn_norm": "encoder.layer.{}.output.LayerNorm",
    "qa_outputs": "qa_outputs",
}
# Parts of other BERTs that we do not have, and two buffers that are no weights.
IGNORED = ("embeddings.position_ids", "embeddings.token_type_ids", "pooler.", "cls.")

# Activations that HF has under two names.
ALIASES = {"gelu_python": "gelu", "swish": "silu"}

# Keys of HF's config.json that change what a BERT computes, and the one value that is built here.
ONLY = {
    "model_type": "bert",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
}


def hf_tensors(model: BertForQuestionAnswering) -> dict[str, Tensor]:
    """The model's tensors by HF name, without "bert.". A masked weight is read as W ⊙ M(S)."""
    tensors = {}
    for ours, theirs in HF_NAMES.items():
        # A row of the table is one module, or one in each layer.
        count = 1
        if "{}" in ours:
            count = model.config.num_hidden_layers
        for layer in range(count):
            module = model.get_submodule(ours.format(layer))
            name = theirs.format(layer)
            tensors[f"{name}.weight"] = module.weight
            if hasattr(module, "bias"):     # an embedding has none
                tensors[f"{name}.bias"] = module.bias
    return tensors


def load_config(folder: str | Path) -> BertConfig:
    """The config.json of a model folder.

    Raises FileNotFoundError if the folder has none, ValueError if it is not one of a BERT.
    """
    path = Path(folder, "config.json")
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no model folder (it has no config.json)")
    values = read_json(path)
    for key, only in ONLY.items():
        value = values.get(key)
        if value is not None and value != only:
            raise ValueError(f"{path}: not a BERT as it is built here: "
                             f"{key} is {value!r}, not {only!r}")
    # Other keys have BERT's own value where they are not given. These say which BERT it is.
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        if key not in values:
            raise ValueError(f"{path}: {key} missing")
    for alias, name in ALIASES.items():
        if values.get("hidden_act") == alias:
            values["hidden_act"] = name
    # Case is a matter of the tokenizer. Its own file goes before what config.json says.
    options = _tokenizer_options(folder)
    if "do_lower_case" in options:
        values["do_lower_case"] = options["do_lower_case"]
    known = {field.name for field in dataclasses.fields(BertConfig)}
    return BertConfig(**{key: value for key, value in values.items() if key in known})


def load_model(folder: str | Path, fresh_head: bool = False) -> BertForQuestionAnswering:
    """Read a model folder: config.json with model.safetensors, or with pytorch_model.bin.

    fresh_head: where training starts, the two tensors of the QA head may be missing. They stay as
        initialised, and what was loaded, ignored and left fresh is printed.
    Raises FileNotFoundError for no model, and ValueError, with its name, for a tensor that is
    missing, unknown or of another shape.
    """
    config = load_config(folder)
    path = _weights_path(folder)
    saved = _read_weights(path)
    # The shapes first, without memory behind them: config.json may say anything.
    with torch.device("meta"):
        wanted = hf_tensors(BertForQuestionAnswering(config))

    # Names on one side only: there may be none, but for those with a reason.
    fresh = sorted(wanted.keys() - saved.keys())
    missing = fresh
    if fresh_head:
        missing = [name for name in fresh if not name.startswith("qa_outputs.")]
    if missing:
        raise ValueError(f"{path}: {len(missing)} tensors missing: {_listed(missing[:4])}")
    others = sorted(saved.keys() - wanted.keys())
    ignored = [name for name in others if name.startswith(IGNORED)]
    unknown = [name for name in others if not name.startswith(IGNORED)]
    if unknown:
        raise ValueError(f"{path}: {len(unknown)} tensors not known here: {_listed(unknown[:4])}")

    # Names on both sides: they must have the same shape.
    for name, tensor in wanted.items():
        if name in fresh:
            continue
        if saved[name].shape != tensor.shape:
            raise ValueError(f"{path}: {name} is {list(saved[name].shape)}, "
                             f"by config.json {list(tensor.shape)}")
        if not saved[name].isfinite().all():
            raise ValueError(f"{path}: {name} has values that are not finite")

    # The weights are what config.json says: now the model, with memory.
    model = BertForQuestionAnswering(config)
    for name, tensor in hf_tensors(model).items():
        if name in saved:
            tensor.data.copy_(saved[name])      # into the model's own type and memory
    # A head that is not in the file is no secret.
    if fresh or ignored:
        print(f"{path}: {len(wanted) - len(fresh)} tensors loaded; "
              f"fresh: {_listed(fresh)}; ignored: {_listed(ignored)}")
    return model


def _listed(names: list[str]) -> str:
    """Names from a file for a line of text: by repr, so that they cannot colour or forge one."""
    if not names:
        return "none"
    return ", ".join(repr(name) for name in names)


def _weights_path(folder: str | Path) -> Path:
    """The file with the weights, or FileNotFoundError."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if Path(folder, name).is_file():
            return Path(folder, name)
    raise FileNotFoundError(f"{folder}: no model.safetensors and no pytorch_model.bin")


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by today's HF names, without "bert."."""
    if path.suffix == ".safetensors":
        saved = read_safetensors(path)
    else:
        try:
            saved = dict(torch.load(path, "cpu", weights_only=True))    # runs no code of the file
        except Exception as error:      # of whatever kind: pickle, zip and struct have their own
            kind = type(error).__name__
            raise ValueError(f"{path}: not a file of tensors alone ({kind})") from None
    tensors = {}
    for name, tensor in saved.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: not a file of tensors alone")
        # A model without a head, as saved by BertModel, has no prefix.
        name = name.removeprefix("bert.")
        # Files from before 2019 call them as TensorFlow does.
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if name in tensors:
            raise ValueError(f"{path}: two tensors for {name!r}")
        tensors[name] = tensor.detach()
    return tensors


def save_model(model: BertForQuestionAnswering, folder: str | Path,
               tokenizer_from: str | Path | None = None, **extra) -> None:
    """Write a model folder: config.json, model.safetensors with masks folded in, tokenizer files.

    tokenizer_from: a model folder to copy the tokenizer files from; None for none.
    extra: more keys for config.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # 1. The weights. In HF's model the head of question answering stands beside `bert`, not in it.
    tensors = {}
    for name, tensor in hf_tensors(model).items():
        if not name.startswith("qa_outputs"):
            name = f"bert.{name}"
        tensors[name] = tensor
    write_safetensors(tensors, folder / "model.safetensors")

    # 2. The configuration.
    values = {"architectures": ["BertForQuestionAnswering"], "model_type": "bert"}
    values.update(dataclasses.asdict(model.config))
    # An ordinary BERT, from which nothing is removed, keeps an ordinary configuration.
    if model.config == dataclasses.replace(model.config, heads=None, ffn=None):
        del values["heads"]
        del values["ffn"]
    values.update(extra)
    write_json(folder / "config.json", values)

    # 3. The tokenizer, as it is: a cased one stays cased, here and in `transformers`.
    if tokenizer_from is not None:
        _copy_tokenizer(Path(tokenizer_from), folder)


def weights_sha256(folder: str | Path) -> str:
    """SHA-256 of a model folder's weights."""
    return _sha256(_weights_path(folder))


def folder_sha256(folder: str | Path) -> dict[str, str]:
    """SHA-256 of every file that is read from a model folder, by its name."""
    names = ["config.json", _weights_path(folder).name, "pruning.safetensors", *TOKENIZER_FILES]
    found = {}
    for name in names:
        path = Path(folder, name)
        if path.is_file():
            found[name] = _sha256(path)
    return found


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------- the tokenizer

# Files that say how a text becomes ids. A folder has some of them.
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")       # all of them are needed

# A key of tokenizer_config.json: its name in BertNormalizer.
NORMALIZER_OPTIONS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",       # None: as lowercase
    "tokenize_chinese_chars": "handle_chinese_chars",
}


def load_tokenizer(folder: str | Path) -> tokenizers.Tokenizer:
    """The tokenizer of a model folder: its tokenizer.json or, without one, its vocab.txt.

    Raises FileNotFoundError if the folder has neither, ValueError if it does not fit the embeddings
    or lacks a special token.
    """
    config = load_config(folder)
    options = _tokenizer_options(folder)
    path = Path(folder, "tokenizer.json")
    if path.is_file():
        tokenizer = _read_tokenizer_json(path)
    else:
        path = Path(folder, "vocab.txt")
        tokenizer = _read_vocab(path, config.do_lower_case)
    # As in `transformers`, tokenizer_config.json has the last word where it says something.
    normalizer = tokenizer.normalizer
    if isinstance(normalizer, BertNormalizer):
        for key, attribute in NORMALIZER_OPTIONS.items():
            if key in options:
                setattr(normalizer, attribute, options[key])
        tokenizer.normalizer = normalizer

    ids = tokenizer.get_vocab()
    for word in SPECIAL_TOKENS:
        if word not in ids:
            raise ValueError(f"{path}: {word} is missing")
    # By the largest id: embeddings without a word are common.
    if max(ids.values()) >= config.vocab_size:
        raise ValueError(f"{path}: {len(ids)} words for {config.vocab_size} embeddings")
    # Words added in other files: tokenizer.json has them too, vocab.txt does not know their ids.
    for word in _added_tokens(folder, options):
        if word not in ids:
            raise ValueError(f"{path}: {word!r} is missing, an added token by "
                             f"tokenizer_config.json or added_tokens.json")
    return tokenizer


def _tokenizer_options(folder: str | Path) -> dict:
    """What tokenizer_config.json says, if there is one."""
    path = Path(folder, "tokenizer_config.json")
    if not path.is_file():
        return {}
    options = read_json(path)
    for key in NORMALIZER_OPTIONS:
        value = options.get(key, True)
        if type(value) is not bool and not (key == "strip_accents" and value is None):
            raise ValueError(f"{path}: {key} is {value!r}, not true or false")
    return options


def _read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a tokenizer.json, without its settings for truncation and padding."""
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:      # of whatever kind: they come from Rust
        raise ValueError(f"{path}: not a tokenizer: {error!r}") from None
    # Cutting into windows and filling up to a batch is done elsewhere.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_vocab(path: Path, lowercase: bool) -> tokenizers.Tokenizer:
    """BERT's own tokenizer, of word pieces: each line is a word, and its number is the id."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        text = path.read_text("utf-8-sig")      # with or without a byte order mark
    except ValueError as error:
        raise ValueError(f"{path}: not a vocabulary: {error}") from None
    # By "\n" alone, since splitlines() takes some words for ends of lines.
    words = text.split("\n")
    # Blank lines at the end are no words.
    while words and not words[-1].strip():
        words.pop()
    ids = {word: n for n, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    # These are not taken apart where they stand in a text.
    for word in (*SPECIAL_TOKENS, "[MASK]"):
        if word in ids:
            tokenizer.add_special_tokens([word])
    return tokenizer


def _added_tokens(folder: str | Path, options: dict) -> list[str]:
    """The words that tokenizer_config.json and added_tokens.json add to the vocabulary."""
    added = []
    path = Path(folder, "added_tokens.json")
    if path.is_file():
        added.extend(read_json(path))
    try:
        for token in options.get("added_tokens_decoder", {}).values():
            added.append(str(token["content"]))
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{folder}: added_tokens_decoder of tokenizer_config.json is not "
                         f"{{id: {{content: word}}}}") from None
    return added


def same_tokenizer(folder: str | Path, other: str | Path) -> bool:
    """Whether two model folders make the same ids of every text, in whatever files they say it."""
    ours = json.loads(load_tokenizer(folder).to_str())
    theirs = json.loads(load_tokenizer(other).to_str())
    # What else is in a tokenizer.json does not act on these ids.
    for part in ("added_tokens", "normalizer", "pre_tokenizer", "model"):
        if ours[part] != theirs[part]:
            return False
    return True


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer files of one folder to another, and remove those that it does not have."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            content = (source / name).read_bytes()
            with replacing(folder / name) as temporary:
                temporary.write_bytes(content)
        else:
            (folder / name).unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------- guards
# Against a config.json that says the impossible. They are no part of the model.


def _check_numbers(config: BertConfig) -> None:
    """Raise ValueError where a value is of another type than its field says, or out of range."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        # By type() and not isinstance(), for which True is an int.
        kind = type(value)
        if field.type is int and (kind is not int or value < 1):
            raise ValueError(f"config: {field.name} is {value!r}, not a whole number from 1 on")
        # So that the size of no tensor, which is a product of two of them, overflows.
        if field.type is int and value > 10 ** 9:
            raise ValueError(f"config: {field.name} is {value!r}, more than any BERT has")
        if field.type is float and (kind not in (int, float) or not 0 <= value <= 1):
            raise ValueError(f"config: {field.name} is {value!r}, not a number from 0 to 1")
        if field.type is bool and kind is not bool:
            raise ValueError(f"config: {field.name} is {value!r}, not true or false")
    # Here, since lists as long as this are made before any weights are seen.
    if config.num_hidden_layers > 100:
        raise ValueError(f"config: num_hidden_layers is {config.num_hidden_layers}, more than any "
                         f"BERT has")
    if config.type_vocab_size < 2:
        raise ValueError("config: type_vocab_size is 1: question and passage need a type each")
    if config.hidden_act not in list(ACTIVATIONS):
        raise ValueError(f"config: hidden_act is {config.hidden_act!r}, "
                         f"not one of {list(ACTIVATIONS)}")
    if config.hidden_size % config.num_attention_heads != 0:
        raise ValueError(f"config: num_attention_heads is {config.num_attention_heads}, which "
                         f"does not divide hidden_size {config.hidden_size}")


def _check_widths(name: str, widths: list, layers: int, most: int) -> None:
    """Raise ValueError where `widths` are not a whole number from 0 to `most` for each layer."""
    expected = f"{layers} whole numbers from 0 to {most}, one a layer"
    if not isinstance(widths, list) or len(widths) != layers:
        raise ValueError(f"config: {name} is {widths!r}, not {expected}")
    for width in widths:
        if type(width) is not int or not 0 <= width <= most:
            raise ValueError(f"config: {name} is {widths!r}, not {expected}")
