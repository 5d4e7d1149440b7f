"""BERT for question answering, from scratch; each layer has its own number of heads and FFN width.

The model of
    Devlin, Chang, Lee, Toutanova: BERT, NAACL 2019; reference code: google-research/bert,
with the settings and the tensor names of Hugging Face: a BERT folder from the hub opens here, and a
folder written here opens in `transformers` as long as no head or dimension was removed. Both
directions are tested against `transformers` in tests/test_bert.py.
Left out: the pooler, the heads of pre-training, relative positions, decoding.

Shapes: B batch, T tokens, E hidden size, H heads of this layer, D head size (the same everywhere),
F width of this layer's feed-forward part.
"""
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer
from tokenizers.normalizers import BertNormalizer
from torch import Tensor, nn
from torch.nn import functional

ACTIVATIONS = {     # by all their names in HF
    "gelu": functional.gelu, "gelu_python": functional.gelu,
    "gelu_new": nn.GELU("tanh"), "gelu_pytorch_tanh": nn.GELU("tanh"),
    "relu": functional.relu,
    "silu": functional.silu, "swish": functional.silu,
}


@dataclasses.dataclass
class BertConfig:
    """Hugging Face's config.json, with the defaults of bert-base-uncased, and two keys of our own.

    heads, ffn: how many heads and FFN dimensions each layer has left, 0 allowed. None: all of them.
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
    heads: list[int] | None = None
    ffn: list[int] | None = None

    def __post_init__(self):
        if self.heads is None:
            self.heads = [self.num_attention_heads] * self.num_hidden_layers
        if self.ffn is None:
            self.ffn = [self.intermediate_size] * self.num_hidden_layers
        if len(self.heads) != self.num_hidden_layers or len(self.ffn) != self.num_hidden_layers:
            raise ValueError("heads and ffn must have num_hidden_layers numbers each")
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError("hidden_size must be a multiple of num_attention_heads")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads


class Linear(nn.Linear):
    """nn.Linear without its default initialisation, which warns about weights without elements."""

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
        # Note: while a model is pruned, the weight that self.query(x) reads is W ⊙ M(S). It is a
        # torch parametrization: reading it calls BlockMask.forward() of blockprune.py. The same
        # holds for key, value, out, fc1 and fc2.
        B, T, _ = x.shape
        q = self.query(x).view(B, T, self.heads, -1).transpose(1, 2)        # (B, H, T, D)
        k = self.key(x).view(B, T, self.heads, -1).transpose(1, 2)
        v = self.value(x).view(B, T, self.heads, -1).transpose(1, 2)
        # As in BERT, dropout acts on the attention weights.
        dropout = self.dropout if self.training else 0.0
        x = scaled_dot_product_attention(q, k, v, attention_mask, dropout)
        x = x.transpose(1, 2).flatten(2)                                    # (B, T, H · D)
        return self.out(x)                                                  # (B, T, E)


def scaled_dot_product_attention(q, k, v, attention_mask, dropout: float) -> Tensor:
    """torch's function of that name, but on a CPU never in bf16.

    There bf16 gains nothing, and its gradient takes twice as long.
    """
    dtype = q.dtype
    if q.is_cpu and dtype == torch.bfloat16:
        q, k, v = q.float(), k.float(), v.float()
    with torch.autocast("cpu", enabled=False):
        x = functional.scaled_dot_product_attention(q, k, v, attention_mask, dropout)
    return x.to(dtype)                                                      # (B, H, T, D)


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
        self.attention = SelfAttention(config, heads)
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.ffn = FeedForward(config, width)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
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
        # True where attention may go; broadcast over heads and queries.
        if attention_mask is not None:
            attention_mask = attention_mask.bool()[:, None, None, :]    # (B, 1, 1, T)
        for layer in self.layers:
            x = layer(x, attention_mask)
        return x                                                    # (B, T, E)


class BertForQuestionAnswering(nn.Module):
    """BERT with a linear layer that scores each token as the start and as the end of the answer."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.bert = Bert(config)
        self.qa_outputs = Linear(config.hidden_size, 2)
        # Weights are drawn as in Hugging Face's BERT, in the order of the modules; biases are 0.
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


# ============== A reader of the paper may stop here. What follows are files on disk. ==============


