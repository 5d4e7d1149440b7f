"""BERT for question answering, from scratch, with its own number of heads and FFN width in each layer.

The model of Devlin et al. 2019 in the configuration words of Hugging Face and, on disk, under its names:
a BERT folder from the hub opens here, and a folder written here opens in `transformers` as long as no head
or dimension was removed. Written after the paper and google-research/bert; checked against `transformers`
in tests/test_bert.py. Left out: pooler, pre-training heads, relative positions, decoding.

    B batch   T tokens   E hidden size   H heads of this layer   D head size   F FFN width of this layer
"""
import contextlib
import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "gelu_new": nn.GELU("tanh"),
               "gelu_pytorch_tanh": nn.GELU("tanh")}

# ---------------------------------------------------------------------------------- configuration

@dataclasses.dataclass
class BertConfig:
    """The keys of Hugging Face's config.json, with the values of bert-base-uncased, and two of ours.

    heads, ffn: lists of one number a layer, for a compacted model; None is the same for all layers.
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
    do_lower_case: bool = True              # of the vocabulary; in the hub's tokenizer_config.json
    heads: list[int] | None = None          # left in each layer; 0 is allowed
    ffn: list[int] | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), type(getattr(self, field.name))
            if not {int: kind is int and value > 0, float: kind in (int, float) and 0 <= value <= 1,
                    bool: kind is bool, str: value in list(ACTIVATIONS)}.get(field.type, True):
                raise ValueError(f"config: {field.name} cannot be {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"config: num_attention_heads does not divide hidden_size {self.hidden_size}")
        for key, most in (("heads", self.num_attention_heads), ("ffn", self.intermediate_size)):
            if (widths := getattr(self, key)) is None:
                setattr(self, key, widths := [most] * self.num_hidden_layers)
            if not isinstance(widths, list) or len(widths) != self.num_hidden_layers or not all(
                    type(n) is int and 0 <= n <= most for n in widths):
                raise ValueError(f"config: {key} is {widths!r}, not {self.num_hidden_layers} whole "
                                 f"numbers from 0 to {most}, one a layer")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads


# ----------------------------------------------------------------------------------------- modules

class Linear(nn.Linear):
    """nn.Linear with a bias of 0 and a weight that the model fills: torch's own way warns about empty ones."""

    def reset_parameters(self):
        nn.init.zeros_(self.bias)


class SelfAttention(nn.Module):
    """softmax(Q Kᵀ / √D) V for each head, and the projection back to E."""

    def __init__(self, config: BertConfig, heads: int):
        super().__init__()
        E, inner = config.hidden_size, heads * config.head_size
        self.heads, self.dropout = heads, config.attention_probs_dropout_prob
        self.query, self.key, self.value = Linear(E, inner), Linear(E, inner), Linear(E, inner)
        self.out = Linear(inner, E)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.heads == 0:
            return self.out.bias.expand_as(x)
        B, T, _ = x.shape
        q, k, v = (project(x).view(B, T, self.heads, -1).transpose(1, 2)    # (B, H, T, D)
                   for project in (self.query, self.key, self.value))
        # Note: a CPU's kernel gains nothing from bf16, and its gradient takes twice as long in it.
        dtype = torch.float32 if q.is_cpu and q.dtype == torch.bfloat16 else q.dtype
        with torch.autocast("cpu", enabled=False):
            x = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=mask,
                                               dropout_p=self.dropout if self.training else 0.0)
        return self.out(x.to(q.dtype).transpose(1, 2).reshape(B, T, -1))    # (B, T, E)


class FeedForward(nn.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, config: BertConfig, width: int):
        super().__init__()
        self.width, self.act = width, ACTIVATIONS[config.hidden_act]
        self.fc1, self.fc2 = Linear(config.hidden_size, width), Linear(width, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x))) if self.width else self.fc2.bias.expand_as(x)


