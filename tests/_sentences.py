"""Small models and pairs of sentences, made on the spot: nothing is downloaded."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from slr_plugin.adapters.sentence_transformers import DIRECTIONS, SelfLabelingRankingLoss

WORDS = ["the", "a", "red", "green", "old", "cat", "dog", "tree", "house", "sees", "eats", "likes", "finds", "loses"]
DIM = 8


def tokenizer() -> Tokenizer:
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    result = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    result.pre_tokenizer = pre_tokenizers.Whitespace()
    return result


def static_model(dtype: torch.dtype = torch.float32) -> SentenceTransformer:
    torch.manual_seed(0)
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer(), embedding_dim=DIM)], device="cpu")
    return model.to(dtype)


def small_transformer(folder: Path, dropout: float = 0.0) -> SentenceTransformer:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=DIM,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    BertModel(config).save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), pad_token="[PAD]", unk_token="[UNK]")
    wrapped.save_pretrained(folder)
    transformer = Transformer(str(folder))
    return SentenceTransformer(modules=[transformer, Pooling(DIM)], device="cpu")


def sentences(columns: int, size: int, seed: int = 0) -> list[list[str]]:
    """``columns`` lists of ``size`` sentences."""
    draw = random.Random(seed)
    return [[" ".join(draw.choices(WORDS, k=draw.randint(2, 6))) for _ in range(size)] for _ in range(columns)]


def features(model: SentenceTransformer, columns: int, size: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """A batch as the trainer gives it to a loss."""
    return [model.preprocess(column) for column in sentences(columns, size, seed)]


def dataset(size: int, seed: int = 0) -> Dataset:
    anchors, positives = sentences(2, size, seed)
    return Dataset.from_dict(
        {"anchor": anchors, "positive": positives, "label": [number // 2 for number in range(size)]}
    )


# ------------------------------------------------------------------------------------------------ in spawned processes


def rank_sentences(queue: int, rank: int | None) -> dict[str, object]:
    """Three steps on the batch of two processes (rank None) or on one's part: loss, gradient and queue of the last."""
    torch.manual_seed(0)
    model = static_model(torch.float64)
    loss = SelfLabelingRankingLoss(
        model, confidence=2.0, memory_bank_size=queue, gather_across_devices=True, directions=DIRECTIONS
    )
    if rank is not None:
        loss.model = DistributedDataParallel(model)
    columns = sentences(4, 12)
    part = slice(None) if rank is None else slice(rank * 6, (rank + 1) * 6)
    for _ in range(3):
        model.zero_grad()
        value = loss([model.preprocess(column[part]) for column in columns], None)
        value.backward()
    gradient = model[0].embedding.weight.grad
    return {"loss": value.detach(), "gradient": gradient, "queue": loss.criteria["doc_to_query"].memory_bank.bank}


def rank_in_processes(rank: int, folder: Path, queue: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.save(rank_sentences(queue, rank), folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
