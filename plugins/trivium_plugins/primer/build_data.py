"""Make the bundled data from three packages; needed only to change what is bundled, and then `pip install rdata`.

    python build_data.py scancode_toolkit_mini-32.5.0.tar.gz r-cran-janeaustenr_1.0.0-1_all.deb \\
        wordnet-base_3.0-37_all.deb

The first holds The Adventures of Sherlock Holmes and War and Peace (Project Gutenberg), the second six novels by Jane
Austen, the third WordNet 3.0. The same packages give the same texts.
"""

from __future__ import annotations

import argparse
import io
import lzma
import re
import sys
import tarfile
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

DATA = Path(__file__).parent / "data"
PAGE = "\f"

AUSTEN = ("sensesensibility", "prideprejudice", "mansfieldpark", "emma", "northangerabbey", "persuasion")

# Where a chapter begins; such a line is left out, since it says nothing about the text.
HEADING = re.compile(
    r"(CHAPTER|Chapter) [IVXLC\d]+|VOLUME [IVX]+|BOOK [A-Z]+: .*|(FIRST|SECOND) EPILOGUE.*"
    r"|ADVENTURE +[IVX]+\..*|[IVX]+\.( +THE ADVENTURE.*)?"
)
FIRST_HEADING = re.compile(r"(CHAPTER|Chapter) (I|1)|ADVENTURE +I\..*")

DOCUMENT = 2_700  # characters aimed at; chapters are cut into equal runs of paragraphs of about this length
SHORT = 800  # a shorter run, left beside a very long paragraph, joins its neighbour
REPEATED = 200  # a paragraph longer than this is kept once over all books
MOST_WORDS = 4_000  # definitions, and words to spell


# ---- reading packages


def deb_members(path: Path) -> dict[str, bytes]:
    """The regular files of a Debian package: an `ar` archive with a data.tar inside."""
    raw, at = path.read_bytes(), 8
    while at < len(raw):
        name, size = raw[at : at + 16].decode().strip(), int(raw[at + 48 : at + 58])
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(raw[at + 60 : at + 60 + size])) as tar:
                return {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}
        at += 60 + size + size % 2
    raise SystemExit(f"{path}: no data.tar in it")


def ending(members: dict[str, bytes], name: str) -> bytes:
    """The one member whose path ends in `name`."""
    return next(data for path, data in sorted(members.items()) if path.endswith(name))


# ---- books


def gutenberg(path: Path) -> Iterator[str]:
    """Sherlock Holmes and War and Peace, between the START and END marks of each."""
    with tarfile.open(path) as tar:
        text = next(tar.extractfile(m).read() for m in tar if m.name.endswith("data/gibberish/big.txt")).decode("ascii")
    for title in ("THE ADVENTURES OF SHERLOCK HOLMES", "WAR AND PEACE"):
        yield text.split(f"*** START OF THE PROJECT GUTENBERG EBOOK, {title} ***")[1].split("*** END OF")[0]


def austen(path: Path) -> Iterator[str]:
    """Jane Austen's novels, out of R's lazy-load data base."""
    import rdata  # not a dependency of the project: only this script needs it

    warnings.filterwarnings("ignore", module="rdata")
    members = deb_members(path)

    def unpickle(data: bytes) -> dict:
        return rdata.conversion.convert(rdata.parser.parse_data(data))

    index = unpickle(zlib.decompress(ending(members, "data/Rdata.rdx"), wbits=47))["variables"]
    base = ending(members, "data/Rdata.rdb")
    for name in AUSTEN:
        start, length = (int(n) for n in index[name])
        yield "\n".join(str(line) for line in unpickle(zlib.decompress(base[start + 4 : start + length])))


def paragraph(block: str) -> str:
    """A block of lines as one line; verse, which is indented and begins every line with a capital, keeps its lines."""
    lines = block.split("\n")
    begins = [line.strip().lstrip("\"'")[:1] for line in lines]
    verse = len(lines) > 1 and all(line.startswith("  ") for line in lines) and all(not b.islower() for b in begins)
    text = ("\n" if verse else " ").join(" ".join(line.split()) for line in lines)
    text = text.replace("_", "").replace("``", '"').replace("''", '"')
    return re.sub(r"(?<=\S)(\*|\[\d\])", "", text)  # marks of footnotes


def chapters(book: str) -> Iterator[list[str]]:
    """The paragraphs of each chapter, without headings, footnotes, editors' notes and what stands before chapter 1."""
    blocks = [b.strip("\n") for b in re.split(r"\n[ \t]*\n", book.replace("\r", ""))]
    blocks = [b for b in blocks if b.strip()]
    first = next(i for i, b in enumerate(blocks) if FIRST_HEADING.fullmatch(b.strip()))
    found: list[str] = []
    for block in blocks[first:]:
        bare = block.strip()
        if bare == "A NOTE ON THE TEXT":
            break
        if HEADING.fullmatch(bare):
            if found:
                yield found
            found = []
        elif not bare.startswith(("*", "[")) and bare.upper().rstrip(".") not in ("FINIS", "THE END"):
            found.append(paragraph(block))
    if found:
        yield found


def documents(book: str, seen: set[str]) -> Iterator[str]:
    """Runs of paragraphs of one chapter, as equal in length as paragraph ends allow."""
    for found in chapters(book):
        kept = []
        for text in found:
            if len(text) <= REPEATED or text not in seen:
                kept.append(text)
            seen.add(text)
        total = sum(map(len, kept))
        runs = max(1, round(total / DOCUMENT))
        cut: list[list[str]] = [[] for _ in range(runs)]
        at = 0
        for text in kept:  # a paragraph goes where its middle falls
            cut[min(runs - 1, int((at + len(text) / 2) * runs / max(1, total)))].append(text)
            at += len(text)
        texts: list[str] = []
        for text in ("\n\n".join(run) for run in cut if run):
            if texts and min(len(text), len(texts[-1])) < SHORT:
                text = f"{texts.pop()}\n\n{text}"
            texts.append(text)
        yield from texts


