"""How well phase=search finds: its encoder beside BM25 on the same passages, its index beside comparing with all.

    python benchmarks/searching.py

Known items. *Titles*: every section of Python 3.11's documentation (and PEPs) whose title no other section has, each a
document without its title; the query is the title. *Questions*: 40 questions about this project's docs, worded as
somebody asks who does not know the page's words, with the page that answers; they were written once, before any
figure was seen. recall@k: the right document has a passage among the first k; k passages, not documents. BM25 is bm25s
(Robertson's k1 1.5, b 0.75, English stop words, no stems) over the same passages.

The index: 2,000 passages and all queries, against a product in double precision.
"""

import json
import sys
import time
from pathlib import Path

import bm25s
import numpy as np

from trivium.build import build_encoder
from trivium.data.passages import cut
from trivium.inference.index import VectorIndex
from trivium.plugin import discover
from trivium.schema import EncoderSettings

QUESTIONS = [
    ("how do I fine-tune only a small part of the weights", "adapters"),
    ("train a big model on one small GPU by storing it in 4 bits", "adapters"),
    ("continue a talk I had yesterday", "chat"),
    ("what happens when the dialogue gets longer than the model can read", "chat"),
    ("how often is progress written to disk", "checkpoints"),
    ("make batches in the background so that the GPU does not wait", "checkpoints"),
    ("remove phone numbers and mail addresses from my corpus", "cleaning"),
    ("drop texts that are nearly the same", "cleaning"),
    ("which columns must my CSV have", "data"),
    ("half of my lines are broken, can I go on without them", "data"),
    ("mix two corpora three to one", "data"),
    ("look at what the network will really see before it learns", "doctor"),
    ("why does my run refuse to start because of the labels", "doctor"),
    ("is there something for doctors and hospitals", "domains"),
    ("solve Python exercises that are checked by running them", "domains"),
    ("learn from thumbs up and thumbs down", "feedback"),
    ("put the better of two models into production by itself", "feedback"),
    ("teach a small network from a large one", "improve"),
    ("reinforcement learning with verifiable answers", "improve"),
    ("force the output to be valid JSON", "inference"),
    ("guess several tokens ahead to be faster", "inference"),
    ("run on llama.cpp", "inference"),
    ("read books of 100,000 words at once", "long_context"),
    ("load weights from a folder of transformers", "models"),
    ("save for ollama or llama.cpp", "models"),
    ("mixture of experts", "models"),
    ("use two graphics cards", "parallel"),
    ("submit a job to a cluster", "parallel"),
    ("where does the time of a step go to memory and compute", "performance"),
    ("write my own data set package", "plugins"),
    ("add a loss function of my own", "plugins"),
    ("I have just installed it, what now", "quickstart"),
    ("try several learning rates in one go", "quickstart"),
    ("what if the power fails in the middle", "reliability"),
    ("what does exit status 143 mean", "reliability"),
    ("let other programs ask the model over the network", "serving"),
    ("password for the API", "serving"),
    ("decay the step size along a cosine", "training"),
    ("freeze some layers by name", "training"),
    ("see the loss curve while it is running", "watching"),
]


def passages_of(documents, encoder, most):
    def count(texts):
        return [len(ids) for ids in encoder.tokenizer.encode_batch(texts)]

    return [(name, p.text) for name, text in documents for p in cut(text, most, count)]


def by_vectors(encoder, passages):
    tokenizer = encoder.tokenizer
    began = time.perf_counter()
    vectors = encoder.embed([tokenizer.input_ids(tokenizer.passage_prompt + text) for _, text in passages]).numpy()
    seconds = time.perf_counter() - began
    index = VectorIndex.of(vectors, "exact", encoder.similarity)

    def found(query, count):
        (vector,) = encoder.embed([tokenizer.input_ids(tokenizer.query_prompt + query)])
        return [hit.number for hit in index.nearest(vector, count)]

    return found, vectors, seconds


def by_words(passages):
    retriever = bm25s.BM25(k1=1.5, b=0.75)
    retriever.index(bm25s.tokenize([t for _, t in passages], stopwords="en", show_progress=False), show_progress=False)

    def found(query, count):
        words = bm25s.tokenize([query], stopwords="en", show_progress=False)
        if not words.vocab:
            return []
        numbers, scores = retriever.retrieve(words, k=min(count, len(passages)), show_progress=False)
        return [int(n) for n, s in zip(numbers[0], scores[0], strict=True) if s > 0]

    return found


def recalls(found, passages, queries):
    ranks = [[passages[n][0] for n in found(query, 10)] for query, _ in queries]
    return {
        k: np.mean([right in names[:k] for names, (_, right) in zip(ranks, queries, strict=True)]) for k in (1, 5, 10)
    }


def interval(share, count):
    return 1.96 * (share * (1 - share) / count) ** 0.5


def index_figures(encoder, vectors, queries):
    tokenizer = encoder.tokenizer
    asked = encoder.embed([tokenizer.input_ids(q) for q, _ in queries]).numpy()
    some = vectors[:2000]
    wanted = [set(np.argsort(-(some.astype(float) @ q.astype(float)))[:10].tolist()) for q in asked]
    told = {}
    for kind in ("exact", "hnsw"):
        index = VectorIndex.of(some, kind, "cosine")
        began = time.perf_counter()
        hits = [index.nearest(q, 10) for q in asked]
        seconds = time.perf_counter() - began
        same = sum(len({hit.number for hit in h} & w) for h, w in zip(hits, wanted, strict=True))
        told[kind] = {"recall@10": same / (10 * len(asked)), "ms_a_query": 1000 * seconds / len(asked)}
    return told


def main():
    discover()
    from trivium_plugins.summarise.sections import manual, titled

    encoder = build_encoder(EncoderSettings(), "cpu")
    sections = [(f"{n} {title}", title, text) for n, title, text in titled(manual(), 10**9)]
    titles = [title for _, title, _ in sections]
    unique = [(title, name) for name, title, _ in sections if titles.count(title) == 1]
    docs = Path(__file__).parents[1] / "docs"
    pages = [(p.stem, p.read_text()) for p in sorted(docs.glob("*.md")) if p.stem != "search"]
    sets = {"titles": ([(n, text) for n, _, text in sections], unique), "questions": (pages, QUESTIONS)}
    for most in [int(word) for word in sys.argv[1:]] or [encoder.tokenizer.room, 128, 64]:
        for name, (documents, queries) in sets.items():
            passages = passages_of(documents, encoder, most)
            vectors_found, vectors, seconds = by_vectors(encoder, passages)
            row = {"set": name, "tokens": most, "documents": len(documents), "passages": len(passages)}
            row |= {"queries": len(queries), "passages_a_second": round(len(passages) / seconds, 1)}
            for how, found in (("encoder", vectors_found), ("bm25", by_words(passages))):
                figures = recalls(found, passages, queries)
                row[how] = {f"recall@{k}": round(float(v), 3) for k, v in figures.items()}
                row[how]["+-@5"] = round(float(interval(figures[5], len(queries))), 3)
            print(json.dumps(row), flush=True)
            if name == "titles":
                print(json.dumps({"index": index_figures(encoder, vectors, queries)}), flush=True)


if __name__ == "__main__":
    main()
