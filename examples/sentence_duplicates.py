"""Several queries of one document in a batch: which ranking loss of sentence-transformers copes with them best?

    apt-get install diatheke sword-text-kjv sword-text-web      # the text: 31,000 verses in two translations
    pip install "slr-plugin[sentence-transformers]"
    python examples/sentence_duplicates.py --methods mnrl refined-1 --shares 0 50 --seeds 0 1 2 --output runs.jsonl

A query is a part of a verse in the King James Version, its document the verse in the World English Bible. ``--shares``
is the share of each batch, in per cent, that stands in groups of four queries with one document; ``--near`` drops a
tenth of the words of every document in such a group, differently each time, so that no two are equal. The model is a
StaticEmbedding trained from scratch. It is measured by retrieval of the test verses, or with ``--validate`` of others,
among all documents: MRR and nDCG@10 in per cent, one line of JSON per run.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler
from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss, MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sentence_transformers.util import cos_sim
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from slr_plugin.adapters.sentence_transformers import SelfLabelingRankingLoss

BATCH, GROUP, SCALE, HELD_OUT = 256, 4, 20.0, 2000
Pair = tuple[str, str, int]  # query, document, number of the verse


def verses() -> list[tuple[str, str]]:
    """Pairs (King James, World English), of equal documents the first."""
    texts = []
    for module in ("engKJV2006eb", "engWEB2015eb"):
        command = ["diatheke", "-b", module, "-f", "plain", "-k", "Gen-Rev"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.findall(r"^ *((?:I+ )?[A-Z][A-Za-z ]+ \d+:\d+): (.*\S)", printed, re.MULTILINE)
        texts.append({name: text.removeprefix("¶").strip() for name, text in found})
    kjv, web = texts
    pairs = {
        " ".join(re.findall(r"\w+", web[name].lower())): (kjv[name], web[name]) for name in reversed(kjv) if name in web
    }
    return sorted(pairs.values())


def part(text: str, draw: random.Random) -> str:
    """A third of the words of a text that follow each other, at least 4."""
    words = text.split()
    length = max(4, len(words) // 3)
    start = draw.randint(0, max(0, len(words) - length))
    return " ".join(words[start : start + length])


def drop_words(text: str, draw: random.Random) -> str:
    """The text without a tenth of its words."""
    return " ".join(word for word in text.split() if draw.random() > 0.1)


def epoch(train: list[tuple[str, str]], share: float, near: bool, draw: random.Random) -> list[list[Pair]]:
    """Batches in which a share of the pairs stands in groups with one document."""
    order = draw.sample(range(len(train)), len(train))
    groups = round(share * BATCH / GROUP)
    batches = []
    while len(order) >= BATCH:
        repeated = [order.pop() for _ in range(groups)]
        single = [order.pop() for _ in range(BATCH - GROUP * groups)]
        batch = []
        for number in [*single, *repeated * GROUP]:
            query, document = train[number]
            copy = drop_words(document, draw) if near and len(batch) >= len(single) else document
            batch.append((part(query, draw), copy, number))
        batches.append(batch)
    return batches


def without_duplicates(batches: list[list[Pair]], seed: int) -> list[list[Pair]]:
    """The same pairs in the batches of sentence-transformers' NO_DUPLICATES."""
    pairs = [pair for batch in batches for pair in batch]
    columns = Dataset.from_dict({"query": [pair[0] for pair in pairs], "document": [pair[1] for pair in pairs]})
    sampler = NoDuplicatesBatchSampler(columns, BATCH, drop_last=True, generator=torch.Generator(), seed=seed)
    return [[pairs[number] for number in batch] for batch in sampler]


@functools.cache
def build_tokenizer(texts: tuple[str, ...]) -> Tokenizer:
    """Train a tokenizer of 8,000 tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]"]
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build_model(tokenizer: Tokenizer, seed: int) -> SentenceTransformer:
    """Fresh embeddings of 128 dimensions."""
    torch.manual_seed(seed)
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=128)], device="cpu")
    nn.init.normal_(model[0].embedding.weight, std=0.1)
    return model


class Masked(nn.Module):
    """MultipleNegativesRankingLoss less the documents that are, or may be, the anchor's own.

    With ``labels`` these are the documents of the same number (an exact mask, told the truth). Else a document counts
    less the more it looks like the own one: by ``1 - p_k / p_own``, p the refinery's estimator at ``sharpening``; or
    with ``threshold`` by 0 where their cosine is above it.
    """

    def __init__(
        self, model: nn.Module, exact: bool = False, sharpening: float = 1.0, threshold: float | None = None
    ) -> None:
        super().__init__()
        self.model, self.exact, self.sharpening, self.threshold = model, exact, sharpening, threshold

    def forward(self, features: list[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The loss of a batch."""
        queries, documents = (F.normalize(self.model(column)["sentence_embedding"], dim=1) for column in features)
        logits = SCALE * queries @ documents.T
        own = torch.eye(len(logits), dtype=torch.bool)
        with torch.no_grad():
            if self.exact:
                kept = (labels[:, None] != labels).float()
            else:
                cosine = (documents @ documents.T).clamp(max=1.0)
                if self.threshold is None:
                    kept = -torch.expm1((cosine - 1) * SCALE / self.sharpening)
                else:
                    kept = (cosine <= self.threshold).float()
            kept = kept.masked_fill(own, 1.0).log()
        return F.cross_entropy(logits + kept, torch.arange(len(logits)))


