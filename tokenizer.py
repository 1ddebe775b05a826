"""CLIP's tokenizer: byte-pair encoding of lower-case words. The model knows text by its numbers.

A vocabulary is a folder with vocab.json, {token: id}, and merges.txt, a pair of tokens a line, the
first merged first. Stable Diffusion 2.1's has 49408 tokens; the tiny model's is trained here.
"""
import json
from pathlib import Path

import tokenizers
import torch
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

from layouts import read_json, write

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def byte_pair_encoding(*vocabulary):
    """CLIP's pipeline: NFC, one space for many, lower case; words; bytes; merges inside a word."""
    bpe = models.BPE(*vocabulary, unk_token=EOS, end_of_word_suffix="</w>")
    encoding = tokenizers.Tokenizer(bpe)
    encoding.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    encoding.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False)])
    return encoding


def read_vocabulary(folder):
    """vocab.json and merges.txt, or both in a tokenizer.json -> {token: id}, [(a, b), ...]"""
    if (folder / "tokenizer.json").is_file():
        bpe = read_json(folder / "tokenizer.json")["model"]
        vocab, merges = bpe["vocab"], bpe["merges"]
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocab = read_json(folder / "vocab.json")
        merges = (folder / "merges.txt").read_text("utf-8").split("\n")
        merges = [pair for pair in merges if pair and not pair.startswith("#version")]
    else:
        raise FileNotFoundError(f"no tokenizer: put CLIP's vocab.json and merges.txt into {folder}")
    return vocab, [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]


def write_vocabulary(folder, vocab, merges):
    write(Path(folder) / "vocab.json", json.dumps(vocab))
    write(Path(folder) / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, merges), ""]))


class Tokenizer:
    """Prompts -> rows of `length` ids: <start> words <end>, then zeros, as OpenCLIP pads."""

    def __init__(self, folder, length=77):
        self.vocab, self.merges = read_vocabulary(Path(folder))
        self.length, self.encoding = length, byte_pair_encoding(self.vocab, self.merges)
        self.encoding.add_special_tokens([BOS, EOS])
        self.ends = self.vocab[BOS], self.vocab[EOS]

    def __call__(self, prompts):
        ids = torch.zeros(len(prompts), self.length, dtype=torch.int64)
        for row, prompt in zip(ids, prompts):
            words = self.encoding.encode(prompt).ids[:self.length - 2]
            row[:len(words) + 2] = torch.tensor([self.ends[0], *words, self.ends[1]])
        return ids

    def unknown_words(self, prompt):
        """The words that are not one token: for the tiny model, those it never met."""
        text = self.encoding.normalizer.normalize_str(prompt)
        pieces = self.encoding.pre_tokenizer.pre_tokenize_str(text)
        words = [text[a:b].strip() for piece, (a, b) in pieces if piece + "</w>" not in self.vocab]
        return list(dict.fromkeys(word for word in words if word.isalnum()))


def train_tokenizer(captions, folder):
    """Merge until every word of the captions is one token. The vocabulary in CLIP's order: 256
    bytes, the same bytes ending a word, a token for each merge, <start>, <end>."""
    encoding = byte_pair_encoding()
    encoding.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=49408, min_frequency=0, end_of_word_suffix="</w>", show_progress=False))
    merges = [tuple(pair) for pair in json.loads(encoding.to_str())["model"]["merges"]]
    # GPT-2's alphabet: these bytes are their own letters, the other 68 get letters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(68)]
    tokens = letters + [letter + "</w>" for letter in letters] + [a + b for a, b in merges]
    tokens = enumerate(dict.fromkeys([*tokens, BOS, EOS]))
    write_vocabulary(folder, {token: i for i, token in tokens}, merges)
    return Tokenizer(folder)