class Layer(nn.Module):
    """Attention and feed-forward, each with dropout, residual connection and then LayerNorm."""

    def __init__(self, config: BertConfig, heads: int, width: int):
        super().__init__()
        E, eps = config.hidden_size, config.layer_norm_eps
        self.attention, self.attention_norm = SelfAttention(config, heads), nn.LayerNorm(E, eps)
        self.ffn, self.ffn_norm = FeedForward(config, width), nn.LayerNorm(E, eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, mask)))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class Bert(nn.Module):
    """Embeddings and encoder: token ids (B, T) to hidden states (B, T, E)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        E = config.hidden_size
        self.word = nn.Embedding(config.vocab_size, E)
        self.position = nn.Embedding(config.max_position_embeddings, E)
        self.token_type = nn.Embedding(config.type_vocab_size, E)
        self.norm, self.dropout = nn.LayerNorm(E, config.layer_norm_eps), nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(Layer(config, *widths) for widths in zip(config.heads, config.ffn))

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.word(input_ids) + self.position(positions) + self.token_type(token_type_ids)
        x = self.dropout(self.norm(x))
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]  # (B, 1, 1, T)
        for layer in self.layers:
            x = layer(x, mask)
        return x


class BertForQuestionAnswering(nn.Module):
    """BERT with a linear layer that scores each token as the start and as the end of the answer.

    forward: input_ids, token_type_ids, attention_mask, each (B, T) (1 for real tokens; None for no
    padding) → start_logits, end_logits, each (B, T). Logits at padding mean nothing.
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.bert = Bert(config)
        self.qa_outputs = Linear(config.hidden_size, 2)
        for module in self.modules():  # as BERT does, in one place
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.initializer_range)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None = None,
                attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.qa_outputs(self.bert(input_ids, token_type_ids, attention_mask)).unbind(-1)