@contextlib.contextmanager
def reading(path: str | Path):
    """What goes wrong inside becomes ValueError("PATH: …"), in one line."""
    try:
        yield
    # The system names the file itself, and memory that runs out is not the file's fault.
    except (OSError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        # str() of a KeyError is the key alone, and torch's messages have many lines.
        reason = str(error) if isinstance(error, ValueError) else f"{error!r:.200}"
        raise ValueError(f"{path}: {reason}") from error


@contextlib.contextmanager
def replacing(path: str | Path):
    """Yields a temporary path. What is written to it then replaces `path`, all of it or nothing."""
    temporary = Path(f"{path}.tmp")
    yield temporary
    os.replace(temporary, path)


def read_json(path: str | Path) -> dict:
    with reading(path):
        return json.loads(Path(path).read_bytes())


def write_json(path: str | Path, values) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------- safetensors
# The format: 8 bytes N (little endian), N bytes of JSON, the data of all tensors.
# The JSON is {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}, bytes of the data.

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
          "BF16": torch.bfloat16, "I64": torch.int64}


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file, as slices of one buffer: the header cannot ask for more memory."""
    tensors = {}
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        data_size = os.path.getsize(path) - 8 - header_size
        if data_size < 0:
            raise ValueError("the file is cut off")
        header = json.loads(file.read(header_size))
        header.pop("__metadata__", None)
        data = bytearray(data_size)
        file.readinto(data)
        for name, row in header.items():
            dtype = DTYPES[row["dtype"]]
            begin, end = row["data_offsets"]
            count = (end - begin) // dtype.itemsize
            # frombuffer() makes no empty tensor.
            flat = torch.empty(0, dtype=dtype, device="cpu")
            if count > 0:
                flat = torch.frombuffer(data, dtype=dtype, count=count, offset=begin)
            tensors[name] = flat.view(row["shape"])
    return tensors


def write_safetensors(tensors: dict[str, Tensor], path: str | Path) -> None:
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
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            flat = tensor.detach().cpu().contiguous().view(-1)
            file.write(flat.view(torch.uint8).numpy())


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

# Keys of HF's config.json that change what a BERT computes, and the one value that is built here.
ONLY = {"model_type": "bert", "position_embedding_type": "absolute", "is_decoder": False,
        "add_cross_attention": False, "pruned_heads": {}}


def hf_tensors(model: BertForQuestionAnswering) -> dict[str, Tensor]:
    """The model's tensors by HF name, without "bert.". A masked weight is read as W ⊙ M(S)."""
    tensors = {}
    for ours, theirs in HF_NAMES.items():
        # A row of the table is one module, or one in each layer.
        layers = range(model.config.num_hidden_layers) if "{}" in ours else [None]
        for layer in layers:
            module = model.get_submodule(ours.format(layer))
            name = theirs.format(layer)
            tensors[f"{name}.weight"] = module.weight
            if hasattr(module, "bias"):     # an embedding has none
                tensors[f"{name}.bias"] = module.bias
    return tensors


def load_config(folder: str | Path) -> BertConfig:
    """The config.json of a model folder."""
    path = Path(folder, "config.json")
    values = read_json(path)
    with reading(path):
        for key, only in ONLY.items():
            if values.get(key) not in (None, only):
                raise ValueError(f"{key} is {values[key]!r}, and only {only!r} is built here")
        # What is not given has BERT's own value.
        known = [field.name for field in dataclasses.fields(BertConfig) if field.name in values]
        return BertConfig(**{key: values[key] for key in known})


def load_model(folder: str | Path, fresh_head: bool = False) -> BertForQuestionAnswering:
    """The model of a folder with config.json and model.safetensors or pytorch_model.bin.

    fresh_head: where training starts, the two tensors of the QA head may be missing. They stay as
        initialised, and what was loaded, ignored and left fresh is printed.
    """
    path = _weights_path(folder)
    model = BertForQuestionAnswering(load_config(folder))
    tensors = hf_tensors(model)
    with reading(path):
        if path.suffix == ".safetensors":
            contents = read_safetensors(path)
        else:
            contents = torch.load(path, "cpu", weights_only=True)       # runs no code of the file
        saved = {}
        for name, tensor in contents.items():
            # BertModel saves without the prefix, and files from before 2019 have TensorFlow names.
            name = name.removeprefix("bert.")
            name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
            name = name.replace("LayerNorm.beta", "LayerNorm.bias")
            saved[name] = tensor

        # The names must be the same, but for those with a reason.
        missing = sorted(tensors.keys() - saved.keys())
        unknown = sorted(saved.keys() - tensors.keys())
        fresh = [name for name in missing if fresh_head and name.startswith("qa_outputs.")]
        ignored = [name for name in unknown if name.startswith(IGNORED)]
        if missing != fresh or unknown != ignored:
            raise ValueError(f"missing {missing[:4]}, not known here {unknown[:4]}")
        # The shapes must be the same: copy_() would repeat a tensor that is too small.
        for name in sorted(tensors.keys() & saved.keys()):
            if saved[name].shape != tensors[name].shape:
                raise ValueError(f"{name} is {list(saved[name].shape)}, "
                                 f"by config.json {list(tensors[name].shape)}")
            tensors[name].data.copy_(saved[name])       # into the model's own type and memory
    if fresh or ignored:
        print(f"{path}: {len(tensors) - len(fresh)} tensors loaded, fresh: {fresh}, "
              f"ignored: {ignored}")
    return model


