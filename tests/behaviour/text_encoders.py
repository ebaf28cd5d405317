"""Small random text encoders of three families, as transformers saves them."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = ("a", "big", "red", "green", "blue", "white", "cat", "square", ",", "style", "google")
WIDTH = 16


def bert(folder: Path, seed: int = 0) -> Path:
    """A BERT of 32 tokens; it marks a text's beginning and end."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)))
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    config = BertConfig(
        vocab_size=5 + len(WORDS), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, initializer_range=0.5,
    )  # fmt: skip
    return _saved(BertModel, config, folder, seed)


def t5(folder: Path, seed: int = 0) -> Path:
    """An encoder and decoder, of which a text needs the first; a text has an end."""
    from transformers import T5Config, T5Model

    _word_level(folder, end="</s>")
    config = T5Config(vocab_size=5 + len(WORDS), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return _saved(T5Model, config, folder, seed)


def qwen(folder: Path, seed: int = 0) -> Path:
    """A decoder: each token sees those before it, it pads on the left, and an empty text has no token."""
    from transformers import Qwen3Config, Qwen3Model

    _word_level(folder, end="")
    config = Qwen3Config(
        vocab_size=5 + len(WORDS), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    return _saved(Qwen3Model, config, folder, seed)


def _word_level(folder: Path, end: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: k for k, word in enumerate(("<pad>", "<unk>", "</s>", "<x>", "<y>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=f"$A {end}", special_tokens=[(end, vocabulary[end])]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=64,
        padding_side="right" if end else "left",
    )  # fmt: skip
    fast.save_pretrained(folder)


def _saved(kind: type, config: object, folder: Path, seed: int) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind(config).save_pretrained(folder)  # type: ignore[call-arg]
    return folder