# ------------------------------------------------------------------------------------ safetensors
# The format: 8 bytes N (little endian), N bytes of JSON {name: {dtype, shape, data_offsets}}, data.

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file. Every length and offset is checked before it is used (ValueError)."""
    size, tensors, expected = os.path.getsize(path), {}, 0
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        try:
            if start > size:
                raise ValueError("it is cut off")
            header = json.loads(file.read(start - 8))
            header.pop("__metadata__", None)
            rows = sorted((tuple(row["data_offsets"]), name, DTYPES[row["dtype"]], row["shape"])
                          for name, row in header.items())
            for (begin, end), name, dtype, shape in rows:
                if not all(type(n) is int and n >= 0 for n in [begin, end, *shape]) or end > size - start or (
                        begin, end) != (expected, expected + math.prod(shape) * dtype.itemsize):
                    raise ValueError(f"{name} does not fill the bytes from {expected} on")
                tensors[name], expected = torch.empty(shape, dtype=dtype, device="cpu"), end
                file.readinto(tensors[name].view(-1).view(torch.uint8).numpy())
            if expected != size - start:
                raise ValueError(f"{size - start} bytes of data where the header promises {expected}")
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path}: not a sound safetensors file: {error!r}") from None
    return tensors


def write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors under a temporary name, then rename: a file of that name is always whole."""
    names, header, end = {dtype: name for name, dtype in DTYPES.items()}, {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        begin, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            file.write(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


@contextlib.contextmanager
def replacing(path: Path):
    """with replacing(path) as temporary: write to `temporary`, which then takes the place of `path`."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------ on disk, as HF

HF_NAMES = {  # a module here → its name there (after "bert."); {} is the number of the layer
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
IGNORED = ("embeddings.position_ids", "pooler.", "cls.")  # parts of other BERTs that we do not have


def hf_tensors(model: BertForQuestionAnswering) -> dict[str, Tensor]:
    """The model's tensors by HF name (without "bert."). A masked weight is read as W ⊙ M(S)."""
    tensors = {}
    for ours, theirs in HF_NAMES.items():
        for i in range(model.config.num_hidden_layers) if "{}" in ours else [0]:
            module = model.get_submodule(ours.format(i))
            for leaf in ("weight", "bias") if hasattr(module, "bias") else ("weight",):
                tensors[f"{theirs.format(i)}.{leaf}"] = getattr(module, leaf)
    return tensors


def load_config(folder: str | Path) -> BertConfig:
    """The config.json of a model folder; FileNotFoundError if it has none, ValueError if it is no BERT's."""
    path, tokenizer = Path(folder, "config.json"), Path(folder, "tokenizer_config.json")
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no model folder (it has no config.json)")
    values = read_json(path)
    if tokenizer.is_file():
        values.setdefault("do_lower_case", read_json(tokenizer).get("do_lower_case", True))
    if values.get("position_embedding_type", "absolute") != "absolute" or values.get("model_type", "bert") != "bert":
        raise ValueError(f"{path}: not a BERT with absolute positions")
    if missing := {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"} - set(values):
        raise ValueError(f"{path}: {', '.join(sorted(missing))} missing")
    return BertConfig(**{f.name: values[f.name] for f in dataclasses.fields(BertConfig) if f.name in values})


def load_tokenizer(folder: str | Path) -> tokenizers.BertWordPieceTokenizer:
    """The vocab.txt of a model folder as a tokenizer; ValueError if it does not fit the embeddings."""
    path, config = Path(folder, "vocab.txt"), load_config(folder)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        tokenizer = tokenizers.BertWordPieceTokenizer(str(path), lowercase=config.do_lower_case)
    except Exception as error:  # of whatever kind: they come from Rust
        raise ValueError(f"{path}: not a vocabulary of BERT's: {error}") from None
    words = tokenizer.get_vocab()
    if max(words.values()) >= config.vocab_size or not {"[PAD]", "[UNK]"} <= set(words):
        raise ValueError(f"{path}: {len(words)} words for {config.vocab_size} embeddings, or no [PAD], [UNK]")
    return tokenizer


def load_model(folder: str | Path, fresh_head: bool = False) -> BertForQuestionAnswering:
    """Read a model folder: config.json with model.safetensors, or with pytorch_model.bin.

    Strict: a tensor that is missing, unknown or of another shape raises ValueError with its name.
    fresh_head: where training starts, the two tensors of the QA head may be missing and stay as
    initialised; what was loaded, ignored and left fresh is printed. FileNotFoundError for no model.
    """
    folder, model = Path(folder), BertForQuestionAnswering(load_config(folder))
    if (path := folder / "model.safetensors").is_file():
        found = read_safetensors(path)
    elif (path := folder / "pytorch_model.bin").is_file():
        try:
            found = {f"{name}": t.detach() for name, t in torch.load(path, "cpu", weights_only=True).items()}
        except Exception as error:  # of whatever kind: pickle, zip and struct have their own
            raise ValueError(f"{path}: not a file of tensors alone ({type(error).__name__})") from None
    else:
        raise FileNotFoundError(f"{folder}: no model.safetensors and no pytorch_model.bin")
    found = {name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
             .replace("LayerNorm.beta", "LayerNorm.bias"): tensor for name, tensor in found.items()}
    ignored = sorted(name for name in found if name.startswith(IGNORED))
    wanted = hf_tensors(model)
    fresh, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted) - set(ignored))
    missing = [name for name in fresh if not (fresh_head and name.startswith("qa_outputs."))]
    for names, problem in ((missing, "missing"), (unknown, "not known here")):
        if names:
            raise ValueError(f"{path}: {', '.join(names[:4])} {problem} ({len(names)} in all)")
    for name in set(wanted) - set(fresh):
        if wanted[name].shape != found[name].shape:
            raise ValueError(f"{path}: {name} is {[*found[name].shape]}, by config.json {[*wanted[name].shape]}")
        wanted[name].data.copy_(found[name])
    if fresh or ignored:
        print(f"{path}: {len(wanted) - len(fresh)} tensors loaded; fresh: {', '.join(fresh) or 'none'}; "
              f"ignored: {', '.join(ignored) or 'none'}")
    return model


def weights_sha256(folder: str | Path) -> str:
    """Of the weights in a model folder."""
    path = Path(folder, "model.safetensors")
    with open(path if path.exists() else path.with_name("pytorch_model.bin"), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, *needs: str) -> dict:
    try:
        values = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:  # covers bytes that are no text
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(values, dict) or not set(needs) <= set(values):
        raise ValueError(f"{path}: a JSON object with {', '.join(needs) or 'keys'} is expected")
    return values


def write_json(path: Path, values) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n")


def save_model(model: BertForQuestionAnswering, folder: str | Path, vocab: str | Path | None = None, **extra) -> None:
    """Write config.json (with the extra keys), model.safetensors with masks folded in, and a copy of vocab."""
    (folder := Path(folder)).mkdir(parents=True, exist_ok=True)
    values = {"architectures": ["BertForQuestionAnswering"], "model_type": "bert", **dataclasses.asdict(model.config)}
    if model.config == dataclasses.replace(model.config, heads=None, ffn=None):
        del values["heads"], values["ffn"]  # an ordinary BERT: keep its configuration one
    write_safetensors({name if name.startswith("qa_outputs") else f"bert.{name}": tensor
                       for name, tensor in hf_tensors(model).items()}, folder / "model.safetensors")
    write_json(folder / "config.json", values | extra)
    if vocab:
        with replacing(folder / "vocab.txt") as temporary:
            temporary.write_bytes(Path(vocab).read_bytes())