def save_model(model: BertForQuestionAnswering, folder: str | Path,
               tokenizer_from: str | Path | None = None, **extra) -> None:
    """Write a model folder: config.json, model.safetensors with masks folded in, tokenizer files.

    tokenizer_from: a model folder to copy the tokenizer from; None for none.
    extra: more keys for config.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # 1. The weights. In HF's model the head stands beside `bert`, not in it.
    tensors = {}
    for name, tensor in hf_tensors(model).items():
        if not name.startswith("qa_outputs"):
            name = f"bert.{name}"
        tensors[name] = tensor
    write_safetensors(tensors, folder / "model.safetensors")
    # 2. The configuration.
    values = {"architectures": ["BertForQuestionAnswering"], "model_type": "bert"}
    values.update(dataclasses.asdict(model.config))
    values.update(extra)
    # 3. The tokenizer. Some folders say the case in config.json.
    if tokenizer_from is not None:
        source = read_json(Path(tokenizer_from, "config.json"))
        if "do_lower_case" in source:
            values["do_lower_case"] = source["do_lower_case"]
        for name in TOKENIZER_FILES:
            path = Path(tokenizer_from, name)
            if path.is_file():
                with replacing(folder / name) as temporary:
                    shutil.copyfile(path, temporary)
    write_json(folder / "config.json", values)


def _weights_path(folder: str | Path) -> Path:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if Path(folder, name).is_file():
            return Path(folder, name)
    raise FileNotFoundError(f"{folder}: no model.safetensors and no pytorch_model.bin")


def weights_sha256(folder: str | Path) -> str:
    """SHA-256 of a model folder's weights."""
    return _sha256(_weights_path(folder))


def folder_sha256(folder: str | Path) -> str:
    """One SHA-256 for all files that are read from a model folder: their names and contents."""
    weights = _weights_path(folder).name
    total = hashlib.sha256()
    for name in ("config.json", weights, "pruning.safetensors", *TOKENIZER_FILES):
        path = Path(folder, name)
        if path.is_file():
            total.update(f"{name} {_sha256(path)}\n".encode())
    return total.hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------- the tokenizer

# Files that say how a text becomes ids. A folder has some of them.
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json")


def load_tokenizer(folder: str | Path) -> Tokenizer | BertWordPieceTokenizer:
    """The tokenizer of a model folder: its tokenizer.json or, without one, its vocab.txt."""
    config = read_json(Path(folder, "config.json"))
    options = {}
    if Path(folder, "tokenizer_config.json").is_file():
        options = read_json(Path(folder, "tokenizer_config.json"))
    path = Path(folder, "tokenizer.json")
    if not path.is_file():
        path = Path(folder, "vocab.txt")
    with reading(path):
        if path.name == "tokenizer.json":
            tokenizer = Tokenizer.from_file(str(path))
            # Cutting into windows and filling up to a batch is done elsewhere.
            tokenizer.no_truncation()
            tokenizer.no_padding()
        else:
            # Each line is a word, its number the id. Blank lines at the end and a byte order mark
            # ("sig") are no words, and splitlines() would split some words.
            words = path.read_text("utf-8-sig").rstrip().split("\n")
            ids = {word: n for n, word in enumerate(words)}
            lowercase = config.get("do_lower_case", True)
            tokenizer = BertWordPieceTokenizer(ids, lowercase=lowercase)

        # As in `transformers`, tokenizer_config.json has the last word.
        norm = tokenizer.normalizer
        if isinstance(norm, BertNormalizer):
            norm.lowercase = options.get("do_lower_case", norm.lowercase)
            norm.strip_accents = options.get("strip_accents", norm.strip_accents)
            chinese = options.get("tokenize_chinese_chars", norm.handle_chinese_chars)
            norm.handle_chinese_chars = chinese
            tokenizer.normalizer = norm
    return tokenizer


def same_tokenizer(folder: str | Path, other: str | Path) -> bool:
    """Whether two model folders make the same ids of every text, in whatever files they say it."""
    ours = json.loads(load_tokenizer(folder).to_str())
    theirs = json.loads(load_tokenizer(other).to_str())
    # What else is in a tokenizer.json does not act on these ids.
    parts = ("added_tokens", "normalizer", "pre_tokenizer", "model")
    return all(ours[part] == theirs[part] for part in parts)