def build_loss(method: str, model: SentenceTransformer) -> nn.Module:
    """The loss that a name such as ``refined-MU-SHARPENING-LAMBDA`` stands for."""
    name, *numbers = method.split("-")
    values = [float(number) for number in numbers]
    if name in ("mnrl", "sampler"):
        return MultipleNegativesRankingLoss(model, SCALE)
    if name in ("positive", "ignored"):
        return SelfLabelingRankingLoss(model, SCALE, confidence=0.0, same_group=name)
    if name == "exact":
        return Masked(model, exact=True)
    if name == "soft":
        return Masked(model, sharpening=values[0])
    if name == "hard":
        return Masked(model, threshold=values[0])
    if name in ("gist", "gist0"):  # gist0: without anchors against anchors and documents against documents
        contrast = {"contrast_anchors": name == "gist", "contrast_positives": name == "gist"}
        model[0].tokenizer = PreTrainedTokenizerFast(tokenizer_object=model[0].tokenizer)  # which it insists on
        loss = GISTEmbedLoss(model, model, 1 / SCALE, margin=values[0], **contrast)
        loss.sim_matrix = cos_sim  # the same numbers without its (256, 256, 128) products
        return loss
    confidence, sharpening, refined_weight = values
    return SelfLabelingRankingLoss(
        model, SCALE, confidence=confidence, sharpening=sharpening, refined_weight=refined_weight
    )


@functools.cache
def word_ids(tokenizer: Tokenizer, word: str) -> list[int]:
    """The tokens of a word: every word is tokenized once."""
    return tokenizer.encode(word).ids


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> dict[str, Tensor]:
    """The features of texts, as StaticEmbedding's ``preprocess`` gives them."""
    tokens = [[token for word in text.split() for token in word_ids(tokenizer, word)] for text in texts]
    offsets = torch.tensor([0, *map(len, tokens[:-1])]).cumsum(0)
    return {"input_ids": torch.tensor([token for text in tokens for token in text]), "offsets": offsets}


@torch.no_grad()
def retrieval(
    model: SentenceTransformer, features: Callable[..., dict[str, Tensor]], queries: list[str], documents: list[str]
) -> dict[str, float]:
    """MRR and nDCG@10, in per cent; the documents of the queries stand first."""
    rows, keys = (F.normalize(model(features(texts))["sentence_embedding"], dim=1) for texts in (queries, documents))
    ranks = []
    for start in range(0, len(rows), 500):
        scores = rows[start : start + 500] @ keys.T
        own = scores[torch.arange(len(scores)), start + torch.arange(len(scores))]
        ranks.append((scores > own[:, None]).sum(1) + 1)
    rank = torch.cat(ranks).double()
    gain = torch.where(rank <= 10, 1 / torch.log2(1 + rank), 0.0)
    return {"mrr": 100 * (1 / rank).mean().item(), "ndcg10": 100 * gain.mean().item()}


def run(
    args: argparse.Namespace, pairs: list[tuple[str, str]], method: str, share: int, seed: int
) -> dict[str, object]:
    """Train and measure once."""
    start = time.perf_counter()
    shuffled = random.Random(0).sample(pairs, len(pairs))
    test, validation, train = shuffled[:HELD_OUT], shuffled[HELD_OUT : 2 * HELD_OUT], shuffled[2 * HELD_OUT :]
    tokenizer = build_tokenizer(tuple(text for pair in train for text in pair))
    model, features = build_model(tokenizer, seed), functools.partial(tokenize, tokenizer)
    loss = build_loss(method, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate)
    draw = random.Random(seed)
    for step, batch in zip(range(args.steps), stream(train, method, share / 100, args.near, draw), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * (1 - step / args.steps)
        columns = [features([pair[column] for pair in batch]) for column in (0, 1)]
        optimizer.zero_grad()
        loss(columns, torch.tensor([pair[2] for pair in batch])).backward()
        optimizer.step()
    held_out = validation if args.validate else test
    others = [*train, *(test if args.validate else validation)]
    queries = [part(query, random.Random(number)) for number, (query, _) in enumerate(held_out)]
    scores = retrieval(model, features, queries, [document for _, document in [*held_out, *others]])
    names = {"method": method, "share": share, "near": args.near, "seed": seed, "learning_rate": args.learning_rate}
    split = "validation" if args.validate else "test"
    return names | {"steps": args.steps, "split": split, **scores, "seconds": round(time.perf_counter() - start, 1)}


def stream(
    train: list[tuple[str, str]], method: str, share: float, near: bool, draw: random.Random
) -> Iterator[list[Pair]]:
    """Batches without end."""
    while True:
        batches = epoch(train, share, near, draw)
        yield from without_duplicates(batches, draw.randrange(2**31)) if method == "sampler" else batches


def main() -> None:
    """Run every method at every share and seed; append the results to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["mnrl", "exact", "sampler", "refined-1-1-1"])
    parser.add_argument("--shares", nargs="+", type=int, default=[0, 10, 25, 50])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--near", action="store_true")
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--output", type=Path, default=Path("sentence_duplicates.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    pairs = verses()
    for seed in args.seeds:
        for share in args.shares:
            for method in args.methods:
                record = json.dumps(run(args, pairs, method, share, seed))
                print(record, flush=True)
                with args.output.open("a") as file:
                    file.write(record + "\n")


if __name__ == "__main__":
    main()