# ---- WordNet

PARTS_OF_SPEECH = {"1": "noun", "2": "verb", "3": "adj", "5": "adj"}

# A word any of whose senses is marked so is left out altogether ...
SLUR = re.compile(
    r"ethnic slur|offensive|obscen|vulgar|disparag|derogat|\bslang for|\bgenital|copulat|sexual intercourse"
    r"|sexual(ly)? (arous|desire|excit|attract)|prostitut|\brape|homosexual|excrement|feces|urin(e|at)|masturbat|orgasm"
)
# ... as is a meaning with one of these, for the sake of what a small model will say out of context.
UNWANTED = re.compile(
    r"\b(sex|sexual\w*|lust\w*|erotic\w*|nud\w+|naked|breasts?|penis|vagina\w*|anus|semen|sperm|lewd|negro\w*"
    r"|nazi\w*|slave\w*|suicid\w*|tortur\w*|whore\w*|mistress|pornograph\w*|incest\w*|caucasoid|race|racial\w*"
    r"|gypsy|gypsies|drugs?)\b"
)
LEFT_OUT = frozenset(
    "arse ass bastard bitch boob butt cock colored coon crap cripple dick dumb fag fairy fat gay gook hooker"
    " idiot jap kike kinky lesbian moron nigger nude oriental paddy pansy pee pimp piss poof porn prick pussy"
    " queer rape retard screw sex sexual sexy shit slave slut spade spic squaw suck tit wench whore wop".split()
)


def wordnet(path: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """(word, meaning) of the commonest words in their commonest sense, and words to spell; both commonest first."""
    members = deb_members(path)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for line in ending(members, "wordnet/cntlist.rev").decode().splitlines():
        key, _, count = line.split()
        word, sense = key.split("%")
        if sense[0] in PARTS_OF_SPEECH and re.fullmatch("[a-z]{3,12}", word):
            counts[word][PARTS_OF_SPEECH[sense[0]]] += int(count)
    senses: dict[tuple[str, str], list[str]] = defaultdict(list)
    for part in ("noun", "verb", "adj"):
        glosses = {}
        for line in ending(members, f"wordnet/data.{part}").decode().splitlines():
            if not line.startswith(" "):
                head, gloss = line.split(" | ", 1)
                fields = head.split()
                lemmas = {re.sub(r"\(\w+\)$", "", w) for w in fields[4 : 4 + 2 * int(fields[3], 16) : 2]}
                glosses[fields[0]] = (gloss.strip(), lemmas)
        for line in ending(members, f"wordnet/index.{part}").decode().splitlines():
            fields = line.split()
            if not line.startswith(" ") and fields[0] in counts:
                for offset in fields[-int(fields[2]) :]:
                    gloss, lemmas = glosses[offset]
                    # a word that is written with a capital in this sense is a name; mark it, to be left out below
                    senses[fields[0], part].append(gloss if fields[0] in lemmas else "")
    # the index has a word's commonest sense first; a few counted words are not in the index
    first = {(word, part): (senses[word, part] or [""])[0] for word in counts for part in counts[word]}
    common = sorted(counts, key=lambda word: (-counts[word].total(), word))
    clean = [
        w for w in common if w not in LEFT_OUT and not any(SLUR.search(g) for p in counts[w] for g in senses[w, p])
    ]
    meanings: dict[str, str] = {}
    for word in clean:
        part = max(counts[word], key=lambda p: (counts[word][p], p))
        meaning = short(first[word, part])
        if meaning and meaning not in meanings and word not in re.findall("[a-z]+", meaning):
            meanings[meaning] = word  # a meaning serves one word, or its synonyms could stand in two splits
    spelled = [w for w in clean if len(w) <= 8 and all(first[w, p] for p in counts[w])]
    return [(word, meaning) for meaning, word in meanings.items()], spelled


def short(gloss: str) -> str:
    """The first definition of a gloss if it is short and plain, otherwise nothing."""
    meaning = re.split(r'[;:]? *"|; ', gloss)[0].strip(" ;:")
    plain = re.fullmatch(r"[A-Za-z][A-Za-z ,'()/-]+", meaning) and meaning.count("(") == meaning.count(")")
    return meaning if plain and 8 <= len(meaning) <= 90 and not UNWANTED.search(meaning) else ""


# ---- writing


def write(name: str, text: str) -> None:
    """Compress `text` as data/`name`."""
    DATA.mkdir(exist_ok=True)
    (DATA / name).write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{name}: {len(text.encode()):,} bytes, {(DATA / name).stat().st_size:,} compressed")


def main(arguments: Iterable[str]) -> None:
    """Read the three packages and write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("scancode", "janeausten", "wordnet"):
        parser.add_argument(name, type=Path, help=f"the {name} package file")
    paths = parser.parse_args(list(arguments))
    seen: set[str] = set()
    books = [d for book in (*austen(paths.janeausten), *gutenberg(paths.scancode)) for d in documents(book, seen)]
    assert not any(PAGE in d or "Gutenberg" in d for d in books), "a mark or a licence text is left in a book"
    assert len(set(books)) == len(books), "a document twice"
    definitions, spelled = wordnet(paths.wordnet)
    write("books.txt.xz", PAGE.join(books))
    write("definitions.tsv.xz", "".join(f"{word}\t{meaning}\n" for word, meaning in definitions[:MOST_WORDS]))
    write("words.txt.xz", "".join(f"{word}\n" for word in spelled[:MOST_WORDS]))


if __name__ == "__main__":
    main(sys.argv[1:])
